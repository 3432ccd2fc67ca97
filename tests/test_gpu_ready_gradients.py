"""Gradients of known calls that native code runs alone: those of the long way."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dgrad
from gpu_layers import relative_error
from gpu_ready import NATIVE, tensors, used

pytestmark = NATIVE


@pytest.mark.parametrize("bias", [False, True])
def test_recorded_calls_have_the_same_gradients(bias: bool) -> None:
    given = [t.requires_grad_() for t in tensors()]
    x, w, b = given if bias else (*given[:2], None)  # type: ignore[misc]
    leaves = [t for t in (x, w, b) if t is not None]
    grad = torch.randn(2, 6, 19, 19, device="cuda")

    def step() -> list[Tensor]:
        y = dgrad.conv_transpose2d(x, w, b, 2)
        return [y, *torch.autograd.grad(y, leaves, grad, create_graph=True)]

    first = step()
    again: list[Tensor] = []
    assert used(lambda: again.extend(step())) == 1
    doubled = [t.detach().double().requires_grad_() for t in leaves]
    y = F.conv_transpose2d(*doubled, stride=2)
    wanted = [y, *torch.autograd.grad(y, doubled, grad.double())]
    for found in (first, again):
        for each, right in zip(found, wanted, strict=True):
            assert relative_error(each.detach(), right.detach()) < 5e-3
    # Through the gradients again.
    sum(g.square().sum() for g in again[1:3]).backward()  # type: ignore[union-attr]
    assert all(t.grad is not None for t in leaves[:2])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_run_in_native_code_too(
    dtype: torch.dtype, layout: torch.memory_format, bias: bool
) -> None:
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-2

    def run(check: Callable[[Callable[[], list[Tensor]]], list[Tensor]]) -> None:
        x, w, b = tensors(dtype=dtype)
        x, w = (t.to(memory_format=layout) for t in (x, w))
        leaves = [t.requires_grad_() for t in ((x, w, b) if bias else (x, w))]
        grad = torch.randn(2, 6, 17, 17, device="cuda", dtype=dtype).to(memory_format=layout)

        def gradients(function: Callable[..., Tensor], of: list[Tensor], at: Tensor) -> Any:
            y = function(of[0], of[1], of[2] if bias else None, 2, 1)
            return torch.autograd.grad(y, of, at)

        found = check(lambda: gradients(dgrad.conv_transpose2d, leaves, grad))
        exact = [t.detach().double().requires_grad_() for t in leaves]
        wanted = gradients(F.conv_transpose2d, exact, grad.double())
        as_pytorch = gradients(F.conv_transpose2d, leaves, grad)
        for each, right, theirs in zip(found, wanted, as_pytorch, strict=True):
            error = float((each.double() - right).norm() / right.norm())
            assert error < tolerance, error
            assert each.stride() == theirs.stride()

    def counted(step: Callable[[], list[Tensor]]) -> list[Tensor]:
        found: list[Tensor] = []
        assert used(lambda: found.extend(step())) == 3
        return found

    run(lambda step: step())
    run(counted)  # other values at other addresses
    run(counted)


def test_gradients_of_equal_sizes_and_another_geometry_are_told_apart() -> None:
    x, w, _ = (t.requires_grad_() for t in tensors((2, 8, 2, 2), (8, 6, 2, 2)))
    grad = torch.randn(2, 6, 5, 5, device="cuda")
    for _ in range(3):
        for output_padding, dilation in ((1, 1), (0, 2)):
            found = []
            for function, of in (
                (dgrad.conv_transpose2d, (x, w)),
                (F.conv_transpose2d, tuple(t.detach().double().requires_grad_() for t in (x, w))),
            ):
                y = function(*of, None, 2, 0, output_padding, 1, dilation)
                found.append(torch.autograd.grad(y, of, grad.to(y.dtype)))
            for each, right in zip(*found, strict=True):
                torch.testing.assert_close(each.double(), right, rtol=1e-2, atol=1e-2)


def test_flags_of_the_backward_pass_are_part_of_the_call() -> None:
    x, w, _ = (t.requires_grad_() for t in tensors((4, 64, 32, 32), (64, 64, 3, 3)))
    y = dgrad.conv_transpose2d(x, w)
    grad = torch.randn_like(y)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    wanted = torch.autograd.grad(F.conv_transpose2d(*exact), exact, grad.double())

    def errors() -> list[float]:
        for _ in range(3):
            found = torch.autograd.grad(y, (x, w), grad, retain_graph=True)
        return [float((f - r).norm() / r.norm()) for f, r in zip(found, wanted, strict=True)]

    with dgrad.flags(algorithm={"fprop": "graph", "wgrad": "graph"}, selection="heuristic"):
        errors()
    with dgrad.flags(allow_tf32=False):
        assert max(errors()) < 1e-5


def test_a_graph_is_freed_without_the_garbage_collector() -> None:
    x, w, b = (t.requires_grad_() for t in tensors())
    dgrad.conv_transpose2d(x, w, b)
    gc.disable()
    try:
        y = dgrad.conv_transpose2d(x, w, b)
        node = weakref.ref(y.grad_fn)
        del y
        assert node() is None
    finally:
        gc.enable()


def test_saved_tensors_are_unpacked_once() -> None:
    x, w, _ = (t.requires_grad_() for t in tensors())
    grad = torch.randn(2, 6, 19, 19, device="cuda")
    unpacked: list[Tensor] = []

    def unpack(tensor: Tensor) -> Tensor:
        unpacked.append(tensor)
        return tensor

    for number in range(1, 4):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = dgrad.conv_transpose2d(x, w, None, 2)
        torch.autograd.grad(y, (x, w), grad)
        assert len(unpacked) == 2 * number


def in_another_layout(grad: Tensor) -> Tensor:
    return grad.to(memory_format=torch.channels_last)


def negative_view(grad: Tensor) -> Tensor:
    return torch._neg_view(-grad)


INCOMING: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda grad: grad[:1, :1, :1, :1].expand(grad.shape),
    "in another layout": in_another_layout,
    "a negative view": negative_view,
    "at an odd address": lambda grad: torch.cat([grad.flatten()[:1], grad.flatten()])[1:].view(
        grad.shape
    ),
}


@pytest.mark.parametrize("kind", INCOMING)
def test_an_incoming_gradient_of_another_kind_is_not_taken_for_a_known_one(kind: str) -> None:
    x, w, _ = (t.requires_grad_() for t in tensors())
    plain = torch.randn(2, 6, 19, 19, device="cuda")
    odd = INCOMING[kind](plain)

    def gradients(function: Callable[..., Tensor], of: list[Tensor], at: Tensor) -> Any:
        y = function(of[0], of[1], None, 2)
        return torch.autograd.grad(y, of, at)

    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    for _ in range(3):  # the first calls make it known
        for at in (plain, odd):
            found = gradients(dgrad.conv_transpose2d, [x, w], at)
            wanted = gradients(F.conv_transpose2d, exact, at.double())
            theirs = gradients(F.conv_transpose2d, [x, w], at)
            assert max(map(relative_error, found, wanted)) < 5e-3
            assert [t.stride() for t in found] == [t.stride() for t in theirs]


def test_gradients_of_many_vectors_at_once_are_right_after_known_calls() -> None:
    x, w, _ = (t.requires_grad_() for t in tensors())
    grads = torch.randn(3, 2, 6, 19, 19, device="cuda")

    def each_of(function: Callable[..., Tensor], of: list[Tensor], at: Tensor) -> list[Any]:
        y = function(of[0], of[1], None, 2)
        return [torch.autograd.grad(y, of, one, retain_graph=True) for one in at]

    for _ in range(3):
        each_of(dgrad.conv_transpose2d, [x, w], grads)
    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    wanted = each_of(F.conv_transpose2d, exact, grads.double())
    with dgrad.flags(fallback="pytorch"):
        each_of(dgrad.conv_transpose2d, [x, w], grads)
        y = dgrad.conv_transpose2d(x, w, None, 2)
        found = torch.autograd.grad(y, (x, w), grads, is_grads_batched=True)
    for place, all_at_once in enumerate(found):
        for number, right in enumerate(wanted):
            torch.testing.assert_close(
                all_at_once[number].double(), right[place], rtol=1e-2, atol=1e-2
            )


@pytest.mark.parametrize("asked", [(0,), (1,), (0, 1)])
def test_only_the_gradients_that_are_asked_for_run(asked: tuple[int, ...]) -> None:
    x, w, b = (t.requires_grad_() for t in tensors())
    given = [x, w, b]
    grad = torch.randn(2, 6, 19, 19, device="cuda")

    def step() -> None:
        y = dgrad.conv_transpose2d(*(t * 1 for t in given), stride=2)  # none is a leaf
        torch.autograd.grad(y, [given[i] for i in asked], grad)

    step()
    assert used(step) == 1 + len(asked)


def test_the_gradient_of_the_bias_is_taken_last() -> None:
    """What its sum reads is in the cache then. A graph shows what native code has queued."""
    given = [t.requires_grad_() for t in tensors()]
    grad = torch.randn(2, 6, 19, 19, device="cuda")

    def step() -> None:
        torch.autograd.grad(dgrad.conv_transpose2d(*given, 2), given, grad)  # type: ignore[arg-type]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        dgrad.warm_up(step)
        assert used(step) > 0
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    graph.replay()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    on_device = (e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)
    kernels = [e.name for e in sorted(on_device, key=lambda e: e.time_range.start)]
    assert len(kernels) >= 4, kernels
    assert "at::native::reduce_kernel" in kernels[-1], kernels


def test_inference_mode_records_nothing_whatever_enable_grad_says() -> None:
    layer = dgrad.ConvTranspose2d(8, 6, 3, 2, device="cuda")
    plain = torch.randn(2, 8, 9, 9, device="cuda")
    with torch.inference_mode():
        inference = plain.clone()
    for _ in range(2):  # in Python, then in native code
        for x in (plain, inference):
            with torch.inference_mode(), torch.enable_grad():
                y, theirs = layer(x), F.conv_transpose2d(x, layer.weight, layer.bias, 2)
            assert (y.requires_grad, y.is_inference()) == (theirs.requires_grad, True)
            torch.testing.assert_close(y, theirs, rtol=1e-2, atol=1e-2)
        assert layer(plain).requires_grad  # known as one that records


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [37, 128])
def test_the_gradient_of_the_bias_is_summed_in_the_same_steps(
    size: int, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    x, w, b = tensors((2, 8, size, size), (8, 64, 2, 2), dtype=dtype)
    leaves = [t.requires_grad_() for t in (x.contiguous(memory_format=layout), w, b)]
    shape = (2, 64, 2 * size, 2 * size)
    grad = torch.randn(shape, device="cuda", dtype=dtype).contiguous(memory_format=layout)
    found: list[Tensor] = []

    def step() -> None:
        y = dgrad.conv_transpose2d(*leaves, 2)  # type: ignore[arg-type]
        found.append(torch.autograd.grad(y, leaves, grad)[2])

    step()
    for _ in range(2):
        assert used(step) > 0
    assert all(torch.equal(each, found[0]) for each in found)
    wanted = grad.double().sum((0, 2, 3))
    rounding = torch.finfo(dtype).eps * wanted.abs()
    one_sum = (grad.sum((0, 2, 3)).double() - wanted).abs()
    assert bool(((found[0].double() - wanted).abs() <= 2 * (rounding + one_sum) + 1e-3).all())
