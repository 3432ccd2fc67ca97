"""Gradients of all orders on the GPU, and no more of them than are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import dgrad
from dgrad import _autograd, log
from reference import Arguments, Case, arguments, expected, pytorch

pytestmark = pytest.mark.gpu

TINY = Case(n=2, c_in=2, c_out=2, size=(3, 2), kernel=(2, 2), precision="float64")
CHECKED = {
    "plain": TINY,
    "without bias": replace(TINY, bias=False),
    "without batch": replace(TINY, n=None),
    "stride": replace(TINY, stride=(2, 1)),
    "stride over the kernel": replace(TINY, stride=(3, 3), size=(2, 2)),
    "padding": replace(TINY, kernel=(3, 2), padding=(2, 1)),
    "output padding": replace(TINY, stride=(2, 3), output_padding=(1, 2), size=(2, 2)),
    "output padding as large as the stride": replace(
        TINY, size=(2, 2), dilation=(3, 2), output_padding=(2, 1)
    ),
    "dilation": replace(TINY, dilation=(2, 3)),
    "groups": replace(TINY, c_in=4, c_out=4, groups=2, size=(2, 2)),
    "depthwise": replace(TINY, c_in=3, c_out=3, groups=3, size=(2, 2)),
    "channels_last": replace(TINY, layout="channels_last", weight_layout="channels_last"),
    "slices": replace(TINY, layout="slice", weight_layout="transposed"),
}


def function_of(case: Case) -> Callable[..., Tensor]:
    def function(*tensors: Tensor) -> Tensor:
        return dgrad.conv_transpose2d(*tensors, **case.options)

    return function


# Atomics add in any order, so float64 repeats up to rounding.
NONDETERMINISM = 1e-10


@pytest.mark.parametrize("name", CHECKED)
def test_gradients_agree_with_finite_differences(name: str) -> None:
    case = CHECKED[name]
    with dgrad.flags(fallback="error"):
        assert gradcheck(function_of(case), arguments(case).leaves, nondet_tol=NONDETERMINISM)


@pytest.mark.parametrize("name", CHECKED)
def test_second_gradients_agree_with_finite_differences(name: str) -> None:
    case = CHECKED[name]
    with dgrad.flags(fallback="error"):
        assert gradgradcheck(function_of(case), arguments(case).leaves, nondet_tol=NONDETERMINISM)


# --- only what is needed ------------------------------------------------------------------------


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directions that backward passes run from now on."""
    ran: list[str] = []
    convolution = _autograd.convolution

    def spy(direction: str, *rest: Any) -> Tensor:
        ran.append(direction)
        return convolution(direction, *rest)

    monkeypatch.setattr(_autograd, "convolution", spy)
    return ran


@pytest.mark.parametrize(
    ("needs_input", "needs_weight", "directions"),
    [
        (True, True, ["fprop", "wgrad"]),
        (True, False, ["fprop"]),
        (False, True, ["wgrad"]),
        (False, False, []),
    ],
)
def test_only_needed_gradients_are_computed(
    needs_input: bool,
    needs_weight: bool,
    directions: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(c_in=8, c_out=8, stride=(2, 2))
    given = arguments(case)
    dgrad.plan_cache.clear()  # what is known runs in native code, unseen
    given.input.requires_grad_(needs_input)
    given.weight.requires_grad_(needs_weight)
    output = dgrad.conv_transpose2d(given.input, given.weight, given.bias, **case.options)
    ran = recorded(monkeypatch)
    output.backward(given.grad_output)
    assert ran == directions
    assert (given.input.grad is not None) is needs_input
    assert (given.weight.grad is not None) is needs_weight
    assert given.bias is not None
    assert given.bias.grad is not None


@pytest.mark.parametrize(("which", "direction"), [("input", "fprop"), ("weight", "wgrad")])
def test_only_asked_gradients_are_computed(
    which: str, direction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in PyTorch, where autograd.grad for the input leaves the weight's gradient out."""
    case = Case(c_in=8, c_out=8, stride=(2, 2))
    given = arguments(case)
    dgrad.plan_cache.clear()  # what is known runs in native code, unseen
    output = dgrad.conv_transpose2d(given.input, given.weight, given.bias, **case.options)
    ran = recorded(monkeypatch)
    torch.autograd.grad(output, [getattr(given, which)], given.grad_output)
    assert ran == [direction]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch's own layer too
def test_gradients_of_many_vectors_at_once_are_pytorchs() -> None:
    x = torch.randn(2, 3, 4, 4, device="cuda", dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 3, 3, device="cuda", dtype=torch.float64, requires_grad=True)
    vectors = torch.randn(5, 2, 2, 6, 6, device="cuda", dtype=torch.float64)
    found, wanted = (
        torch.autograd.grad(call(x, w), (x, w), vectors, is_grads_batched=True)
        for call in (dgrad.conv_transpose2d, torch.nn.functional.conv_transpose2d)
    )
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("reason", "named", "enabled"),
    [
        ("gradients of many vectors are taken at once", {"is_grads_batched": True}, True),
        ("torch.backends.cudnn.enabled is False", {}, False),
    ],
)
def test_gradients_by_pytorch_are_refused_or_logged(
    reason: str, named: dict[str, bool], enabled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    x = torch.randn(2, 3, 4, 4, device="cuda", dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 3, 3, device="cuda", dtype=torch.float64, requires_grad=True)
    with dgrad.flags(fallback="error"):
        output = dgrad.conv_transpose2d(x, w)
    plain = torch.nn.functional.conv_transpose2d(x, w)
    count = (5,) if named else ()
    vectors = torch.randn(*count, 2, 2, 6, 6, device="cuda", dtype=torch.float64)
    torch.backends.cudnn.enabled = enabled
    for leaf in (x, w):
        with (
            dgrad.flags(fallback="error"),
            pytest.raises(dgrad.NotSupportedError, match=f"{reason}, and fallback='error'"),
        ):
            torch.autograd.grad(output, leaf, vectors, retain_graph=True, **named)
    log._told.clear()
    caplog.set_level("INFO", "dgrad")
    found = torch.autograd.grad(output, (x, w), vectors, **named)
    assert caplog.messages == [f"PyTorch's own conv_transpose2d runs: {reason}"]
    for mine, theirs in zip(
        found, torch.autograd.grad(plain, (x, w), vectors, **named), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_no_grad_makes_no_graph() -> None:
    case = Case()
    given = arguments(case)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            output = dgrad.conv_transpose2d(given.input, given.weight, given.bias)
        assert not output.requires_grad
        assert output.grad_fn is None


def test_gradients_add_up_over_two_backward_passes() -> None:
    case = Case(c_in=8, c_out=8, precision="float64")
    given = arguments(case)
    wanted = expected(case, given)["grad_weight"].value
    for times in (1, 2):
        output = dgrad.conv_transpose2d(given.input, given.weight, given.bias)
        output.backward(given.grad_output)
        assert given.weight.grad is not None
        torch.testing.assert_close(given.weight.grad.cpu(), times * wanted, rtol=1e-11, atol=1e-11)


def test_a_changed_input_is_noticed_in_the_backward_pass() -> None:
    given = arguments(Case())
    output = dgrad.conv_transpose2d(given.input, given.weight)
    with torch.no_grad():
        given.input.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_the_leaves_gradients_have_the_leaves_strides() -> None:
    for weight_layout in ("nchw", "channels_last"):
        case = Case(c_in=8, c_out=8, layout="channels_last", weight_layout=weight_layout)
        given = arguments(case)
        dgrad.conv_transpose2d(given.input, given.weight, given.bias).sum().backward()
        for leaf in given.leaves:
            assert leaf.grad is not None
            assert leaf.grad.stride() == leaf.stride()


# --- double backward ----------------------------------------------------------------------------

ORDERS = {
    "4x4 s2": Case(n=2, c_in=8, c_out=4, size=(5, 6), kernel=(4, 4), stride=(2, 2), padding=(1, 1)),
    "3x5 s(2,3) g4": Case(
        n=2, c_in=8, c_out=16, size=(5, 4), kernel=(3, 5), stride=(2, 3), dilation=(2, 1), groups=4
    ),
    "without batch": Case(n=None, c_in=4, c_out=4, size=(4, 4), bias=False),
}


def second_gradients(
    function: Callable[..., Tensor], case: Case, given: Arguments
) -> tuple[Tensor, ...]:
    """The gradients of a gradient penalty."""
    output = function(given.input, given.weight, given.bias, **case.options)
    first = torch.autograd.grad(
        output, [given.input, given.weight], given.grad_output, create_graph=True
    )
    penalty = sum((grad.square().sum() for grad in first), start=output.square().sum())
    return torch.autograd.grad(penalty, given.leaves)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("precision", "limit"), [("float64", 1e-11), ("float32", 2e-5)])
@pytest.mark.parametrize("name", ORDERS)
def test_double_backward_agrees_with_pytorch(
    name: str, precision: str, limit: float, layout: str
) -> None:
    case = replace(ORDERS[name], precision=precision, layout=layout, weight_layout=layout)
    given = arguments(case)
    with dgrad.flags(allow_tf32=False, fallback="error"):
        ours = second_gradients(dgrad.conv_transpose2d, case, given)
    exact = Arguments(
        *(
            None if t is None else t.detach().double().requires_grad_()
            for t in (given.input, given.weight, given.bias)
        ),  # type: ignore[arg-type]
        grad_output=given.grad_output.double(),
    )
    theirs = second_gradients(pytorch, case, exact)
    for actual, wanted in zip(ours, theirs, strict=True):
        assert actual.dtype == case.dtype
        error = (actual.double() - wanted).norm() / wanted.norm()
        assert error <= limit
