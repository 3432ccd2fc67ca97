"""What is no flag, or no value of one, is told in words and leaves the flags as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dgrad
from dgrad import config
from good_call import W, X, assert_a_good_call_works

pytestmark = pytest.mark.usefixtures("restored_flags")


def by_layer(flags: Any) -> Any:
    layer = dgrad.ConvTranspose2d(4, 2, 3)
    layer.flags = flags
    return layer(X)


def by_call(flags: Any) -> Any:
    return dgrad.conv_transpose2d(X, W, flags=flags)


def by_mapped_call(flags: Any) -> Any:
    return torch.func.vmap(lambda x: dgrad.conv_transpose2d(x, W, flags=flags))(X[None])


def by_compiled_call(flags: Any) -> Any:
    return torch.compile(lambda x: dgrad.conv_transpose2d(x, W, flags=flags), backend="eager")(X)


NO_FLAGS = {
    "a dict": {"deterministic": True},
    "an empty dict": {},
    "text": "deterministic",
    "a number": 1,
    "False": False,
    "a list": [],
    "the class": dgrad.Flags,
}


@pytest.mark.parametrize("value", NO_FLAGS.values(), ids=NO_FLAGS.keys())
@pytest.mark.parametrize("attempt", [by_layer, by_call, by_mapped_call, by_compiled_call])
def test_what_is_no_flags_object_is_told_by_the_call(
    attempt: Callable[[Any], Any], value: Any
) -> None:
    torch.compiler.reset()
    with dgrad.flags(fallback="pytorch"):
        for _ in range(2):
            with pytest.raises(TypeError) as caught:
                attempt(value)
            assert str(caught.value).startswith(f"flags is {value!r}, expected None or dgrad.Flags")
    assert_a_good_call_works()


@pytest.mark.parametrize("text", ["x", "%7B", "1", "null", "%7B%22a%22:1%7D"])
def test_a_text_that_no_flags_gave_is_told_by_the_operator(text: str) -> None:
    with pytest.raises(ValueError, match=f"^flags is '{text}', expected what dgrad.Flags"):
        torch.ops.dgrad.conv_transpose2d(X, W, flags=text)
    assert_a_good_call_works()


@pytest.mark.parametrize("name", list(config.CHECKS))
def test_a_value_that_cannot_be_shown_is_told_all_the_same(name: str) -> None:
    class Secret:
        def __repr__(self) -> str:
            raise RuntimeError("no")

    for value, shown in ((Secret(), "<Secret>"), (10**5000, "(<int>|1000)"), ("x" * 1000, "'xxx")):
        with pytest.raises(
            (TypeError, ValueError), match=f"^{name} is {shown}.*, expected"
        ) as caught:
            dgrad.Flags(**{name: value})
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", list(config.CHECKS))
def test_arrays_are_told_too(name: str) -> None:
    for value in (pytest.importorskip("numpy").array([1, 2]), torch.tensor([1, 2])):
        with pytest.raises((TypeError, ValueError), match=f"^{name} is .*expected"):
            dgrad.Flags(**{name: value})


def test_numbers_of_another_library_are_numbers() -> None:
    numpy = pytest.importorskip("numpy")
    flags = dgrad.Flags(workspace_limit=numpy.int64(7), measure_budget=numpy.float32(0.5))
    assert flags == dgrad.Flags(workspace_limit=7, measure_budget=0.5)
    assert (
        dgrad.Flags(measure_budget=numpy.int8(2)).as_text()
        == dgrad.Flags(measure_budget=2).as_text()
    )
