"""PyTorch's own operator, kept from what would crash the process, and its errors in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._arguments import check_sizes, check_tensors
from ._geometry import Geometry, Pair, integer, output_size, pair

# Note [Wide strides]
# On the CPU PyTorch gives float32 and the half types to oneDNN, which writes code for each problem.
# That for a transposed convolution grows with the horizontal stride: from about 5000 on (PyTorch
# 2.13, AMD EPYC) many a problem crashes the process or never ends, however small its tensors. The
# loop that runs float64 instead does neither. tests/test_errors_extreme.py has some of them.
_MOST_STRIDE = 1024
_MOST_NUMBER = 2**31 - 1  # what that loop counts with has 32 bits
_WIDENED = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}


_Tensors = tuple[Tensor, Tensor, Tensor | None]
_Numbers = tuple[
    int | Sequence[int], int | Sequence[int], int | Sequence[int], int, int | Sequence[int]
]


def widened(tensor: Tensor, stride: int | Sequence[int]) -> torch.dtype | None:
    """The dtype to run a convolution of a tensor in, if not its own; see Note [Wide strides]."""
    last = stride[-1] if isinstance(stride, (tuple, list)) and stride else stride
    if not isinstance(last, int) or last <= _MOST_STRIDE:
        return None
    if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
        return None
    return _WIDENED.get(tensor.dtype) if tensor.layout is torch.strided else None


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
) -> Tensor:
    """:func:`torch.nn.functional.conv_transpose2d`."""
    given = (input, weight, bias)
    numbers = (stride, padding, output_padding, groups, dilation)
    wide = widened(input, stride)
    if wide is not None:
        check_tensors(input, weight, bias)  # what may come without a look, under transforms
        dtype = input.dtype
        if torch.is_autocast_enabled("cpu") and not dtype.is_complex:
            dtype = torch.get_autocast_dtype("cpu")
        input, weight = input.to(wide), weight.to(wide)
        bias = None if bias is None else bias.to(wide)
    try:
        result = F.conv_transpose2d(input, weight, bias, *numbers)
    except (RuntimeError, TypeError, ValueError) as error:
        found = _in_words(error, given, numbers)
        if found is None:
            raise
        raise found from error
    return result if wide is None else result.to(dtype)


def _in_words(error: Exception, tensors: _Tensors, numbers: _Numbers) -> Exception | None:
    """An error of the same class that names what is wrong, where that is known."""
    input, weight, bias = tensors
    stride, padding, output_padding, groups, dilation = numbers
    try:  # what was run without a look: under transforms, for example
        geometry = Geometry(
            pair(padding, "padding"),
            pair(stride, "stride"),
            pair(dilation, "dilation"),
            integer(groups, "groups"),
        )
        extra = pair(output_padding, "output_padding")
        check_tensors(input, weight, bias)
        check_sizes(input, weight, bias, geometry, extra)
    except Exception as found:
        return found if isinstance(found, type(error)) else None
    if type(error) not in (RuntimeError, NotImplementedError):  # not the operator's
        return None
    words = (
        _no_kernel(input, error)
        or _too_large(input, weight, geometry, extra)
        or _other_dtype(input, weight, bias, error)
    )
    return None if words is None else type(error)(words)


def _no_kernel(input: Tensor, error: Exception) -> str | None:
    if "not implemented for" not in str(error):
        return None
    return (
        f"input has dtype {input.dtype}, for which PyTorch's conv_transpose2d has no kernel on "
        f"{input.device.type}: expected a floating-point dtype, such as input.float() with "
        "weight.float()"
    )


def _other_dtype(
    input: Tensor, weight: Tensor, bias: Tensor | None, error: Exception
) -> str | None:
    """On the CPU PyTorch adds some of another dtype and not others, and casts under autocast."""
    text = str(error)
    if not any(f"{each} type" in text for each in ("weight", "bias", "scalar", "result")):
        return None
    name, other = ("weight", weight) if "weight type" in text else ("bias", bias)
    if other is None or other.dtype is input.dtype:
        return None
    return f"{name} has dtype {other.dtype}, expected {input.dtype}, the dtype of input"


def _too_large(
    input: Tensor, weight: Tensor, geometry: Geometry, output_padding: Pair
) -> str | None:
    if input.device.type != "cpu":
        return None
    padding, stride, dilation, _ = geometry
    limit = f"expected at most {_MOST_NUMBER}, the most that PyTorch's operator counts on the CPU"
    for name, values in (
        ("stride", stride),
        ("padding", padding),
        ("output_padding", output_padding),
        ("dilation", dilation),
    ):
        if max(values) > _MOST_NUMBER:
            return f"{name} is {values}, {limit}"
    whole = output_size(
        input.shape[-2:], weight.shape[-2:], geometry._replace(padding=(0, 0)), output_padding
    )
    if max(whole) > _MOST_NUMBER:
        return (
            f"stride {stride}, dilation {dilation} and output_padding {output_padding} make an "
            f"output of size {whole} before padding is taken off, {limit}"
        )
    return None
