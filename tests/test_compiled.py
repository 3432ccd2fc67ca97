"""Compiled code beside PyTorch's: as many graphs, as many tangents, and what it says."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch.autograd import forward_ad
from torch.testing._internal.two_tensor import TwoTensor

import dgrad
from dgrad import _compiled, _ops
from operands import compiles

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


# --- how many graphs ----------------------------------------------------------------------------

SIZES = [
    (2, 3), (3, 2), (5, 5), (8, 4), (4, 8), (9, 70), (70, 9), (64, 64), (20, 6), (16, 16), (3, 13),
]  # fmt: skip


def decoder(cls: type[nn.Module], _: Any) -> Callable[..., Tensor]:
    return nn.Sequential(*(cls(i, o, 4, 2, 1) for i, o in pairwise([64, 32, 16, 8, 4])))


def unet(cls: type[nn.Module], _: Any) -> Callable[..., Tensor]:
    up = cls(3, 2, 3, stride=2, padding=1)
    return lambda x, skip: up(x, output_size=skip.shape[-2:])


def of_weights(_: Any, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, w, stride: function(x, w, None, stride, 1)


def of_lists(_: Any, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, w: function(x, w, None, [w.shape[2], w.shape[3]], (w.shape[2] // 2,))


# Code with either layer or function, and its arguments for a height and a width.
CODE: dict[str, tuple[Callable[..., Any], Callable[[int, int], tuple[Any, ...]]]] = {
    "decoder": (decoder, lambda h, w: (torch.randn(2, 64, h, w),)),
    "sizes of a skip": (
        unet,
        lambda h, w: (torch.randn(1, 3, h, w), torch.randn(1, 2, 2 * h - h % 2, 2 * w - w % 2)),
    ),
    "weights and strides": (
        of_weights,
        lambda h, w: (torch.randn(2, 3, h, w), torch.randn(3, 4, 2 + h % 3, 2 + w % 4), 2 + h % 5),
    ),
    "lists of sizes": (
        of_lists,
        lambda h, w: (torch.randn(2, 3, h, w), torch.randn(3, 4, 2 + h % 3, 2 + w % 4)),
    ),
}


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("code", CODE)
def test_as_many_graphs_as_pytorchs_do_for_many_sizes(
    code: str, patched: bool, request: pytest.FixtureRequest
) -> None:
    if patched:
        request.getfixturevalue("taken")
    make, arguments = CODE[code]
    graphs, outputs = [], []
    for cls, function in (
        (nn.ConvTranspose2d, F.conv_transpose2d),
        (dgrad.ConvTranspose2d, dgrad.conv_transpose2d),
    ):
        made = []

        def backend(graph: Any, inputs: Any, made: list[Any] = made) -> Any:
            made.append(graph)
            return aot_eager(graph, inputs)

        torch._dynamo.reset()
        torch.manual_seed(0)
        compiled = torch.compile(make(cls, function), dynamic=True, fullgraph=True, backend=backend)
        outputs.append([compiled(*arguments(*size)) for size in SIZES])
        graphs.append(len(made))
    assert graphs[1] <= graphs[0]
    for found, wanted in zip(outputs[1], outputs[0], strict=True):
        torch.testing.assert_close(found, wanted)


@compiles
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("patched", [False, True])
@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
def test_a_batch_whose_size_depends_on_data_is_compiled_whole(
    patched: bool, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    if patched:
        monkeypatch.setattr(_ops, "unsuitable", lambda *_: None)
    x = torch.randn(5, 3, 6, 7).contiguous(memory_format=layout)
    outputs = []
    for function in (F.conv_transpose2d, dgrad.conv_transpose2d):
        torch.manual_seed(0)
        w = torch.randn(3, 4, 3, 3, requires_grad=True)
        compiled = torch.compile(
            lambda x, w, mask, function=function: function(x[mask], w, None, 2, 1),
            fullgraph=True, dynamic=True, backend="aot_eager",
        )  # fmt: skip
        y = compiled(x, w, torch.tensor([1, 0, 1, 1, 0]).bool())
        y.sum().backward()
        none = compiled(x, w, torch.zeros(5).bool())
        outputs.append((y, y.stride(), w.grad, none.shape))
    for found, wanted in zip(*outputs, strict=True):
        torch.testing.assert_close(found, wanted)


# --- where PyTorch's operator runs --------------------------------------------------------------

RUNS = "PyTorch's own conv_transpose2d runs: "


def whole(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled as one graph."""
    compiled: Callable[..., Any] = torch.compile(function, fullgraph=True, backend="aot_eager")
    return compiled


@pytest.mark.parametrize("patched", [False, True])
def test_a_compiler_that_does_not_tell_exporting_is_a_reason_that_is_logged(
    patched: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if patched:
        monkeypatch.setattr(_compiled, "_is_exporting", lambda: None)
    elif torch.__version__ >= "2.7":
        pytest.skip("this PyTorch tells")
    layer = dgrad.ConvTranspose2d(3, 2, 3)
    compiled = whole(layer)
    with caplog.at_level(logging.INFO, logger="dgrad"):
        for size in (4, 5, 6):
            x = torch.randn(1, 3, size, size)
            torch.testing.assert_close(compiled(x), F.conv_transpose2d(x, layer.weight, layer.bias))
    assert caplog.messages == [RUNS + "PyTorch before 2.7 does not tell compiling from exporting"]


@compiles
@pytest.mark.usefixtures("taken")
def test_a_compiled_vmap_is_logged_in_a_whole_graph(caplog: pytest.LogCaptureFixture) -> None:
    x, w = torch.randn(3, 2, 4, 5, 5), torch.randn(4, 2, 3, 3)
    compiled = whole(lambda x: torch.func.vmap(lambda one: dgrad.conv_transpose2d(one, w))(x))
    with caplog.at_level(logging.INFO, logger="dgrad"):
        found = compiled(x)
    torch.testing.assert_close(found, torch.stack([F.conv_transpose2d(one, w) for one in x]))
    assert caplog.messages == [RUNS + "torch.func is at work (vmap)"]


@compiles
@pytest.mark.usefixtures("taken")
def test_a_compiled_subclass_is_logged_in_a_whole_graph(caplog: pytest.LogCaptureFixture) -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(4, 2, 3, 3)
    compiled = whole(lambda x: dgrad.conv_transpose2d(x, w))
    with caplog.at_level(logging.INFO, logger="dgrad"):
        found = compiled(TwoTensor(x, 2 * x))
    assert isinstance(found, TwoTensor)
    torch.testing.assert_close(found.b, 2 * F.conv_transpose2d(x, w))
    assert caplog.messages == [RUNS + "TwoTensor is a subclass of Tensor with rules of its own"]


@pytest.mark.usefixtures("taken")
def test_a_layer_compiled_without_tangents_gives_them_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = dgrad.ConvTranspose2d(3, 2, 3)
    x = torch.randn(1, 3, 4, 4)
    compiled = torch.compile(layer, backend="aot_eager")
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="dgrad"):
        expected = layer.bias.view(-1, 1, 1) + (linear := F.conv_transpose2d(x, layer.weight))
        for _ in range(2):
            torch.testing.assert_close(compiled(x), expected)
            with forward_ad.dual_level():
                found = forward_ad.unpack_dual(compiled(forward_ad.make_dual(x, 2 * x)))
                assert found.tangent is not None, "the tangent was dropped"
                torch.testing.assert_close(found.tangent, 2 * linear)
    if torch.__version__ >= "2.7":
        assert RUNS + "forward-mode AD is at work" in caplog.messages


@compiles
def test_whether_dgrad_can_run_is_asked_while_code_is_compiled() -> None:
    def double(x: Tensor) -> Tensor:
        return x * 2 if dgrad.is_available() or not dgrad.unavailable_reason() else x * 3

    x = torch.ones(2)
    torch.testing.assert_close(torch.compile(double, backend="eager", fullgraph=True)(x), double(x))
