"""conv_transpose2d with PyTorch's signature, on cuDNN's data gradient."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from . import _fallback, _operator, config
from ._arguments import check_sizes, check_tensors
from ._autograd import convolution, ready_recipe, record
from ._call import Call
from ._compiled import compiled
from ._geometry import Geometry, Pair, appended_rows, integer, pair
from ._operands import check_numbers, unsuited, unusable
from ._watch import is_traced, profiling, watchers
from .planner import plan_cache

# Each call asks it: the way to it would take as long as it does.
_any_autocast = torch._C._is_any_autocast_enabled


class _Prepared(NamedTuple):
    """What a call with these arguments comes to, worked out once."""

    call: Call | None  # None where PyTorch runs it
    reason: str | None  # why, unless there is nothing to run
    geometry: Geometry
    size: Pair
    appended: Pair

    def ran_natively(self) -> bool:
        return self.call is not None and self.call.ran_natively()


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
    *,
    flags: config.Flags | None = None,
) -> Tensor:
    """Transposed 2D convolution: :func:`torch.nn.functional.conv_transpose2d` run by cuDNN's
    data gradient, with the same arguments, results, output strides and errors.

    On a CUDA device float16, bfloat16, float32 and float64 run through dgrad, also in
    torch.compile (PyTorch 2.7 and later). All else (CPU and other devices, other dtypes, tensor
    subclasses, exporting and tracing) is run by PyTorch's own operator, and the reason is logged
    once.

    Args:
        input: shape (N, C_in, H, W) or (C_in, H, W), any strides.
        weight: shape (C_in, C_out/groups, kH, kW), any strides.
        bias: shape (C_out,) or None.
        stride: int or (vertical, horizontal), default 1.
        padding: rows and columns taken off each side of the output, default 0.
        output_padding: rows and columns added at the bottom and right, default 0; less than
            stride or dilation.
        groups: number of groups, default 1.
        dilation: spacing of the kernel's elements, default 1.
        flags: flags for this call and its gradients over those of the process, default None.

    Returns:
        Tensor of shape (N, C_out, H_out, W_out) or (C_out, H_out, W_out) with
        ``H_out = (H - 1) * stride - 2 * padding + dilation * (kH - 1) + output_padding + 1``
        (formula of :class:`torch.nn.ConvTranspose2d`), with PyTorch's strides: in channels_last if
        input or weight is, but on CUDA for float64 and for output_padding of stride or more.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as PyTorch for bad arguments.
        dgrad.NotSupportedError: no candidate can run it under the flags in force.
        dgrad.OutOfMemoryError: the same, for want of memory.
    """
    if torch.compiler.is_compiling():
        return compiled(
            input, weight, bias, stride, padding, output_padding, groups, dilation, flags
        )
    if flags is not None:
        try:
            flags = config.interned(flags)
        except TypeError:  # also of what has no hash
            raise config.no_flags(flags) from None
    if _any_autocast() and torch.is_autocast_enabled("cuda") and not _is_transformed():
        input, weight = autocast(input), autocast(weight)
        bias = None if bias is None else autocast(bias)
    own = stride, padding, output_padding, groups, dilation
    if plan_cache.ready is not None:
        known = plan_cache.ready.call(input, weight, bias, own, flags)
        if known is not None:
            if type(known) is Tensor:
                return known
            if not torch.is_inference_mode_enabled():
                return record(input, weight, bias, known)
            found = plan_cache.ready.execute(known, input, weight, bias)  # type: ignore[arg-type]
            if found is not None:
                return found
    if _is_transformed():
        return _pytorch(flags, _fallback.at_work(), input, weight, bias, *own)
    if isinstance(input, torch.fx.Proxy):  # and so may be the other arguments
        return _pytorch(flags, "torch.fx is at work", input, weight, bias, *own)
    state, held = None, config.current()
    if plan_cache.exchange is not None and not watchers and not profiling():
        state = (*own, *config.switches(flags))
    geometry = Geometry(
        pair(padding, "padding"),
        pair(stride, "stride"),
        pair(dilation, "dilation"),
        groups if type(groups) is int else integer(groups, "groups"),
    )
    output_padding = pair(output_padding, "output_padding")
    if state is not None and not all(map(_is_plain, own)):
        # As native code looks it up: a list, for example, has no hash.
        padding, stride, dilation, groups = geometry
        return conv_transpose2d(
            input, weight, bias, stride, padding, output_padding, groups, dilation, flags=flags
        )
    cleared, deciding = plan_cache.cleared, config.deciding("dgrad", flags)
    key = _key(input, weight, bias, geometry, output_padding, deciding)
    prepared = None if key is None else plan_cache.get(key)
    if prepared is None:
        prepared = _prepare(input, weight, bias, geometry, output_padding, deciding)
        if key is not None:
            plan_cache.put(key, prepared)
    if prepared.call is None:
        if prepared.reason is not None:
            again = (input, weight, bias, geometry, output_padding)
            _fallback.announce(flags, prepared.reason, again)
        return _operator.conv_transpose2d(
            input,
            weight,
            bias,
            geometry.stride,
            geometry.padding,
            output_padding,
            geometry.groups,
            geometry.dilation,
        )
    x, weight = enter(input, weight, prepared.appended)
    output = convolution("dgrad", x, weight, geometry, prepared.size, flags, prepared.call, bias)
    if (  # unless another thread turned a switch meanwhile, or turned one there and back
        state is not None
        and x is input
        and cleared == plan_cache.cleared
        and config.current() is held
        and state == (*own, *config.switches(flags))
        and deciding == config.deciding("dgrad", flags)
    ):
        made = partial(
            ready_recipe, x, weight, output, geometry, prepared.size, flags, prepared.call, held
        )
        call = prepared.call.ready(made)
        if call is not None:
            plan_cache.keep_ready(input, weight, bias, state, call)
    return output if input.dim() == 4 else output.squeeze(0)


def _is_plain(number: object) -> bool:
    """An int or a tuple of these, and nothing that is only like one."""
    parts = number if type(number) is tuple else (number,)
    return all(type(part) is int for part in parts)


def _is_transformed() -> bool:
    """Whether a transform or a mode is at work that leaves the call to PyTorch's operator."""
    return (
        torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or is_traced()
    )


def _key(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    output_padding: Pair,
    deciding: config.Deciding,
) -> tuple[object, ...] | None:
    """All that the preparation reads; None for arguments that have no such properties."""
    plain = _fallback.PLAIN_TYPES
    if (
        type(input) not in plain
        or type(weight) not in plain
        or (bias is not None and type(bias) not in plain)
    ):
        return None  # what stands for a tensor may write down what it is asked, as torch.fx's does
    try:
        return (
            type(input),
            input.shape,
            input.stride(),
            input.dtype,
            input.device,
            input.is_neg(),
            input._is_zerotensor(),
            input.data_ptr() & 15,
            type(weight),
            weight.shape,
            weight.stride(),
            weight.dtype,
            weight.device,
            weight.is_neg(),
            weight._is_zerotensor(),
            weight.data_ptr() & 15,
            None if bias is None else _bias_key(bias),
            geometry,
            output_padding,
            deciding,
            threading.get_ident(),
        )
    except (AttributeError, TypeError, RuntimeError):
        # Not a tensor, or one without strides or storage, such as a sparse or a fake one.
        return None


def _bias_key(bias: Tensor) -> tuple[object, ...]:
    return (
        type(bias),
        bias.shape,
        bias.stride(),
        bias.dtype,
        bias.device,
        bias.is_neg(),
        bias._is_zerotensor(),
        bias.data_ptr() & 15,
    )


def _prepare(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    output_padding: Pair,
    deciding: config.Deciding,
) -> _Prepared:
    reason = _subclass_reason(input, weight, bias)
    if reason is not None:
        return _Prepared(None, reason, geometry, (0, 0), (0, 0))
    check_tensors(input, weight, bias)
    size = check_sizes(input, weight, bias, geometry, output_padding)
    reason = _unsuitable(input, weight, bias, deciding.cudnn_enabled)
    if reason is not None or input.numel() == 0:
        return _Prepared(None, reason, geometry, size, (0, 0))
    check_numbers(geometry)
    appended = appended_rows(output_padding, geometry.stride)
    with torch.no_grad():
        call = Call("dgrad", *enter(input, weight, appended), geometry, size, deciding, bias)
    return _Prepared(call, None, geometry, size, appended)


def _subclass_reason(*tensors: object) -> str | None:
    for tensor in tensors:
        if type(tensor) not in _fallback.PLAIN_TYPES and torch.overrides.is_tensor_like(tensor):
            if isinstance(tensor, torch.fx.Proxy):
                return "torch.fx is at work"
            return f"{type(tensor).__name__} is a subclass of Tensor with rules of its own"
    return None


def _unsuitable(
    input: Tensor, weight: Tensor, bias: Tensor | None, cudnn_enabled: bool
) -> str | None:
    """Why PyTorch runs what is right for conv_transpose2d, or None."""
    return unsuitable(input, weight, bias) or unusable(cudnn_enabled)


def unsuitable(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why such tensors are PyTorch's to run, whatever the state of the process, or None."""
    reason = unsuited(input)
    if reason is None and any(
        t.is_neg() or t._is_zerotensor() for t in (input, weight, bias) if t is not None
    ):
        return "a negative view, or zeros without memory, must be resolved first"
    return reason


def enter(input: Tensor, weight: Tensor, appended: Pair) -> tuple[Tensor, Tensor]:
    """The input with a batch, and with the zero rows that stand for output padding."""
    x = input if input.dim() == 4 else input.unsqueeze(0)
    if appended == (0, 0):
        return x, weight
    # Where PyTorch leaves cuDNN, its output is contiguous whatever the layouts.
    return F.pad(x.contiguous(), (0, appended[1], 0, appended[0])), weight.contiguous()


def autocast(tensor: Tensor) -> Tensor:
    """As PyTorch's autocast casts the arguments of conv_transpose2d."""
    if (
        isinstance(tensor, Tensor)
        and tensor.is_cuda
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
    ):
        return tensor.to(torch.get_autocast_dtype("cuda"))
    return tensor


def _pytorch(flags: config.Flags | None, reason: str, *arguments: Any) -> Tensor:
    """PyTorch's own operator, logged once for each reason, or the error that forbids it."""
    _fallback.announce(flags, reason)
    return _operator.conv_transpose2d(*arguments)
