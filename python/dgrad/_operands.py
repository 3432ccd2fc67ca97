"""The two tensors that a direction takes: which they are, what they give, whether cuDNN reads them.

A direction takes two of (x, w, y) and makes the third; see Note [Geometry] in src/problem.hpp.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _loader
from ._geometry import Geometry, Pair, is_channels_last

DTYPES = {
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
    torch.float32: "float32",
    torch.float64: "float64",
}
INPUTS = {"dgrad": ("y", "w"), "fprop": ("x", "w"), "wgrad": ("x", "y")}
OUTPUT = {"dgrad": "x", "fprop": "y", "wgrad": "w"}

_MAX_NUMBER = 2**31 - 1  # that cuDNN's descriptors hold


def output_shape(
    direction: str, a: Sequence[int], b: Sequence[int], groups: int, size: Pair
) -> tuple[int, int, int, int]:
    """Shape of the direction's result, of spatial size ``size``."""
    if direction == "dgrad":
        return (a[0], b[1] * groups, *size)
    if direction == "fprop":
        return (a[0], b[0], *size)
    return (b[1], a[1] // groups, *size)


def memory_format(a: Tensor, b: Tensor) -> torch.memory_format:
    """The layout that PyTorch brings the inputs of a convolution into, and gives its output."""
    if a.dtype != torch.float64 and (
        is_channels_last(a.shape, a.stride()) or is_channels_last(b.shape, b.stride())
    ):
        return torch.channels_last
    return torch.contiguous_format


def check_numbers(geometry: Geometry) -> None:
    """RuntimeError, PyTorch's class, for a number that cuDNN's descriptors cannot hold."""
    for name in ("stride", "padding", "dilation"):
        values = getattr(geometry, name)
        if max(values) > _MAX_NUMBER:
            raise RuntimeError(
                f"{name} is {values}, expected at most {_MAX_NUMBER}, the largest that cuDNN takes"
            )


def check_operands(direction: str, a: Tensor, b: Tensor, bias: Tensor | None, groups: int) -> None:
    """RuntimeError, PyTorch's class, for tensors that no call reads together.

    What a forward pass saved may have changed since: ``layer.half()`` changes a saved weight.
    """
    first, second = INPUTS[direction]
    for name, tensor in ((first, a), (second, b)):
        if tensor.dim() != 4:
            raise RuntimeError(f"{name} has shape {tuple(tensor.shape)}, expected 4 dimensions")
    if bias is not None and bias.shape != (b.shape[1] * groups,):
        raise RuntimeError(f"bias has shape {tuple(bias.shape)}, expected ({b.shape[1] * groups},)")
    for name, other in ((second, b), ("bias", bias)):
        if other is None or (other.dtype is a.dtype and other.device == a.device):
            continue
        raise RuntimeError(
            f"{name} is {other.dtype} on {other.device}, expected {a.dtype} on {a.device} as "
            f"{first}; if it was saved for the backward pass, it has changed since"
        )


def unsuited(tensor: Tensor) -> str | None:
    """Why tensors of this one's device and type are PyTorch's to run, or None."""
    if not tensor.is_cuda:
        return f"input is on {tensor.device.type}, and cuDNN runs on CUDA devices"
    if tensor.dtype not in DTYPES:
        return f"cuDNN's convolutions have no {tensor.dtype}"
    return None


def unusable(cudnn_enabled: bool) -> str | None:
    """Why cuDNN is not to be used for any tensor, or None."""
    if not cudnn_enabled:
        return "torch.backends.cudnn.enabled is False"
    return _loader.unavailable_reason()
