"""Which layers convert and restore turn, and the reasons why others stay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import dgrad
from dgrad import modules

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


@pytest.mark.parametrize("error", [TypeError("no"), ValueError("no"), KeyError("no")], ids=repr)
def test_what_a_class_raises_is_a_reason_to_leave_its_layers(error: Exception) -> None:
    class Sealed(nn.ConvTranspose2d):
        def __init_subclass__(cls) -> None:
            raise error

    class Guarded(nn.ConvTranspose2d):
        @property
        def flags(self) -> None:
            raise error

    model = nn.Sequential(Sealed(3, 3, 1), Guarded(3, 3, 1), nn.ConvTranspose2d(3, 3, 1))
    done = dgrad.convert(model, subclasses=True)
    assert (done, done.left) == (
        ["2"],
        {
            "0": f"no class can be derived from Sealed: {error!r}",
            "1": f"its attribute flags cannot be read: {error!r}",
        },
    )


class Functional(nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return nn.functional.conv_transpose2d(input, self.weight, self.bias)


class Direct(nn.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return nn.ConvTranspose2d.forward(self, input, output_size)


class OverFunctional(Functional):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return super().forward(input, output_size)


class Decorated(nn.ConvTranspose2d):
    @torch.no_grad()
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return (lambda: super(Decorated, self).forward(input, output_size))()


class Quiet(nn.ConvTranspose2d):
    pass


def test_only_subclasses_that_come_to_dgrads_forward_are_turned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    classes = (Functional, Direct, OverFunctional, Decorated, Quiet)
    model = nn.ModuleList(cls(3, 2, 3) for cls in classes)
    expected = [layer(EXAMPLE) for layer in model]
    done = dgrad.convert(model, subclasses=True)
    ran: list[Tensor] = []
    real = modules.conv_transpose2d
    monkeypatch.setattr(
        modules, "conv_transpose2d", lambda x, *rest, **named: ran.append(x) or real(x, *rest)
    )
    for name, layer in model.named_children():
        ran.clear()
        assert torch.equal(layer(EXAMPLE), expected[int(name)])
        assert bool(ran) is (name in done)
    assert done == ["3", "4"]
    assert done.left == {
        str(i): f"{name}.forward is not seen to call super().forward, "
        "so it might never come to dgrad's"
        for i, name in enumerate(("Functional", "Direct", "Functional"))
    }


class Halved(nn.ConvTranspose2d):
    """Finds its weight and its output padding in ways of its own."""

    @property
    def weight(self) -> Tensor:
        if "weight" not in self._parameters:
            raise AttributeError("weight")
        return self._parameters["weight"] / 2

    def _output_padding(self, *_: Any) -> list[int]:  # type: ignore[override]
        return [1, 0]


class Found(nn.ConvTranspose2d):
    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        return value * 3 if name == "bias" else value


def test_a_layer_that_finds_its_weight_in_another_way_keeps_its_values() -> None:
    model = nn.Sequential(Halved(3, 3, 3, stride=2), Found(3, 3, 2), nn.ConvTranspose2d(3, 2, 3))
    for layer, name in ((model[0], "weight"), (model[1], "bias")):
        nn.init.normal_(layer._parameters[name])  # PyTorch has drawn those of a copy
    for name in ("weight", "bias"):
        model[2].__dict__[name] = 2 * model[2]._parameters[name].detach()
    expected = model(EXAMPLE)
    assert dgrad.convert(model, subclasses=True) == ["0", "1", "2"]
    assert torch.equal(model(EXAMPLE), expected)


def test_a_class_that_was_turned_is_freed_with_its_last_layer() -> None:
    def turned() -> weakref.ref[type]:
        class Mine(nn.ConvTranspose2d):
            pass

        model = nn.Sequential(Mine(3, 2, 1), Mine(2, 1, 1))
        assert dgrad.convert(model, subclasses=True) == ["0", "1"]
        assert type(model[0]) is type(model[1]) is not Mine
        dgrad.restore(model)
        assert type(model[0]) is Mine
        return weakref.ref(Mine)

    mine = turned()
    gc.collect()
    assert mine() is None


@pytest.mark.parametrize("only", ["^b$", lambda name, _: name == "b"], ids=["name", "predicate"])
def test_a_shared_layer_is_found_under_each_of_its_names(only: Any) -> None:
    model = nn.Module()
    model.a = model.b = nn.ConvTranspose2d(3, 2, 1)
    model.c = nn.ConvTranspose2d(3, 2, 1)
    done = dgrad.convert(model, only=only)
    assert (done, list(done.left)) == (["a"], ["c"])
    assert type(model.b) is dgrad.ConvTranspose2d
    assert dgrad.restore(model, only=only) == ["a"]


# --- wrong arguments ----------------------------------------------------------------------------

WRONG_MODELS: list[Any] = ["model", None, 1, [nn.ReLU()], {"up": nn.ReLU()}, EXAMPLE, nn.ReLU]
WRONG_FILTERS: list[tuple[Any, type[Exception], str]] = [
    (1, TypeError, "expected a regular expression as text"),
    (True, TypeError, "or a function of a layer's name and the layer"),
    (["0"], TypeError, "expected a regular expression as text"),
    (b"0", TypeError, "expected a regular expression as text"),
    (nn.ConvTranspose2d, TypeError, "or a function of a layer's name and the layer"),
    ("(", ValueError, "expected a regular expression, such as"),
    ("(" * 300, ValueError, "expected a regular expression, such as"),
    ("decoder", ValueError, "the model's transposed convolutions: ['0', '1.0']"),
    ("a" * 300, ValueError, "the model's transposed convolutions: ['0', '1.0']"),
]


@pytest.mark.parametrize("turn", [dgrad.convert, dgrad.restore])
@pytest.mark.parametrize("model", WRONG_MODELS, ids=str)
def test_what_is_no_model_is_told(turn: Callable[..., Any], model: Any) -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module") as caught:
        turn(model)
    assert str(caught.value).startswith(f"model is {model!r}"[:200])


@pytest.mark.parametrize("turn", [dgrad.convert, dgrad.restore])
@pytest.mark.parametrize(("only", "error", "words"), WRONG_FILTERS, ids=lambda each: str(each)[:20])
def test_a_filter_that_can_name_no_layer_is_told_and_turns_nothing(
    turn: Callable[..., Any], only: Any, error: type[Exception], words: str
) -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 3, 1), nn.Sequential(nn.ConvTranspose2d(3, 3, 1)))
    if turn is dgrad.restore:
        dgrad.convert(model)
    before = [type(module) for module in model.modules()]
    with pytest.raises(error) as caught:
        turn(model, only=only)
    assert str(caught.value).startswith(f"only is {only!r}"[:200])
    assert words in str(caught.value)
    assert [type(module) for module in model.modules()] == before


def test_any_filter_suits_a_model_without_such_layers() -> None:
    assert dgrad.convert(nn.Sequential(nn.ReLU()), only="decoder") == []
