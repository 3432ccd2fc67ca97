"""On the way of CUDA tensors the function's results and gradients are PyTorch's, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import dgrad
from dgrad import _fallback, functional
from dgrad._geometry import Geometry, Pair, output_size

pytestmark = pytest.mark.usefixtures("one_thread")


class CallByPyTorch:
    """Stands for a call of cuDNN: the same directions, by PyTorch's operators."""

    def __init__(
        self,
        direction: str,
        a: Tensor,
        b: Tensor,
        geometry: Geometry,
        size: Pair,
        flags: dgrad.Flags | None = None,
        bias: Tensor | None = None,
    ) -> None:
        self.direction, self.geometry, self.size = direction, geometry, size
        self.has_bias = bias is not None

    def __call__(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        assert (bias is not None) is self.has_bias, "it was made ready for another problem"
        return _fallback.run(self.direction, a, b, self.geometry, self.size, bias)

    def ready(self, recipe: object) -> None:
        return None  # native code reads CUDA tensors alone


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    """CPU tensors take the way of CUDA tensors, with PyTorch's operators in place of cuDNN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "_unsuitable", lambda *_: None)
        patch.setattr(functional, "Call", CallByPyTorch)
        dgrad.plan_cache.clear()
        yield
    dgrad.plan_cache.clear()


def test_gradients_that_pytorch_runs_obey_no_autocast(as_on_a_gpu: None) -> None:
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    w = torch.randn(3, 4, 3, 3, requires_grad=True)
    results = []
    for function in (dgrad.conv_transpose2d, torch.nn.functional.conv_transpose2d):
        y = function(x, w)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(torch.autograd.grad(y.square().sum(), (x, w)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@st.composite
def layers(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]:
    def two(least: int, most: int) -> Pair:
        return draw(st.tuples(st.integers(least, most), st.integers(least, most)))

    stride, dilation, padding, size, kernel = two(1, 4), two(1, 4), two(0, 2), two(1, 4), two(1, 3)
    extra = two(0, 3)
    assume(all(extra[i] < max(stride[i], dilation[i]) for i in (0, 1)))
    groups = draw(st.integers(1, 2))
    assume(min(output_size(size, kernel, Geometry(padding, stride, dilation, 1), extra)) >= 1)
    batch = draw(st.sampled_from([(), (1,), (3,)]))
    return (
        (*batch, 2 * groups, *size),
        (2 * groups, draw(st.integers(1, 2)), *kernel),
        {
            "stride": stride, "padding": padding, "output_padding": extra,
            "groups": groups, "dilation": dilation,
        },
    )  # fmt: skip


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_way_of_cuda_tensors_gives_pytorchs_results_and_gradients(
    directions_run: list[str],
) -> None:
    # One test that runs many, as the fixtures hold for all of them.
    @settings(deadline=None, max_examples=100)
    @given(layer=layers(), with_bias=st.booleans())
    def check(
        layer: tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]], with_bias: bool
    ) -> None:
        input_shape, weight_shape, named = layer
        tensors = [
            torch.randn(shape, dtype=torch.float64, requires_grad=True)
            for shape in (input_shape, weight_shape, (weight_shape[1] * named["groups"],))
        ][: 3 if with_bias else 2]
        directions_run.clear()
        found = dgrad.conv_transpose2d(*tensors, **named)
        assert directions_run == ["dgrad"]
        expected = F.conv_transpose2d(*tensors, **named)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        grad = torch.randn_like(found)
        for given_, wanted in zip(
            torch.autograd.grad(found, tensors, grad),
            torch.autograd.grad(expected, tensors, grad),
            strict=True,
        ):
            torch.testing.assert_close(given_, wanted, rtol=1e-11, atol=1e-11)
        assert sorted(directions_run) == ["dgrad", "fprop", "wgrad"]

    check()


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_way_of_cuda_tensors_is_differentiable_twice() -> None:
    named = {"stride": (2, 1), "padding": 1, "output_padding": (1, 2), "dilation": (1, 3)}
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 2, 2, 3), (2, 1, 2, 2), (1,))
    ]

    def run(*tensors: Tensor) -> Tensor:
        return dgrad.conv_transpose2d(*tensors, **named)

    assert gradcheck(run, tensors)
    assert gradgradcheck(run, tensors)


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("only", [0, 1, 2])
def test_the_way_of_cuda_tensors_computes_the_needed_gradients_only(
    only: int, directions_run: list[str]
) -> None:
    tensors = [torch.randn(1, 2, 3, 3), torch.randn(2, 1, 2, 2), torch.randn(1)]
    tensors[only].requires_grad_()
    dgrad.conv_transpose2d(*tensors).sum().backward()
    assert directions_run == [["dgrad", "fprop"], ["dgrad", "wgrad"], ["dgrad"]][only]
    assert [tensor.grad is not None for tensor in tensors] == [i == only for i in range(3)]


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_way_of_cuda_tensors_leaves_its_arguments_as_they_are() -> None:
    x, w, bias = torch.randn(2, 3, 3), torch.randn(2, 1, 2, 2), torch.randn(1)
    before = [tensor.clone() for tensor in (x, w, bias)]
    dgrad.conv_transpose2d(x, w, bias, output_padding=1, dilation=2)
    for tensor, value in zip((x, w, bias), before, strict=True):
        assert torch.equal(tensor, value)
        assert tensor._version == 0
