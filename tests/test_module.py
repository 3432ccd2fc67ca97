"""dgrad.ConvTranspose2d is torch.nn.ConvTranspose2d in all but what runs it."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import dgrad
from same import assert_same

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
        {"kernel_size": -1},
        {"kernel_size": 2**63},
        {"kernel_size": 2**40},
        {"kernel_size": 3, "groups": "1"},
    ],
    ids=str,
)
def test_the_constructor_raises_the_same_errors(options: dict[str, Any]) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011  the oracle says which
        nn.ConvTranspose2d(4, 6, **options)
    with pytest.raises(expected.type) as found:
        dgrad.ConvTranspose2d(4, 6, **options)
    given = {"in_channels": 4, "out_channels": 6, **options}
    values = ", ".join(f"{name}={value!r}" for name, value in given.items())
    text = str(expected.value).splitlines()[0]  # which names no value
    assert str(found.value) == f"{text}, in ConvTranspose2d({values})"


def test_a_constructor_without_arguments_is_told_as_by_pytorch() -> None:
    with pytest.raises(TypeError) as expected:
        nn.ConvTranspose2d(4)  # type: ignore[call-arg]
    with pytest.raises(TypeError) as found:
        dgrad.ConvTranspose2d(4)  # type: ignore[call-arg]
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("output_size", [None, (7, 7)])
def test_a_padding_mode_that_is_set_later_is_refused_too(output_size: Any) -> None:
    raised = []
    for kind in (nn.ConvTranspose2d, dgrad.ConvTranspose2d):
        layer = kind(4, 6, 3)
        layer.padding_mode = "circular"
        with pytest.raises(ValueError, match="padding mode") as error:
            layer(torch.ones(1, 4, 5, 5), output_size)
        raised.append(str(error.value))
    assert raised[0] == raised[1]


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


@pytest.mark.parametrize(
    "output_size", [5, 2.0, "55", ("5", "5"), (5.0, 5), [5, None], iter(""), {9: 1, 10: 2}]
)
def test_what_is_no_output_size_is_told(output_size: Any) -> None:
    ours, theirs = both(kernel_size=3)
    x = inputs(theirs)[..., :3, :3]
    with pytest.raises(Exception) as expected:  # noqa: PT011  the oracle says which
        theirs(x, output_size)
    with pytest.raises(expected.type) as found:
        ours(x, output_size)
    assert f"output_size is {output_size!r}, expected two integers" in str(found.value)


@pytest.mark.parametrize(
    ("input", "words"),
    [
        (None, "input is of type NoneType, expected a Tensor"),
        ([1.0], "input is of type list, expected a Tensor"),
        (torch.ones(3), r"input has shape \(3,\), expected 3 dimensions"),
        (torch.ones(1, 1, 4, 3, 3), r"input has shape \(1, 1, 4, 3, 3\), expected 3 dimensions"),
    ],
)
def test_a_bad_input_beside_an_output_size_is_told(input: Any, words: str) -> None:
    ours, theirs = both(kernel_size=3)
    with pytest.raises(Exception) as expected:  # noqa: PT011  the oracle says which
        theirs(input, (5, 5))
    with pytest.raises(expected.type, match=words):
        ours(input, (5, 5))


@pytest.mark.parametrize("output_size", [(4, 5), (5, 2**70), (-1, 5), [5], (1, 2, 3), (), "5"])
def test_an_output_size_that_cannot_be_is_told_as_by_pytorch(output_size: Any) -> None:
    ours, theirs = both(kernel_size=3)
    x = inputs(theirs)[..., :3, :3]
    with pytest.raises(ValueError, match="size") as expected:
        theirs(x, output_size)
    text = f"output_size is {output_size!r}: {expected.value}"
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        ours(x, output_size)


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
    assert str(found.value) == f"output_size is {output_size!r}: {expected.value}"
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


def test_a_fault_of_a_subclass_is_told_as_it_is() -> None:
    class Faulty(dgrad.ConvTranspose2d):
        def _output_padding(self, *_: Any, **__: Any) -> Any:
            return {}["missing"]

    with pytest.raises(KeyError, match=r"^'missing'$"):
        Faulty(4, 2, 3)(torch.randn(1, 4, 3, 3), (5, 5))
