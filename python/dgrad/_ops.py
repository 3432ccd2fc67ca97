"""Operators of torch.library, which torch.compile keeps whole in its graphs.

``dgrad::dgrad``, ``dgrad::fprop`` and ``dgrad::wgrad`` are the three directions, each with a rule
for sizes and strides and with its gradients. ``dgrad::conv_transpose2d`` is the function of that
name, made of them. Eager calls take none of these: a dispatched operator costs more than the call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from . import _fallback, _operator, config
from ._arguments import check_sizes, check_tensors
from ._autograd import GRADIENTS, entered, recipe, unrecorded
from ._flops import tell_counters
from ._geometry import Geometry, Pair, appended_rows, is_known, pair
from ._operands import INPUTS, OUTPUT, check_numbers, memory_format, output_shape
from .functional import autocast, enter, unsuitable


class _Library(torch.library.Library):
    """A library that looks at what comes to the rules of register_autograd."""

    def impl(self, op_name: Any, fn: Any, dispatch_key: str = "", **options: Any) -> Any:
        if dispatch_key == "Autograd":
            fn = partial(_looked_at, fn)
        return super().impl(op_name, fn, dispatch_key, **options)  # type: ignore[no-untyped-call]


def _looked_at(kernel: Any, keyset: Any, *arguments: Any) -> Any:
    if torch._C._len_torch_dispatch_stack() > 0:  # modes come after autograd
        tell_counters()
    if _fallback.have_tangents(*arguments):  # which would be dropped without a word
        raise NotImplementedError(
            "dgrad's operators have no rule for forward-mode AD: dgrad.conv_transpose2d and "
            "torch.ops.dgrad.conv_transpose2d run PyTorch's there"
        )
    return kernel(keyset, *arguments)


_library: Any = _Library("dgrad", "DEF")  # type: ignore[no-untyped-call]

# The compiler must give the operators tensors of the strides that it traced with.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)


def _geometry(
    padding: Sequence[int], stride: Sequence[int], dilation: Sequence[int], groups: int
) -> Geometry:
    return Geometry(
        _pair(padding, "padding"), _pair(stride, "stride"), _pair(dilation, "dilation"), groups
    )


def _pair(values: Sequence[int], name: str) -> Pair:
    # What the compiler leaves open would be fixed by being read as an int.
    if len(values) == 2 and any(isinstance(value, torch.SymInt) for value in values):
        return values[0], values[1]
    return pair(tuple(values), name)


def _refuse_bias(direction: str, bias: Tensor | None) -> None:
    if bias is not None and direction != "dgrad":
        raise RuntimeError(f"bias is given, expected None: {direction} adds none")


def _run(
    direction: str,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    flags: str = "",
) -> Tensor:
    _refuse_bias(direction, bias)
    geometry, layer = _geometry(padding, stride, dilation, groups), config.from_text(flags)
    result = unrecorded(direction, a, b, geometry, (size[0], size[1]), layer, bias)
    if result.shape[2:] != tuple(size):
        raise RuntimeError(
            f"size is {tuple(size)}, expected {tuple(result.shape[2:])}, the size of {direction}'s "
            "result"
        )
    # Where PyTorch's operator ran, it may have chosen other strides.
    shape, format = result.shape, memory_format(a, b)
    if result.stride() == _strides(shape, format):
        return result
    return torch.empty_like(result, memory_format=format).copy_(result)


@lru_cache(maxsize=1024)
def _strides(shape: torch.Size, format: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=format).stride()


def _fake(
    direction: str,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    size: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    flags: str = "",
) -> Tensor:
    _refuse_bias(direction, bias)
    shape = output_shape(direction, a.shape, b.shape, groups, (size[0], size[1]))
    return torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=memory_format(a, b))


def _save(direction: str, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, _, size, padding, stride, dilation, groups, flags = inputs
    needed = ctx.needs_input_grad
    ctx.save_for_backward(a if needed[1] else None, b if needed[0] else None)
    geometry = _geometry(padding, stride, dilation, groups)
    ctx.made = recipe(direction, a, b, geometry, (size[0], size[1]), None, None)
    ctx.flags = flags


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    made, needed = ctx.made, ctx.needs_input_grad
    a, b = ctx.saved_tensors
    values = entered(made, a, b, grad)
    found = [
        getattr(torch.ops.dgrad, direction)(
            values[first], values[second], None, made.sizes[index], *made.geometry, ctx.flags
        )
        if needed[index]
        else None
        for index, (direction, first, second) in enumerate(GRADIENTS[made.direction])
    ]
    return *found, grad.sum((0, 2, 3)) if needed[2] else None, *(None,) * 6


def _conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    output_padding: Sequence[int] = (0, 0),
    groups: int = 1,
    dilation: Sequence[int] = (1, 1),
    flags: str = "",
) -> Tensor:
    """:func:`dgrad.conv_transpose2d` of tensors that may stand for others, as while compiling."""
    if torch.is_autocast_enabled("cuda"):
        input, weight = autocast(input), autocast(weight)
        bias = None if bias is None else autocast(bias)
    geometry = _geometry(padding, stride, dilation, groups)
    output_padding = _pair(output_padding, "output_padding")
    check_tensors(input, weight, bias)
    size = check_sizes(input, weight, bias, geometry, output_padding)
    reason = _fallback.transformed() or unsuitable(input, weight, bias)
    if reason is not None:
        again = (input, weight, bias, geometry, output_padding)
        _fallback.announce(config.from_text(flags), reason, again)
    if reason is not None or is_known(input.numel() == 0):
        return _operator.conv_transpose2d(
            input, weight, bias, stride, padding, output_padding, groups, dilation
        )
    check_numbers(geometry)
    tell_counters()  # in inference mode nothing comes to autograd
    x, weight = enter(input, weight, appended_rows(output_padding, geometry.stride))
    output: Tensor = torch.ops.dgrad.dgrad(x, weight, bias, size, *geometry, flags)
    return output if input.dim() == 4 else output.squeeze(0)


def _define(direction: str) -> None:
    first, second = INPUTS[direction]
    _library.define(
        f"{direction}(Tensor {first}, Tensor {second}, Tensor? bias, SymInt[2] size, "
        "SymInt[2] padding, SymInt[2] stride, SymInt[2] dilation, SymInt groups, str flags='') "
        "-> Tensor",
        tags=_TAGS,
    )
    _library.impl(direction, partial(_run, direction), "CompositeExplicitAutograd")
    name = f"dgrad::{direction}"
    torch.library.register_fake(name, partial(_fake, direction), lib=_library)
    torch.library.register_autograd(
        name, _backward, setup_context=partial(_save, direction), lib=_library
    )


for _direction in OUTPUT:
    _define(_direction)
_library.define(
    "conv_transpose2d(Tensor input, Tensor weight, Tensor? bias=None, SymInt[2] stride=1, "
    "SymInt[2] padding=0, SymInt[2] output_padding=0, SymInt groups=1, SymInt[2] dilation=1, "
    "str flags='') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("conv_transpose2d", _conv_transpose2d, "CompositeImplicitAutograd")
