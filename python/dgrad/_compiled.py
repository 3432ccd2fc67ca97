"""What the compiler finds for a call of conv_transpose2d: an operator for its graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import _fallback, config
from ._arguments import check_is_tensor
from ._geometry import integer, pair

_OLD_COMPILER = torch.__version__ < "2.13"
_is_vmapped = torch._C._functorch.is_batchedtensor


def _is_exporting() -> bool | None:
    """Whether PyTorch's own operators are wanted; None before PyTorch 2.7, where nothing tells."""
    # Older compilers take is_exporting() for True always: there the flag that it reads is read.
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return flag if flag is not None or _OLD_COMPILER else torch.compiler.is_exporting()


def _kept_from_compiler(exporting: bool | None, tensors: tuple[Tensor, ...]) -> str | None:
    """Why compiled code is of PyTorch's operator, or None."""
    if exporting:
        return "exporting is at work"
    if exporting is None:
        return "PyTorch before 2.7 does not tell compiling from exporting"
    if forward_ad._current_level >= 0:  # read by the compiler, which compiles anew when it changes
        return _fallback.FORWARD_MODE
    for tensor in tensors:
        if _is_vmapped(tensor):
            return "torch.func is at work (vmap)"
        if type(tensor) not in _fallback.PLAIN_TYPES:
            return f"{type(tensor).__name__} is a subclass of Tensor with rules of its own"
    return None


def compiled(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    output_padding: int | Sequence[int],
    groups: int,
    dilation: int | Sequence[int],
    flags: config.Flags | None,
) -> Tensor:
    """What the compiler finds for a call: dgrad's operator, or for export PyTorch's own."""
    if flags is not None and not isinstance(flags, config.Flags):
        raise config.no_flags(flags)
    exporting = _is_exporting()
    tensors = (input, weight) if bias is None else (input, weight, bias)
    check_is_tensor("input", input)
    check_is_tensor("weight", weight)
    if bias is not None:
        check_is_tensor("bias", bias)
    reason = _kept_from_compiler(exporting, tensors)
    if reason is not None:
        _fallback.permit(flags, reason)
        if not exporting:
            _fallback.tell(reason)
        return F.conv_transpose2d(
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )
    output: Tensor = torch.ops.dgrad.conv_transpose2d(
        input,
        weight,
        bias,
        pair(stride, "stride"),
        pair(padding, "padding"),
        pair(output_padding, "output_padding"),
        groups if type(groups) is int else integer(groups, "groups"),
        pair(dilation, "dilation"),
        "" if flags is None else flags.as_text(),
    )
    return output
