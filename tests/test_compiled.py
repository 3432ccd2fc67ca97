"""Compiled code beside PyTorch's: as many graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager

import dgrad

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


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
