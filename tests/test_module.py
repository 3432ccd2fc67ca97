"""dgrad.ConvTranspose2d is torch.nn.ConvTranspose2d in all but what runs it."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import dgrad

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {"kernel_size": 3},
    "pairs": {"kernel_size": (2, 5), "stride": (3, 2), "padding": (1, 2), "dilation": (1, 2)},
    "output padding": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "output padding over stride": {"kernel_size": 3, "dilation": 3, "output_padding": (2, 1)},
    "groups": {"kernel_size": 3, "groups": 2},
    "no bias": {"kernel_size": 3, "bias": False},
    "float64": {"kernel_size": 2, "dtype": torch.float64},
    "meta": {"kernel_size": 2, "device": "meta"},
}
every_setting = pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS.keys())


def both(**options: Any) -> tuple[dgrad.ConvTranspose2d, nn.ConvTranspose2d]:
    made = []
    for cls in (dgrad.ConvTranspose2d, nn.ConvTranspose2d):
        torch.manual_seed(0)
        made.append(cls(4, 6, **options))
    return made[0], made[1]


def inputs(layer: nn.Module) -> Tensor:
    weight = next(layer.parameters())
    return torch.randn(2, 4, 5, 6, dtype=weight.dtype, device=weight.device)


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.stride() == expected.stride()
    assert found.device == expected.device
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@every_setting
def test_the_same_seed_gives_the_same_layer(options: dict[str, Any]) -> None:
    ours, theirs = both(**options)
    assert [name for name, _ in ours.named_parameters()] == [
        name for name, _ in theirs.named_parameters()
    ]
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert type(found) is nn.Parameter
        assert found.requires_grad
        assert_same(found, expected)
    assert repr(ours) == repr(theirs)
    x = inputs(theirs)
    assert_same(ours(x), theirs(x))


def test_the_random_numbers_after_it_are_the_same() -> None:
    both(kernel_size=3)
    torch.manual_seed(0)
    dgrad.ConvTranspose2d(4, 6, 3)
    after = torch.rand(3)
    torch.manual_seed(0)
    nn.ConvTranspose2d(4, 6, 3)
    assert torch.equal(after, torch.rand(3))


def test_the_constructor_takes_the_same_arguments_in_the_same_order() -> None:
    parameters = inspect.signature(nn.ConvTranspose2d).parameters
    assert list(inspect.signature(dgrad.ConvTranspose2d).parameters) == list(parameters)
    positional = (4, 6, (2, 3), 3, 1, 2, 2, False, 2, "zeros", "cpu", torch.float64)
    assert repr(dgrad.ConvTranspose2d(*positional)) == repr(nn.ConvTranspose2d(*positional))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding_mode": "reflect"},
        {"kernel_size": 3, "groups": 3},
        {"kernel_size": 3, "groups": 0},
        {"kernel_size": "3"},
    ],
    ids=str,
)
def test_the_constructor_raises_the_same_errors(options: dict[str, Any]) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011  the oracle says which
        nn.ConvTranspose2d(4, 6, **options)
    with pytest.raises(expected.type) as found:
        dgrad.ConvTranspose2d(4, 6, **options)
    assert str(found.value) == str(expected.value)


@every_setting
def test_state_dicts_fit_in_both_directions(options: dict[str, Any]) -> None:
    if options.get("device") == "meta":
        pytest.skip("there are no values to load")
    ours, theirs = both(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = inputs(theirs)
    for source, target in ((ours, theirs), (theirs, ours)):
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.normal_()
        target.load_state_dict(source.state_dict())
        assert_same(target(x), source(x))


@pytest.mark.parametrize("output_size", [(11, 13), [12, 14], (2, 6, 11, 14), torch.Size((12, 13))])
def test_output_size_chooses_the_output_padding(output_size: Any) -> None:
    ours, theirs = both(kernel_size=3, stride=2)
    x = inputs(theirs)
    assert ours(x, output_size=output_size).shape[2:] == tuple(output_size[-2:])
    assert_same(ours(x, output_size), theirs(x, output_size))


def test_output_size_reckons_with_the_dilation() -> None:
    ours, theirs = both(kernel_size=3, stride=2, dilation=(2, 3))
    x = inputs(theirs)
    assert ours(x, (14, 18)).shape[2:] == (14, 18)
    assert_same(ours(x, (14, 18)), theirs(x, (14, 18)))
    with pytest.raises(ValueError, match="requested an output size"):
        ours(x, (11, 13))


@pytest.mark.parametrize(
    "output_size", [(10, 13), (11, 15), (11,), (11, 13, 1), (6, 11, 13), (-1, 13)], ids=str
)
def test_an_output_size_out_of_range_raises_the_same_error(output_size: Any) -> None:
    ours, theirs = both(kernel_size=3, stride=2)
    x = inputs(theirs)
    with pytest.raises(ValueError, match=r"output_size|requested an output size") as expected:
        theirs(x, output_size)
    with pytest.raises(ValueError, match=r"output_size|requested an output size") as found:
        ours(x, output_size)
    assert str(found.value) == str(expected.value)
    assert_same(ours(x), theirs(x))


@every_setting
def test_unbatched_inputs_and_empty_batches_work(options: dict[str, Any]) -> None:
    ours, theirs = both(**options)
    x = inputs(theirs)
    assert_same(ours(x[0]), theirs(x[0]))
    assert ours(x[0]).dim() == 3
    assert_same(ours(x[:0]), theirs(x[:0]))
    assert ours(x[:0]).shape == (0, *theirs(x).shape[1:])


def test_an_unbatched_input_takes_an_output_size() -> None:
    ours, theirs = both(kernel_size=3, stride=2)
    x = inputs(theirs)[0]
    assert_same(ours(x, (12, 14)), theirs(x, (12, 14)))


def moved_to_half(layer: nn.Module) -> nn.Module:
    return layer.half()


def moved_to_double(layer: nn.Module) -> nn.Module:
    return layer.double()


def moved_to_channels_last(layer: nn.Module) -> nn.Module:
    return layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def moved_to_meta(layer: nn.Module) -> nn.Module:
    return layer.to("meta")


def pickled(layer: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(layer))
    return copied


def frozen(layer: nn.Module) -> nn.Module:
    return layer.eval().requires_grad_(False)


MOVES = [
    moved_to_half, moved_to_double, moved_to_channels_last, moved_to_meta, pickled, frozen,
    copy.copy, copy.deepcopy,
]  # fmt: skip


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_a_layer_that_was_moved_or_copied_is_the_same_layer(move: Any) -> None:
    ours, theirs = both(kernel_size=3, stride=2)
    ours(inputs(ours))  # a layer that has run before holds nothing that stands in the way
    moved, expected = move(ours), move(theirs)
    assert type(moved) is dgrad.ConvTranspose2d
    assert repr(moved) == repr(expected)
    assert moved.training is expected.training
    x = inputs(expected)
    for tensor in (x, x.contiguous(memory_format=torch.channels_last)):
        assert_same(moved(tensor), expected(tensor))
    assert moved(x).requires_grad is expected(x).requires_grad


def test_a_deep_copy_has_parameters_of_its_own() -> None:
    ours, theirs = both(kernel_size=3)
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        copied.weight.zero_()
    x = inputs(theirs)
    assert_same(ours(x), theirs(x))


def test_gradients_arrive_at_the_same_parameters() -> None:
    ours, theirs = both(kernel_size=3, stride=2, output_padding=1)
    x = inputs(theirs)
    for layer in (ours, theirs):
        layer(x).square().sum().backward()
    for found, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        assert_same(found.grad, expected.grad)


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
