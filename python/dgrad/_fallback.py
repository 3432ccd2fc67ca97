"""The three directions by PyTorch's own operators, for what cuDNN cannot run, and why."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.grad import conv2d_weight

from . import _reproduction, config, log
from ._geometry import Geometry, Pair, output_size
from ._operator import widened
from ._watch import note, watchers
from .exceptions import NotSupportedError

# input, weight, bias, geometry and output_padding of a call
Arguments = tuple[Tensor, Tensor, Tensor | None, Geometry, Pair]

PLAIN_TYPES = (Tensor, torch.nn.Parameter)
FORWARD_MODE = "forward-mode AD is at work"


def transformed() -> str | None:
    """What of autograd's transforms is at work, in words, or None."""
    if forward_ad._current_level >= 0:
        return FORWARD_MODE
    top = torch._C._functorch.peek_interpreter_stack()
    return None if top is None else f"torch.func is at work ({top.key().name.lower()})"


def have_tangents(*values: object) -> bool:
    """Whether forward-mode AD has a tangent for one of the tensors among them."""
    return forward_ad._current_level >= 0 and any(
        isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
        for value in values
    )


def at_work() -> str:
    """What is at work that leaves the call to PyTorch's operator."""
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace is at work"
    mode = torch.utils._python_dispatch._get_current_dispatch_mode()
    if mode is None:
        return transformed() or "a dispatch mode before autograd is at work"
    return transformed() or f"the dispatch mode {type(mode).__name__} is at work"


def permit(flags: config.Flags | None, reason: str, again: Arguments | None = None) -> None:
    """Raise NotSupportedError if the flags forbid PyTorch's own operator.

    ``again``: the arguments of conv_transpose2d, where these are the whole reason.
    """
    own = None if flags is None else flags.fallback
    if (own or config.current().fallback) == "error":
        text = f"{reason}, and fallback='error' forbids PyTorch's own operator"
        if again is not None and all(_can_be_made(value) for value in again[:3]):
            lines = _reproduction.of_tensors(*again, flags={"fallback": "error"})
            text += f"\nTo reproduce:\n\n{lines}\n"
        raise NotSupportedError(text)


def _can_be_made(tensor: Tensor | None) -> bool:
    """Whether one line of Python makes a tensor that is refused for the same reason."""
    if tensor is None:
        return True
    plain = type(tensor) in PLAIN_TYPES and tensor.layout is torch.strided
    return plain and not (tensor.is_neg() or tensor._is_zerotensor())


def announce(flags: config.Flags | None, reason: str, again: Arguments | None = None) -> None:
    """Say that PyTorch's own operator runs: logged once for each reason.

    Raises:
        NotSupportedError: the flags forbid it; as :func:`permit`.
    """
    permit(flags, reason, again)
    tell(reason)


def tell(reason: str) -> None:
    """What :func:`announce` says."""
    log.fallback(reason)
    if watchers:
        note(f"PyTorch's own operator runs: {reason}")


# torch.compile runs it while it reads code that calls it, and keeps nothing of it in the graph. It
# is what torch.compiler.assume_constant_result does, which would import the compiler.
tell._dynamo_marked_constant = True  # type: ignore[attr-defined]


def run(
    direction: str,
    a: Tensor,
    b: Tensor,
    geometry: Geometry,
    size: Pair,
    bias: Tensor | None = None,
) -> Tensor:
    """The same result as a :class:`dgrad._call.Call` for the same arguments.

    No autocast is at work: the forward's is past, and PyTorch's gradients obey none.
    """
    if torch._C._is_any_autocast_enabled():
        with torch.autocast(a.device.type, enabled=False):
            return run(direction, a, b, geometry, size, bias)
    wide = widened(a, geometry.stride)
    if wide is not None:
        bias = None if bias is None else bias.to(wide)
        return run(direction, a.to(wide), b.to(wide), geometry, size, bias).to(a.dtype)
    padding, stride, dilation, groups = geometry
    if direction == "dgrad":
        least = output_size(a.shape[2:], b.shape[2:], geometry, (0, 0))
        output_padding = (size[0] - least[0], size[1] - least[1])
        return F.conv_transpose2d(a, b, bias, stride, padding, output_padding, groups, dilation)
    if direction == "fprop":
        return F.conv2d(a, b, None, stride, padding, dilation, groups)
    weight_size = (b.shape[1], a.shape[1] // groups, *size)
    grad_weight: Tensor = conv2d_weight(a, weight_size, b, stride, padding, dilation, groups)
    return grad_weight
