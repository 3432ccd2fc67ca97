"""What conv_transpose2d accepts: PyTorch's exception classes, with the argument, its value and
what was expected in the text."""

from __future__ import annotations

import torch
from torch import Tensor

from ._geometry import Geometry, Pair, is_known, output_size
from ._words import shown

_INT64_MAX = 2**63 - 1


class IntegerRangeError(ValueError, RuntimeError, TypeError):
    """An integer that does not fit in 64 bits. PyTorch raises a ValueError for it (a RuntimeError
    in 2.4), and a TypeError where it is in a tuple or list."""


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _autocasts(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def _may_be_convolved(dtype: torch.dtype) -> bool:
    return (dtype.is_floating_point or dtype.is_complex) and dtype.itemsize > 1


def check_is_tensor(name: str, value: object) -> None:
    """TypeError for what is none."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"conv_transpose2d(): {name} is of type {type(value).__name__}, expected a Tensor"
        )


def check_tensors(input: object, weight: object, bias: object) -> None:
    """The checks that need no geometry: kinds, layouts, devices, dtypes.

    Raises:
        TypeError: not a tensor.
        NotImplementedError: a quantized or nested tensor, a sparse bias, any sparse one on the
            meta device, or an input of integers with a weight of another dtype.
        RuntimeError: another sparse tensor, or a device or dtype that is not the input's.
    """
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if value is None and name == "bias":
            continue
        check_is_tensor(name, value)
        assert isinstance(value, Tensor)
        if value.is_quantized:
            raise NotImplementedError(
                f"{name} is quantized ({value.dtype}), expected a floating-point tensor: "
                "dequantize() it first"
            )
        if value.is_nested:  # and strided: the jagged ones are a subclass with rules of its own
            raise NotImplementedError(
                f"{name} is a nested tensor, expected a dense tensor: unbind() it first"
            )
        if value.layout is not torch.strided and value.layout is not torch._mkldnn:  # type: ignore[attr-defined]
            # PyTorch's own checks meet these two later, where it looks for a kernel.
            late = name == "bias" or (isinstance(input, Tensor) and input.is_meta)
            raise (NotImplementedError if late else RuntimeError)(
                f"{name} has layout {value.layout}, expected a dense tensor: to_dense() it first"
            )
    assert isinstance(input, Tensor)
    for name, value in (("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) or input.layout is not torch.strided:
            continue
        if value.device != input.device and not input.is_meta:  # PyTorch infers the shape
            raise RuntimeError(
                f"{name} is on {value.device}, expected {input.device}, the device of input"
            )
        # Elsewhere PyTorch's operator is still to cast, or adds a bias of its own type; on CUDA the
        # casting is done.
        settled = input.is_cuda or (name == "weight" and not _autocasts(input.device.type))
        if value.dtype != input.dtype and settled:
            if not _may_be_convolved(input.dtype):
                # PyTorch looks for a kernel first. On CUDA it does not, and raises a base of this.
                raise NotImplementedError(
                    f"input has dtype {input.dtype} and {name} {value.dtype}, expected one "
                    "floating-point dtype for both"
                )
            raise RuntimeError(
                f"{name} has dtype {value.dtype}, expected {input.dtype}, the dtype of input"
            )


def check_sizes(
    input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, output_padding: Pair
) -> Pair:
    """The checks of shapes and numbers; returns the output's spatial size.

    Raises:
        IntegerRangeError: a number that does not fit in 64 bits.
        RuntimeError: everything else that does not fit together.
    """
    # Each number is compared alone: compiled code that asks for the least of several sizes is
    # good for one order of these, and another order compiles it anew.
    padding, stride, dilation, groups = geometry
    for name, values, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("output_padding", output_padding, 0),
        ("dilation", dilation, 1),
        ("groups", (groups,), 1),
    ):
        given = values if len(values) > 1 else values[0]
        if any(not -_INT64_MAX - 1 <= value <= _INT64_MAX for value in values):
            raise IntegerRangeError(f"{name} is {shown(given)}, expected a 64-bit integer")
        if any(value < least for value in values):
            raise RuntimeError(f"{name} is {shown(given)}, expected at least {least}")
    if input.dim() not in (3, 4):
        raise RuntimeError(
            f"input has shape {_shape(input)}, expected 3 dimensions (C_in, H, W) "
            "or 4 dimensions (N, C_in, H, W)"
        )
    if weight.dim() != 4:
        raise RuntimeError(
            f"weight has shape {_shape(weight)}, expected 4 dimensions (C_in, C_out/groups, kH, kW)"
        )
    for name, tensor, sizes in (
        ("weight", weight, weight.shape),
        ("input", input, input.shape[-3:]),
    ):
        if any(side < 1 for side in sizes):
            raise RuntimeError(
                f"{name} has shape {_shape(tensor)}, expected each size to be at least 1 "
                "(only the batch may be empty)"
            )
    if weight.shape[0] % groups != 0:
        raise RuntimeError(
            f"groups is {groups}, expected a divisor of the {weight.shape[0]} input channels "
            f"of weight {_shape(weight)}"
        )
    if input.shape[-3] != weight.shape[0]:
        raise RuntimeError(
            f"input has shape {_shape(input)} with {input.shape[-3]} channels, expected "
            f"{weight.shape[0]} channels as in weight {_shape(weight)}"
        )
    channels = weight.shape[1] * groups
    if bias is not None and _shape(bias) != (channels,):
        raise RuntimeError(f"bias has shape {_shape(bias)}, expected ({channels},)")
    for i, side in enumerate(("height", "width")):
        if output_padding[i] >= max(stride[i], dilation[i]):
            raise RuntimeError(
                f"output_padding is {output_padding}, expected a {side} smaller than stride "
                f"{stride[i]} or dilation {dilation[i]}"
            )
    size = output_size(input.shape[-2:], weight.shape[-2:], geometry, output_padding)
    images = input.shape[0] if input.dim() == 4 else 1
    wrong = None
    if any(side < 1 for side in size):
        wrong = f"{size}, expected at least 1"
    elif is_known(images * channels * size[0] * size[1] * input.element_size() > _INT64_MAX):
        wrong = f"{(images, channels, *size)}, expected at most {_INT64_MAX} bytes"
    if wrong is not None:
        raise RuntimeError(
            f"the output of input {_shape(input)}, weight {_shape(weight)}, stride {stride}, "
            f"padding {padding}, output_padding {output_padding}, dilation {dilation} has "
            f"size {wrong}"
        )
    return size
