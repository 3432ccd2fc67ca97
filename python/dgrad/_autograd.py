"""The three directions as differentiable functions.

Note [Closed under differentiation]
With t(x, w, y) = <conv(x, w), y>, each direction is the gradient of t for the one of x, w and y
that it makes, taken at the other two. t is linear in each, so the gradient of a direction for one
of its inputs is again a direction: the one that makes this input, with the incoming gradient in
the place of the result. One rule therefore gives the gradients of all orders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import _fallback, _loader, config
from ._call import Call, call_for
from ._channel_sums import channel_sums, in_two_steps
from ._geometry import Geometry, Pair, is_channels_last
from ._operands import INPUTS, OUTPUT, check_operands, memory_format, unsuited, unusable
from ._watch import Watchers, is_traced, observers, profiling, seen_by, watchers
from .config import Flags
from .planner import plan_cache

if TYPE_CHECKING:
    from ._core import ReadyCall, ReadyGradients

_MAKES = {slot: direction for direction, slot in OUTPUT.items()}


def _gradients(direction: str) -> list[tuple[str, int, int]]:
    """For each input of a direction the one that makes its gradient, and what this one takes, by
    place among both inputs and the incoming gradient."""
    slots = (*INPUTS[direction], OUTPUT[direction])
    return [
        (_MAKES[slot], *(slots.index(taken) for taken in INPUTS[_MAKES[slot]]))  # type: ignore[misc]
        for slot in slots[:2]
    ]


GRADIENTS = {direction: _gradients(direction) for direction in OUTPUT}


class Recipe(NamedTuple):
    """All of a direction's call but its tensors, and what of these the gradients need."""

    direction: str
    geometry: Geometry
    size: Pair
    flags: Flags | None
    call: Call | None
    sizes: tuple[Pair, Pair]  # spatial, of the inputs
    memory_format: torch.memory_format
    a_is_channels_last: bool


def recipe(
    direction: str,
    a: Tensor,
    b: Tensor,
    geometry: Geometry,
    size: Pair,
    flags: Flags | None,
    call: Call | None,
) -> Recipe:
    """The recipe of :func:`convolution` with the same arguments."""
    return Recipe(
        direction,
        geometry,
        size,
        flags,
        call,
        (_spatial(a), _spatial(b)),
        memory_format(a, b),
        is_channels_last(a.shape, a.stride()),
    )


def ready_recipe(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    geometry: Geometry,
    size: Pair,
    flags: Flags | None,
    call: Call,
    held: object,
) -> tuple[tuple[Recipe, object], ReadyGradients]:
    """What a ready call of the direction dgrad keeps for Python, with what must live as long, and
    how native code takes its gradients where :func:`entered` leaves the tensors as they are."""
    made = recipe("dgrad", a, b, geometry, size, flags, call)
    grad = torch.empty(out.shape, device="meta", memory_format=_grad_format(made))
    gradients: ReadyGradients = _loader.require().ReadyGradients(
        of=[
            (first, second, (direction, made.sizes[index], *geometry))
            for index, (direction, first, second) in enumerate(GRADIENTS["dgrad"])
        ],
        flags=flags,
        a_strides=a.stride(),
        grad_strides=grad.stride(),
        sum_bias=in_two_steps(grad.shape, grad.stride()),
    )
    return (made, held), gradients


def _grad_format(made: Recipe) -> torch.memory_format:
    """The layout that PyTorch brings an incoming gradient of dgrad into, as the input has it."""
    return torch.channels_last if made.a_is_channels_last else torch.contiguous_format


def _spatial(tensor: Tensor) -> Pair:
    return tensor.shape[2], tensor.shape[3]


def convolution(
    direction: str,
    a: Tensor,
    b: Tensor,
    geometry: Geometry,
    size: Pair,
    flags: Flags | None = None,
    call: Call | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The result of ``direction``, with spatial size ``size``, differentiable.

    Args:
        direction: "dgrad" of (y, w), "fprop" of (x, w) or "wgrad" of (x, y).
        a, b: the two 4-d inputs, of one dtype and device.
        flags: flags over the process's, also for the gradients.
        call: the call made ready for these tensors, if the caller has it.
        bias: of shape (channels of x,), added to the result of dgrad. Default None.

    Raises:
        NotSupportedError: no candidate can run it, or only PyTorch could and may not.
    """
    if _is_batched(a) or _is_batched(b):  # such tensors have no memory of their own
        _fallback.announce(flags, "gradients of many vectors are taken at once")
        return _fallback.run(direction, a, b, geometry, size, bias)
    if forward_ad._current_level >= 0 and _fallback.have_tangents(a, b, bias):
        _fallback.announce(flags, _fallback.FORWARD_MODE)
        return _fallback.run(direction, a, b, geometry, size, bias)
    # Inference mode forbids to record, whatever enable_grad() in it says.
    recording = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if recording and (
        a.requires_grad or b.requires_grad or (bias is not None and bias.requires_grad)
    ):
        made = recipe(direction, a, b, geometry, size, flags, call)
        result: Tensor = _Convolution.apply(a, b, bias, made)  # type: ignore[no-untyped-call]
        return result
    if call is None:
        check_operands(direction, a, b, bias, geometry.groups)
        reason = unsuited(a) or unusable(torch._C._get_cudnn_enabled())
        if reason is None and _is_foreign(a, b):
            reason = "a dispatch mode or a subclass of Tensor is at work"
        if reason is not None:
            _fallback.announce(flags, reason)
            return _fallback.run(direction, a, b, geometry, size, bias)
        call = call_for(direction, a, b, geometry, size, flags, bias)
    return call(a, b, bias)


def unrecorded(
    direction: str,
    a: Tensor,
    b: Tensor,
    geometry: Geometry,
    size: Pair,
    flags: Flags | None,
    bias: Tensor | None = None,
) -> Tensor:
    """:func:`convolution` where autograd records nothing, by native code where it is known.

    Raises:
        RuntimeError: as :func:`dgrad._operands.check_operands`, besides.
    """
    held = config.current()
    state = (direction, size, *geometry, *config.switches(flags))
    watched = watchers or profiling()
    if plan_cache.ready is not None and not watched:
        result = plan_cache.ready.run(a, b, bias, state)
        if result is not None:
            return result
    if watched or plan_cache.exchange is None:
        return convolution(direction, a, b, geometry, size, flags, None, bias)
    if (unsuited(a) or unusable(torch._C._get_cudnn_enabled())) is not None:
        return convolution(direction, a, b, geometry, size, flags, None, bias)
    check_operands(direction, a, b, bias, geometry.groups)
    cleared, deciding = plan_cache.cleared, config.deciding(direction, flags)
    call = call_for(direction, a, b, geometry, size, flags, bias, deciding)
    result = convolution(direction, a, b, geometry, size, flags, call, bias)
    if (  # unless another thread turned a switch meanwhile, or turned one there and back
        cleared == plan_cache.cleared
        and config.current() is held
        and state == (direction, size, *geometry, *config.switches(flags))
        and deciding == config.deciding(direction, flags)
    ):
        ready = call.ready(lambda: ((held, flags), None))
        if ready is not None:
            plan_cache.keep_ready(a, b, bias, state, ready)
    return result


def entered(made: Recipe, a: Any, b: Any, grad: Tensor) -> tuple[Any, Any, Tensor]:
    """The saved inputs and the incoming gradient, in the layouts that PyTorch's backward pass
    brings them into: the results' follow from these."""
    if made.direction == "dgrad":
        # PyTorch brings the incoming gradient into the input's layout, and before that the
        # input into the forward's if the weight's gradient needs it.
        nhwc = made.a_is_channels_last
        if a is not None:
            given, a = a, a.contiguous(memory_format=made.memory_format)
            if a is not given or nhwc != (made.memory_format is torch.channels_last):
                nhwc = is_channels_last(a.shape, a.stride())
        grad = grad.contiguous(
            memory_format=torch.channels_last if nhwc else torch.contiguous_format
        )
    return a, b, grad


def _is_batched(tensor: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_legacy_batchedtensor(tensor) or functorch.is_functorch_wrapped_tensor(
        tensor
    )


def _is_foreign(*tensors: Tensor | None) -> bool:
    """Whether a mode wants to see what is done to them, or a subclass has rules of its own."""
    return is_traced() or any(
        type(tensor) not in _fallback.PLAIN_TYPES for tensor in tensors if tensor is not None
    )


def _recipe(made: Recipe | ReadyCall) -> Recipe:
    if isinstance(made, Recipe):
        return made
    recipe: Recipe
    recipe, _ = made.recipe
    return recipe


class _Convolution(Function):
    @staticmethod
    def forward(
        ctx: Any, a: Tensor, b: Tensor, bias: Tensor | None, made: Recipe | ReadyCall
    ) -> Tensor:
        # Each call that records pays here, so what ctx.set_materialize_grads(False) and
        # ctx.save_for_backward() come to is written out; and ctx.needs_input_grad would say what
        # requires_grad does, for ten times its time.
        ctx.materialize_grads = False
        ctx.to_save = (a if b.requires_grad else None, b if a.requires_grad else None)
        ctx.made = made
        if not isinstance(made, Recipe) and plan_cache.ready is not None:
            result = plan_cache.ready.execute(made, a, b, bias)
            if result is not None:
                return result
        recipe = _recipe(made)
        if watchers:
            ctx.watched_by = observers()
        return convolution(
            recipe.direction, a, b, recipe.geometry, recipe.size, recipe.flags, recipe.call, bias
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        if grad is None:
            return (None,) * 4
        saved, ready = ctx.saved_tensors, plan_cache.ready
        if ready is not None and type(ctx.made) is not Recipe:
            known = ready.backward(ctx, ctx.made, saved, grad)
            if known is not None:
                return known
        by: Watchers = getattr(ctx, "watched_by", ())
        with seen_by(by):  # others may begin to watch meanwhile
            return _long_way(ctx, saved, grad)


def _long_way(
    ctx: Any, saved: tuple[Tensor | None, ...], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """What the backward pass of a recorded call gives, each gradient by a call of its own."""
    made = _recipe(ctx.made)
    a, b = saved
    needed, nodes = ctx.needs_input_grad, ctx.next_functions
    plain = torch.zeros_like(grad) if grad._is_zerotensor() else grad.resolve_neg()
    values = entered(made, a, b, plain)
    special = torch.is_grad_enabled() or forward_ad._current_level >= 0 or _is_batched(plain)
    special = special or _is_foreign(a, b, plain)
    run = convolution if special else unrecorded
    found: list[Tensor | None] = [None, None]
    for index, (direction, first, second) in enumerate(GRADIENTS[made.direction]):
        if needed[index] and _is_asked(nodes[index][0]):
            taken = values[first], values[second]
            found[index] = run(direction, *taken, made.geometry, made.sizes[index], made.flags)
    # Last, as in PyTorch: it is slow to fetch what the others bring into the cache.
    if not needed[2]:
        return *found, None, None
    return *found, grad.sum((0, 2, 3)) if special else channel_sums(grad), None


# record(a, b, bias, ready) is convolution() of a ready call, for tensors of which one
# requires a gradient. It is what Function.apply comes to outside torch.func: that one's own look at
# the arguments costs 4 us in PyTorch up to 2.13, and a ready call has seen that they are plain.
record: Callable[..., Tensor] = super(Function, _Convolution).apply


def _is_asked(node: Any) -> bool:
    """Whether the backward pass under way has a use for the gradient that goes to ``node``."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf whose gradient torch.autograd.grad was asked for
        return True
