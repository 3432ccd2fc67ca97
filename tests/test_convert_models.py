"""A model stays the same model when convert and restore turn its layers in place."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import dgrad
from same import assert_same


class Doubled(nn.ConvTranspose2d):
    """Somebody's own layer."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return 2 * super().forward(input, output_size)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3)
        self.ups = nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.ReLU(), Doubled(4, 4, 3))
        self.last = nn.ModuleDict({"out": nn.ConvTranspose2d(4, 3, 2, stride=2)})
        self.again = self.last["out"]

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = self.last["out"](self.ups(self.down(input)))
        return output


NAMES = ["ups.0", "last.out"]
EXAMPLE = torch.linspace(-1, 1, 2 * 3 * 8 * 8).reshape(2, 3, 8, 8)


def test_convert_turns_every_layer_in_place_and_names_it() -> None:
    model = Model()
    expected = model(EXAMPLE)
    before = dict(model.named_modules())
    parameters = dict(model.named_parameters())
    assert dgrad.convert(model) == NAMES
    assert {n for n, m in model.named_modules() if type(m) is dgrad.ConvTranspose2d} == set(NAMES)
    after = dict(model.named_modules())
    assert all(after[name] is module for name, module in before.items())
    assert all(value is parameters[name] for name, value in model.named_parameters())
    assert_same(model(EXAMPLE), expected)


def test_restore_undoes_convert() -> None:
    model = Model()
    before = repr(model)
    expected = model(EXAMPLE)
    dgrad.convert(model)
    assert dgrad.restore(model) == NAMES
    assert not [m for m in model.modules() if isinstance(m, dgrad.ConvTranspose2d)]
    assert type(model.ups[0]) is nn.ConvTranspose2d
    assert repr(model) == before
    assert_same(model(EXAMPLE), expected)


def test_a_second_time_changes_nothing() -> None:
    model = Model()
    dgrad.convert(model)
    assert dgrad.convert(model) == []
    dgrad.restore(model)
    assert dgrad.restore(model) == []


def test_subclasses_are_left_alone_unless_asked_for() -> None:
    model = Model()
    left = dgrad.convert(model).left
    assert left == {"ups.2": "Doubled is a subclass: subclasses=True turns it too"}
    assert type(model.ups[2]) is Doubled

    class Mine(dgrad.ConvTranspose2d):
        pass

    layers = nn.Sequential(Mine(1, 1, 1), nn.LazyConvTranspose2d(1, 1))
    assert dgrad.convert(layers, subclasses=True) == []
    assert dgrad.convert(layers, subclasses=True).left == {
        "0": "it is dgrad's already",
        "1": "its sizes are not known yet: run the model once before",
    }
    assert dgrad.restore(layers) == []
    assert dgrad.restore(layers).left == {
        "0": "Mine is a subclass of dgrad's, and convert did not make it",
        "1": "it is not dgrad's",
    }
    assert type(layers[0]) is Mine


def test_a_subclass_runs_its_own_forward_around_dgrads() -> None:
    model = Model()
    expected, shown = model(EXAMPLE), repr(model)
    assert dgrad.convert(model, subclasses=True) == ["ups.0", "ups.2", "last.out"]
    layer = model.ups[2]
    assert isinstance(layer, Doubled)
    assert isinstance(layer, dgrad.ConvTranspose2d)
    assert type(layer).__mro__.index(Doubled) < type(layer).__mro__.index(dgrad.ConvTranspose2d)
    assert_same(model(EXAMPLE), expected)
    assert repr(model) == shown
    assert dgrad.convert(model, subclasses=True) == []
    assert_same(copy.deepcopy(model)(EXAMPLE), expected)
    assert dgrad.restore(model) == ["ups.0", "ups.2", "last.out"]
    assert type(model.ups[2]) is Doubled
    assert_same(pickle.loads(pickle.dumps(model))(EXAMPLE), expected)


@pytest.mark.parametrize(
    "only", [r"^ups\.", lambda name, module: module.kernel_size == (3, 3)], ids=["name", "function"]
)
def test_a_filter_says_which(only: Any) -> None:
    model = Model()
    done = dgrad.convert(model, only=only, subclasses=True)
    assert done == ["ups.0", "ups.2"]
    assert done.left == {"last.out": "only leaves it out"}
    assert dgrad.convert(model) == ["last.out"]
    assert dgrad.restore(model, only="out") == ["last.out"]
    assert isinstance(model.ups[0], dgrad.ConvTranspose2d)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_what_torchscript_compiled_is_left_with_the_reason() -> None:
    scripted = torch.jit.trace(nn.Sequential(nn.ConvTranspose2d(3, 2, 3)), EXAMPLE)
    done = dgrad.convert(scripted)
    assert (done, done.left) == (
        [],
        {"0": "it is compiled by TorchScript: convert the model before"},
    )


def test_an_optimizer_goes_on_in_the_middle_of_training() -> None:
    torch.manual_seed(0)
    converted, plain = Model(), Model()
    plain.load_state_dict(converted.state_dict())
    models = converted, plain
    optimizers = [torch.optim.Adam(model.parameters(), lr=0.01) for model in models]
    for step in range(6):
        if step == 2:
            dgrad.convert(converted, subclasses=True)
        if step == 4:
            dgrad.restore(converted)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            model(EXAMPLE).square().mean().backward()
            optimizer.step()
    for mine, theirs in zip(converted.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_lazy_layer_is_converted_once_it_has_become_one() -> None:
    lazy = nn.Sequential(nn.LazyConvTranspose2d(2, 3))
    lazy(EXAMPLE)
    assert dgrad.convert(lazy) == ["0"]


def test_a_layer_that_is_used_twice_is_named_once_and_stays_one_layer() -> None:
    model = Model()
    assert model.again is model.last["out"]
    names = dgrad.convert(model)
    assert len(names) == 2
    assert model.again is model.last["out"]
    assert type(model.again) is dgrad.ConvTranspose2d


def test_the_model_itself_can_be_the_layer() -> None:
    layer = nn.ConvTranspose2d(3, 2, 3)
    assert dgrad.convert(layer) == [""]
    assert type(layer) is dgrad.ConvTranspose2d
    assert dgrad.restore(layer) == [""]
    assert type(layer) is nn.ConvTranspose2d


def test_shared_parameters_stay_shared() -> None:
    first, second = nn.ConvTranspose2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 3)
    second.weight = first.weight
    model = nn.Sequential(first, second)
    dgrad.convert(model)
    assert model[1].weight is model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(EXAMPLE).sum().backward()
    optimizer.step()
    assert torch.equal(model[0].weight, model[1].weight)


def test_hooks_mode_and_attributes_stay() -> None:
    layer = nn.ConvTranspose2d(3, 2, 3).eval()
    layer.note = "mine"  # type: ignore[assignment]
    calls: list[str] = []
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    dgrad.convert(layer)
    assert not layer.training
    assert layer.note == "mine"
    layer(EXAMPLE.clone().requires_grad_()).sum().backward()
    assert calls == ["before", "after", "backward"]


def test_a_converted_model_can_be_saved_and_loaded_by_a_plain_one() -> None:
    plain, converted = Model(), Model()
    dgrad.convert(converted)
    plain.load_state_dict(converted.state_dict())
    assert_same(plain(EXAMPLE), converted(EXAMPLE))
    copied = pickle.loads(pickle.dumps(converted))
    assert type(copied.ups[0]) is dgrad.ConvTranspose2d
    assert_same(copied(EXAMPLE), converted(EXAMPLE))


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
def test_parametrizations_stay_and_can_be_removed(norm: str) -> None:
    def normed() -> nn.Sequential:
        torch.manual_seed(0)
        model = nn.Sequential(nn.ConvTranspose2d(3, 2, 3))
        getattr(nn.utils.parametrizations, norm)(model[0])
        return model.eval()

    model = normed()
    copied = copy.deepcopy(model)
    expected, shown = model(EXAMPLE), repr(model)
    assert dgrad.convert(model) == ["0"]
    assert isinstance(model[0], dgrad.ConvTranspose2d)
    assert not isinstance(copied[0], dgrad.ConvTranspose2d), "PyTorch's copies share the class"
    assert repr(model) == shown
    assert_same(model(EXAMPLE), expected)
    assert_same(copied(EXAMPLE), expected)
    model.load_state_dict(copied.state_dict())
    assert dgrad.restore(model) == ["0"]
    assert_same(model(EXAMPLE), expected)
    dgrad.convert(model)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert type(model[0]) is dgrad.ConvTranspose2d
    torch.testing.assert_close(model(EXAMPLE), expected)


def test_a_parametrized_subclass_is_turned_when_asked_for() -> None:
    layer = Doubled(3, 2, 3)
    nn.utils.parametrizations.weight_norm(layer)
    expected = layer(EXAMPLE)
    assert dgrad.convert(layer) == []
    assert dgrad.convert(layer, subclasses=True) == [""]
    assert_same(layer(EXAMPLE), expected)
    assert dgrad.restore(layer) == [""]
    assert type(layer).__bases__ == (Doubled,)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_older_norms_work_too() -> None:
    for norm in (nn.utils.weight_norm, nn.utils.spectral_norm):
        layer = norm(nn.ConvTranspose2d(3, 2, 3)).eval()
        expected = layer(EXAMPLE)
        assert dgrad.convert(layer) == [""]
        torch.testing.assert_close(layer(EXAMPLE), expected)


def test_dgrads_own_layer_can_be_parametrized() -> None:
    layer = dgrad.ConvTranspose2d(3, 2, 3)
    expected = layer(EXAMPLE)
    nn.utils.parametrizations.weight_norm(layer)
    torch.testing.assert_close(layer(EXAMPLE), expected)


def test_a_class_that_cannot_be_derived_from_leaves_the_others_whole() -> None:
    class Tagged(nn.ConvTranspose2d):
        def __init_subclass__(cls, *, tag: str) -> None:
            super().__init_subclass__()

    model = nn.Sequential(nn.ConvTranspose2d(3, 3, 1), Tagged(3, 3, 1), nn.ConvTranspose2d(3, 3, 1))
    done = dgrad.convert(model, subclasses=True)
    assert done == ["0", "2"]
    assert done.left["1"].startswith("no class can be derived from Tagged: TypeError(")


def test_a_filter_that_raises_changes_nothing() -> None:
    model = Model()

    def only(name: str, _: nn.Module) -> bool:
        if name == "last.out":
            raise KeyError(name)
        return True

    with pytest.raises(KeyError):
        dgrad.convert(model, only=only)
    assert not [m for m in model.modules() if isinstance(m, dgrad.ConvTranspose2d)]


def test_layers_of_one_subclass_stay_of_one_class() -> None:
    model = nn.Sequential(Doubled(3, 3, 1), Doubled(3, 3, 1))
    dgrad.convert(model, subclasses=True)
    assert type(model[0]) is type(model[1])


def test_a_subclass_with_flags_of_its_own_is_left() -> None:
    layer = Doubled(3, 3, 1)
    layer.flags = {"mine": 1}  # type: ignore[assignment]
    assert dgrad.convert(layer, subclasses=True) == []
    assert "flags of its own" in dgrad.convert(layer, subclasses=True).left[""]


def test_a_class_put_over_parametrizations_is_left() -> None:
    layer = nn.ConvTranspose2d(3, 3, 1)
    nn.utils.parametrizations.weight_norm(layer)
    layer.__class__ = type("Wrapped", (type(layer),), {})
    assert dgrad.convert(layer, subclasses=True).left == {
        "": "Wrapped was put over its parametrizations"
    }


def test_a_class_that_cannot_be_set_leaves_all_layers_as_they_were() -> None:
    class Refusing(nn.ConvTranspose2d):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "__class__":
                raise RuntimeError("no other class")
            super().__setattr__(name, value)

    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), Refusing(4, 4, 3))
    with pytest.raises(RuntimeError, match="no other class"):
        dgrad.convert(model, subclasses=True)
    assert [type(layer) for layer in model] == [nn.ConvTranspose2d, Refusing]


def test_layers_that_are_equal_are_still_two_and_odd_modules_stay() -> None:
    class Odd(nn.Module):
        def __getattr__(self, name: str) -> Any:
            raise ValueError(name)

    class Equal(nn.ConvTranspose2d):
        def __eq__(self, other: object) -> bool:
            return isinstance(other, Equal)

        def __hash__(self) -> int:
            return 1

    model = nn.Sequential(Equal(3, 4, 3), Equal(4, 4, 3), Odd())
    assert list(dgrad.convert(model, subclasses=True)) == ["0", "1"]
