"""Backward passes of what has changed since the forward pass, and under modes that began since."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

import dgrad
from dgrad import _autograd, _call, functional
from dgrad._operands import check_operands
from test_autograd_function import CallByPyTorch

ON_GPU = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=["cpu", ON_GPU])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """CPU tensors take the way of CUDA tensors, with PyTorch's operators in place of cuDNN."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cpu":
            patch.setattr(functional, "_unsuitable", lambda *_: None)
            for module in (functional, _call):
                patch.setattr(module, "Call", CallByPyTorch)
            for name in ("unsuited", "unusable"):
                patch.setattr(_autograd, name, lambda _: None)
        dgrad.plan_cache.clear()
        yield request.param
    dgrad.plan_cache.clear()


def recorded(function: Callable[..., Tensor], device: str, known: bool) -> tuple[Tensor, ...]:
    """An output, and what it was made of."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 5, device=device, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, device=device, requires_grad=True)
    for _ in range(3 if known else 0):
        torch.autograd.grad(function(x, w, None, 2).sum(), (x, w))
    return function(x, w, None, 2), x, w


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("change", ["half", "double", "cpu"])
def test_a_layer_that_was_changed_is_refused_as_by_pytorch(
    device: str, change: str, known: bool
) -> None:
    if change == device:
        pytest.skip("it is there")
    for kind in (nn.ConvTranspose2d, dgrad.ConvTranspose2d):
        if kind is nn.ConvTranspose2d and device != "cpu":
            continue  # what PyTorch's kernels would read there is not ours to try
        layer = kind(4, 3, 3, 2, device=device)
        x = torch.randn(2, 4, 5, 5, device=device, requires_grad=True)
        for _ in range(3 if known else 0):
            layer(x).sum().backward()
        y = layer(x)
        getattr(layer, change)()
        words = "expected torch.float32 on " if kind is dgrad.ConvTranspose2d else None
        with pytest.raises(RuntimeError, match=words):
            y.sum().backward()
    torch.testing.assert_close(  # and the next call is right
        dgrad.conv_transpose2d(x, torch.ones(4, 3, 3, 3, device=device)),
        F.conv_transpose2d(x, torch.ones(4, 3, 3, 3, device=device)),
        rtol=1e-2,
        atol=1e-2,
    )


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("to", [torch.float16, "meta"])
def test_hooks_that_change_what_is_saved_are_refused(
    device: str, to: torch.dtype | str, known: bool
) -> None:
    _, x, w = recorded(dgrad.conv_transpose2d, device, known)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.to(to), lambda t: t):
        y = dgrad.conv_transpose2d(x, w, None, 2)
    with pytest.raises(RuntimeError, match=r"w is torch.* on .*, expected torch\.float32 on "):
        y.sum().backward()


@pytest.mark.parametrize("known", [False, True])
def test_a_mode_that_began_since_sees_the_gradients(device: str, known: bool) -> None:
    counts = []
    for function in (F.conv_transpose2d, dgrad.conv_transpose2d):
        y, _, _ = recorded(function, device, known)
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("known", [False, True])
def test_a_traced_backward_pass_is_the_gradient(device: str, known: bool) -> None:
    y, x, w = recorded(dgrad.conv_transpose2d, device, known)

    def gradients(grad: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x, w), grad, retain_graph=True)

    grad = torch.randn_like(y)
    traced = make_fx(gradients)(grad)
    for found, wanted in zip(traced(2 * grad), gradients(2 * grad), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)


def test_an_incoming_gradient_without_memory_is_zero(device: str) -> None:
    for known in (False, True):
        y, x, w = recorded(dgrad.conv_transpose2d, device, known)
        zero = torch._efficientzerotensor(y.shape, device=device)
        for gradient in torch.autograd.grad(y, (x, w), zero):
            assert not gradient.any()


def operands(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "direction": "dgrad",
        "a": torch.ones(2, 4, 5, 5),
        "b": torch.ones(4, 3, 3, 3),
        "bias": torch.ones(6),
        "groups": 2,
    }
    return given | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        ({"bias": None}, None),
        ({"direction": "wgrad", "bias": None}, None),
        ({"a": torch.ones(4, 5, 5)}, r"y has shape \(4, 5, 5\), expected 4 dimensions"),
        ({"b": torch.ones(4, 3)}, r"w has shape \(4, 3\), expected 4 dimensions"),
        ({"b": torch.ones(4, 3, 3, 3).half()}, "w is torch.float16 on cpu, expected torch.float32"),
        (
            {"b": torch.ones(4, 3, 3, 3, device="meta")},
            "w is torch.float32 on meta, expected .*cpu",
        ),
        ({"bias": torch.ones(1)}, r"bias has shape \(1,\), expected \(6,\)"),
        ({"bias": torch.ones(6, 1)}, r"bias has shape \(6, 1\), expected \(6,\)"),
        ({"bias": torch.ones(6).double()}, "bias is torch.float64 on cpu, expected torch.float32"),
    ],
)
def test_operands_that_do_not_fit_are_named(changes: dict[str, Any], words: str | None) -> None:
    raises = nullcontext() if words is None else pytest.raises(RuntimeError, match=words)
    with raises:
        check_operands(**operands(**changes))
