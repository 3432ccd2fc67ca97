"""The differentiation rule of the three directions, in float64 on the CPU.

There each direction is run by PyTorch's own operators; what is tested is which of them dgrad
asks for, of what and with what geometry.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import dgrad
from dgrad import _autograd, _fallback
from dgrad._autograd import convolution
from dgrad._geometry import Geometry, Pair, output_size
from dgrad._operands import INPUTS, OUTPUT

pytestmark = pytest.mark.usefixtures("one_thread")

# kernel, geometry (padding, stride, dilation, groups), output_padding
GEOMETRIES: dict[str, tuple[Pair, Geometry, Pair]] = {
    "plain": ((2, 3), Geometry((0, 0), (1, 1), (1, 1), 1), (0, 0)),
    "stride": ((3, 2), Geometry((0, 0), (2, 3), (1, 1), 1), (0, 0)),
    "padding": ((3, 3), Geometry((1, 2), (1, 1), (1, 1), 1), (0, 0)),
    "dilation": ((2, 2), Geometry((0, 1), (1, 1), (3, 2), 1), (0, 0)),
    "groups": ((2, 2), Geometry((0, 0), (1, 1), (1, 1), 2), (0, 0)),
    "output padding": ((2, 2), Geometry((1, 0), (2, 3), (1, 1), 1), (1, 2)),
    "kernel smaller than stride": ((1, 1), Geometry((0, 0), (3, 2), (1, 1), 1), (2, 0)),
    "all": ((2, 3), Geometry((1, 2), (2, 3), (2, 1), 2), (0, 1)),
}
DIRECTIONS = ("dgrad", "fprop", "wgrad")
every_geometry = pytest.mark.parametrize("layer", GEOMETRIES.values(), ids=GEOMETRIES.keys())
every_direction = pytest.mark.parametrize("direction", DIRECTIONS)


def tensors_of(layer: tuple[Pair, Geometry, Pair]) -> dict[str, Tensor]:
    """x, w and y of a convolution that fit together, in float64."""
    kernel, geometry, extra = layer
    small = (2, 3)
    large = output_size(small, kernel, geometry, extra)
    groups = geometry.groups
    torch.manual_seed(0)
    return {
        "x": torch.randn(2, 1 * groups, *large, dtype=torch.float64),
        "w": torch.randn(2 * groups, 1, *kernel, dtype=torch.float64),
        "y": torch.randn(2, 2 * groups, *small, dtype=torch.float64),
    }


def inputs_of(
    direction: str, layer: tuple[Pair, Geometry, Pair]
) -> tuple[Tensor, Tensor, Geometry, Pair]:
    tensors = tensors_of(layer)
    a, b = (tensors[name].requires_grad_() for name in INPUTS[direction])
    height, width = tensors[OUTPUT[direction]].shape[2:]
    return a, b, layer[1], (height, width)


@every_geometry
def test_the_three_directions_are_gradients_of_one_trilinear_form(
    layer: tuple[Pair, Geometry, Pair],
) -> None:
    # Note [Closed under differentiation], with PyTorch's convolution and autograd as the oracle.
    tensors = tensors_of(layer)
    padding, stride, dilation, groups = geometry = layer[1]
    x, w, y = (tensors[name].requires_grad_() for name in "xwy")
    form = (F.conv2d(x, w, None, stride, padding, dilation, groups) * y).sum()
    gradients = dict(zip("xwy", torch.autograd.grad(form, (x, w, y)), strict=True))
    for direction in DIRECTIONS:
        expected = gradients[OUTPUT[direction]]
        a, b = (tensors[name] for name in INPUTS[direction])
        size = (expected.shape[2], expected.shape[3])
        found = convolution(direction, a, b, geometry, size)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@every_direction
@every_geometry
def test_the_gradients_of_each_direction_are_its_derivatives(
    direction: str, layer: tuple[Pair, Geometry, Pair]
) -> None:
    a, b, geometry, size = inputs_of(direction, layer)
    assert gradcheck(lambda a, b: convolution(direction, a, b, geometry, size), (a, b))


@every_direction
@every_geometry
def test_the_second_gradients_of_each_direction_are_its_derivatives(
    direction: str, layer: tuple[Pair, Geometry, Pair]
) -> None:
    a, b, geometry, size = inputs_of(direction, layer)
    assert gradgradcheck(
        lambda a, b: convolution(direction, a, b, geometry, size), (a, b), atol=1e-4
    )


def test_the_third_gradients_are_derivatives_too() -> None:
    a, b, geometry, size = inputs_of("dgrad", GEOMETRIES["all"])

    def gradient_of_square(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        total = convolution("dgrad", a, b, geometry, size).pow(2).sum()
        return torch.autograd.grad(total, (a, b), create_graph=True)

    assert gradgradcheck(gradient_of_square, (a, b), fast_mode=True)


@every_geometry
def test_the_gradients_with_a_bias_are_derivatives_of_both_orders(
    layer: tuple[Pair, Geometry, Pair],
) -> None:
    a, b, geometry, size = inputs_of("dgrad", layer)
    bias = torch.randn(b.shape[1] * geometry.groups, dtype=torch.float64, requires_grad=True)

    def run(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
        return convolution("dgrad", a, b, geometry, size, bias=bias)

    assert torch.equal(
        run(a, b, bias),
        convolution("dgrad", a, b, geometry, size) + bias.view(1, -1, 1, 1),
    )
    assert gradcheck(run, (a, b, bias))
    assert gradgradcheck(run, (a, b, bias), atol=1e-4)


# What runs forward, and backward for the first and for the second input.
GRADIENTS = {
    "dgrad": ("fprop", "wgrad"),  # of (y, w)
    "fprop": ("dgrad", "wgrad"),  # of (x, w)
    "wgrad": ("dgrad", "fprop"),  # of (x, y)
}


@every_direction
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed_are_computed(
    direction: str, needed: tuple[bool, bool], directions_run: list[str]
) -> None:
    a, b, geometry, size = inputs_of(direction, GEOMETRIES["all"])
    a.requires_grad_(needed[0])
    b.requires_grad_(needed[1])
    output = convolution(direction, a, b, geometry, size)
    assert output.requires_grad is any(needed)
    assert directions_run == [direction]
    if any(needed):
        output.sum().backward()
    expected = [name for name, need in zip(GRADIENTS[direction], needed, strict=True) if need]
    assert directions_run[1:] == expected
    assert (a.grad is not None, b.grad is not None) == needed


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_only_the_tensor_that_a_gradient_reads_is_saved(needed: tuple[bool, bool]) -> None:
    a, b, geometry, size = inputs_of("dgrad", GEOMETRIES["plain"])
    a.requires_grad_(needed[0])
    b.requires_grad_(needed[1])
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        convolution("dgrad", a, b, geometry, size)
    (only,) = saved
    assert only.data_ptr() == (b if needed[0] else a).data_ptr()


def test_the_gradient_of_a_bias_alone_runs_no_direction_and_saves_nothing(
    directions_run: list[str],
) -> None:
    a, b, geometry, size = inputs_of("dgrad", GEOMETRIES["all"])
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        output = convolution("dgrad", a.detach(), b.detach(), geometry, size, bias=bias)
    assert output.requires_grad
    grad = torch.randn_like(output)
    output.backward(grad)
    assert saved == []
    assert directions_run == ["dgrad"]
    assert bias.grad is not None
    torch.testing.assert_close(bias.grad, torch.einsum("nchw->c", grad), rtol=1e-12, atol=1e-12)


def test_a_bias_adds_one_node_to_the_graph_and_not_two() -> None:
    a, b, geometry, size = inputs_of("dgrad", GEOMETRIES["all"])
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True)
    output = convolution("dgrad", a, b, geometry, size, bias=bias)
    assert output.grad_fn is not None
    leaves = [node for node, _ in output.grad_fn.next_functions if node is not None]
    assert [leaf.variable is tensor for leaf, tensor in zip(leaves, (a, b, bias), strict=True)] == [
        True
    ] * 3


def test_no_graph_is_made_without_need(directions_run: list[str]) -> None:
    a, b, geometry, size = inputs_of("dgrad", GEOMETRIES["plain"])
    with torch.no_grad():
        assert convolution("dgrad", a, b, geometry, size).grad_fn is None
    with torch.inference_mode():
        assert convolution("dgrad", a, b, geometry, size).is_inference()
    assert directions_run == ["dgrad", "dgrad"]


class NoGradient(torch.autograd.Function):
    """Passes its input on and has no gradient to give back."""

    @staticmethod
    def forward(ctx: Any, input: Tensor) -> Tensor:
        return input.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> None:
        return None


@every_direction
def test_where_no_gradient_comes_in_nothing_runs(direction: str, directions_run: list[str]) -> None:
    a, b, geometry, size = inputs_of(direction, GEOMETRIES["plain"])
    output = NoGradient.apply(convolution(direction, a, b, geometry, size))
    output.sum().backward()
    assert (a.grad, b.grad) == (None, None)
    assert directions_run == [direction]


def test_a_graph_that_is_freed_says_so_and_a_retained_one_runs_again() -> None:
    a, b, geometry, size = inputs_of("dgrad", GEOMETRIES["plain"])
    total = convolution("dgrad", a, b, geometry, size).sum()
    (first,) = torch.autograd.grad(total, (a,), retain_graph=True)
    (second,) = torch.autograd.grad(total, (a,))
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(total, (a,))


def test_an_input_that_changed_in_place_is_noticed() -> None:
    a, b, geometry, size = inputs_of("dgrad", GEOMETRIES["plain"])
    output = convolution("dgrad", a, b, geometry, size)
    with torch.no_grad():
        b.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_gradients_that_are_expanded_or_negated_are_read_right() -> None:
    a, b, geometry, size = inputs_of("dgrad", GEOMETRIES["all"])
    padding, stride, dilation, groups = geometry
    expected = F.conv_transpose2d(
        a, b, None, stride, padding, GEOMETRIES["all"][2], groups, dilation
    )
    found = convolution("dgrad", a, b, geometry, size)
    one = torch.ones((), dtype=torch.float64)
    for grad in (
        one.expand(found.shape),
        one._neg_view().expand(found.shape),
        torch.randn_like(found).contiguous(memory_format=torch.channels_last),
        torch.randn(found.shape[::-1], dtype=torch.float64).permute(3, 2, 1, 0),
    ):
        for wanted, given_ in zip(
            torch.autograd.grad(expected, (a, b), grad, retain_graph=True),
            torch.autograd.grad(found, (a, b), grad, retain_graph=True),
            strict=True,
        ):
            torch.testing.assert_close(given_, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("asked", "expected"), [(0, "fprop"), (1, "wgrad")])
def test_only_what_autograd_grad_asks_for_is_computed(
    asked: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    run = _fallback.run

    def noted(direction: str, *rest: Any) -> Tensor:
        ran.append(direction)
        return run(direction, *rest)

    monkeypatch.setattr(_fallback, "run", noted)
    leaves = [
        torch.randn(size, dtype=torch.float64, requires_grad=True)
        for size in ((1, 2, 3, 3), (2, 2, 2, 2))
    ]
    geometry = Geometry((0, 0), (1, 1), (1, 1), 1)
    output = convolution("dgrad", *leaves, geometry, (4, 4))
    (found,) = torch.autograd.grad(output.sum(), [leaves[asked]])
    assert ran == ["dgrad", expected]
    wanted = torch.autograd.grad(F.conv_transpose2d(*leaves).sum(), [leaves[asked]])[0]
    assert torch.allclose(found, wanted)


@every_geometry
@pytest.mark.parametrize("with_bias", [False, True])
def test_on_the_cpu_the_gradients_are_pytorchs(
    layer: tuple[Pair, Geometry, Pair], with_bias: bool
) -> None:
    tensors = tensors_of(layer)
    padding, stride, dilation, groups = layer[1]
    y, w = (tensors[name].requires_grad_() for name in "yw")
    bias = torch.randn(w.shape[1] * groups, dtype=torch.float64, requires_grad=with_bias)
    wanted = (y, w, bias) if with_bias else (y, w)
    results = [
        function(y, w, bias, stride, padding, layer[2], groups, dilation)
        for function in (dgrad.conv_transpose2d, F.conv_transpose2d)
    ]
    found, expected = (torch.autograd.grad(r.pow(2).sum(), wanted) for r in results)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_each_direction_is_made_by_one_and_makes_one() -> None:
    assert set(_autograd._MAKES.values()) == set(DIRECTIONS)
    for direction, slot in OUTPUT.items():
        assert {*INPUTS[direction], slot} == {"x", "w", "y"}
