"""Which layers convert and restore turn, and the reasons why others stay."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

import dgrad

EXAMPLE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def hooked(layer: nn.Module) -> Callable[..., Tensor]:
    """Wrap a layer's forward as tools do that move its weights around the call."""
    before: Callable[..., Tensor] = layer.forward
    layer.forward = lambda *args, **named: before(*args, **named)  # type: ignore[method-assign]
    return before


def test_a_forward_that_was_set_on_the_layer_is_left_with_the_reason() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 3, 1), nn.ConvTranspose2d(3, 2, 1))
    expected = model(EXAMPLE)
    hooked(model[0])
    done = dgrad.convert(model)
    assert done == ["1"]
    assert done.left["0"].startswith("its forward was set on the layer itself: convert before")
    assert type(model[0]) is nn.ConvTranspose2d
    del model[0].forward
    assert dgrad.convert(model) == ["0"]
    assert torch.equal(model(EXAMPLE), expected)


def test_a_forward_that_wraps_dgrads_goes_on_after_restore() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 3, 1), nn.ConvTranspose2d(3, 2, 1))
    expected = model(EXAMPLE)
    dgrad.convert(model)
    hooked(model[0])
    done = dgrad.restore(model)
    assert done == ["1"]
    assert done.left["0"].startswith("its forward was set on the layer itself: restore before")
    assert torch.equal(model(EXAMPLE), expected)
    del model[0].forward
    assert dgrad.restore(model) == ["0"]
    assert torch.equal(model(EXAMPLE), expected)
