"""The native module's problem: each field is part of its key and text, and is checked."""

from __future__ import annotations

from typing import Any
from unittest.mock import ANY, Mock

import pytest
import torch

import dgrad
from core_problem import BASE, core, problem

LARGEST = 2**31 - 1

# Each changes one field as far as it can be changed alone: sizes that hang together move together.
CHANGES: dict[str, dict[str, Any]] = {
    "direction fprop": {"direction": "fprop"},
    "direction wgrad": {"direction": "wgrad"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
    "tf32": {"tf32": True},
    "layout": {"layout": "nhwc"},
    "batch": {"x": (3, 6, 9, 11), "y": (3, 4, 5, 6)},
    "channels of x": {"x": (2, 8, 9, 11), "w": (4, 4, 3, 2)},
    "channels of y": {"w": (8, 3, 3, 2), "y": (2, 8, 5, 6)},
    "height of x alone": {"x": (2, 6, 10, 11)},
    "width of x alone": {"x": (2, 6, 9, 12)},
    "height of y": {"x": (2, 6, 11, 11), "y": (2, 4, 6, 6)},
    "width of y": {"x": (2, 6, 9, 13), "y": (2, 4, 5, 7)},
    "kernel height alone": {"w": (4, 3, 2, 2)},
    "kernel width": {"w": (4, 3, 3, 1), "y": (2, 4, 5, 7)},
    "vertical padding": {"padding": (2, 1), "y": (2, 4, 6, 6)},
    "horizontal padding": {"padding": (1, 2), "y": (2, 4, 5, 7)},
    "vertical stride": {"stride": (3, 2), "y": (2, 4, 3, 6)},
    "horizontal stride": {"stride": (2, 3), "y": (2, 4, 5, 4)},
    "vertical dilation": {"dilation": (2, 2), "y": (2, 4, 4, 6)},
    "horizontal dilation alone": {"dilation": (1, 1)},
    "groups": {"groups": 1, "x": (2, 3, 9, 11)},
    "bias": {"bias": True},
    "alignment 8": {"alignment": 8},
    "alignment 1": {"alignment": 1},
    "device": {"device": 1},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_another_field_gives_another_key_and_another_text(changes: dict[str, Any]) -> None:
    one, other = problem(), problem(**changes)
    assert one != other
    assert hash(one) != hash(other)
    assert str(one) != str(other)
    assert len({one, other}) == 2
    for name, value in (BASE | changes).items():
        found = getattr(other, name)
        assert (tuple(found) if isinstance(found, list) else found) == value


def test_a_problem_equals_no_other_kind_of_object() -> None:
    assert problem() != str(problem())
    assert problem() != Mock(spec=type(problem()))
    assert problem() == ANY


def test_the_changes_cover_every_field() -> None:
    changed = set().union(*CHANGES.values())
    assert changed == set(BASE)
    properties = {name for name in dir(problem()) if not name.startswith("_")}
    assert properties == set(BASE), "a new field belongs into BASE and CHANGES"


def test_all_these_problems_differ_from_each_other() -> None:
    problems = [problem(), *(problem(**changes) for changes in CHANGES.values())]
    assert len(set(problems)) == len(problems)
    assert len({hash(one) for one in problems}) == len(problems)
    assert len({str(one) for one in problems}) == len(problems)


def test_equal_problems_are_one_key_and_one_text() -> None:
    one, other = problem(), problem()
    assert one is not other
    assert one == other
    assert hash(one) == hash(other)
    assert str(one) == str(other)
    assert {one: "found"}[other] == "found"


@pytest.mark.parametrize("other", [None, 0, "text", BASE, str(BASE)])
def test_a_problem_equals_nothing_else(other: object) -> None:
    assert problem() != other
    assert str(problem()) != other


def test_the_text_says_every_value() -> None:
    text = str(problem())
    for part in (
        "dgrad float32/ieee nchw",
        "x=2x6x9x11",
        "w=4x3x3x2",
        "y=2x4x5x6",
        "padding=1,1",
        "stride=2,2",
        "dilation=1,2",
        "groups=2",
        "alignment=16",
        "device=0",
    ):
        assert part in text
    assert "float32/tf32" in str(problem(tf32=True))
    assert str(problem(bias=True)) == text.replace("dgrad ", "dgrad+bias ", 1)
    assert text in repr(problem())


def test_the_same_sizes_by_dilation_and_by_output_padding_are_two_keys() -> None:
    # h=2, k=2, s=2, out=5: other caches without dilation in the key confuse these two.
    common = {
        "x": (1, 1, 5, 5), "w": (1, 1, 2, 2), "y": (1, 1, 2, 2),
        "padding": (0, 0), "stride": (2, 2), "groups": 1,
    }  # fmt: skip
    with_output_padding = problem(**common, dilation=(1, 1))
    with_dilation = problem(**common, dilation=(2, 2))
    assert with_output_padding != with_dilation
    assert hash(with_output_padding) != hash(with_dilation)
    x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    first = dgrad.conv_transpose2d(x, w, stride=2, output_padding=1)
    second = dgrad.conv_transpose2d(x, w, stride=2, dilation=2)
    assert first.shape == second.shape == (1, 1, 5, 5)
    assert not torch.equal(first, second)


NO_BIAS = r"bias is true, expected false, as direction is not dgrad$"
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "direction": ({"direction": "up"}, r"direction is 'up', expected one of dgrad, fprop, wgrad"),
    "dtype": ({"dtype": "int8"}, r"dtype is 'int8', expected one of float16, bfloat16, float32"),
    "layout": ({"layout": "chwn"}, r"layout is 'chwn', expected one of nchw, nhwc"),
    "tf32": ({"tf32": True, "dtype": "float16"}, r"tf32 is true, expected false"),
    "x has a zero": ({"x": (2, 6, 0, 11)}, r"x is 2x6x0x11, expected each from 1"),
    "w is negative": ({"w": (4, 3, -3, 2)}, r"w is 4x3x-3x2, expected each from 1"),
    "y has a zero": ({"y": (0, 4, 5, 6)}, r"y is 0x4x5x6, expected each from 1"),
    "padding": ({"padding": (-1, 1)}, r"padding is -1x1, expected each from 0"),
    "stride": ({"stride": (2, 0)}, r"stride is 2x0, expected each from 1"),
    "dilation": ({"dilation": (0, 2)}, r"dilation is 0x2, expected each from 1"),
    "groups zero": ({"groups": 0}, r"groups is 0, expected a divisor"),
    "groups negative": ({"groups": -2}, r"groups is -2, expected a divisor"),
    "groups no divisor": ({"groups": 3}, r"groups is 3, expected a divisor"),
    "channels of w": ({"w": (4, 6, 3, 2)}, r"w is 4x6x3x2, expected .*channels of x / groups"),
    "filters of w": ({"w": (2, 3, 3, 2)}, r"w is 2x3x3x2, expected .*channels of y"),
    "batch": ({"y": (3, 4, 5, 6)}, r"y is 3x4x5x6, expected the batch size of x"),
    "size of y": ({"y": (2, 4, 5, 5)}, r"y is 2x4x5x5, expected the size of the convolution"),
    "kernel too large": ({"w": (4, 3, 12, 2)}, r"y is 2x4x5x6, expected the size of the conv"),
    "bias of fprop": ({"bias": True, "direction": "fprop"}, NO_BIAS),
    "bias of wgrad": ({"bias": True, "direction": "wgrad"}, NO_BIAS),
    "alignment zero": ({"alignment": 0}, r"alignment is 0, expected 1, 2, 4, 8 or 16"),
    "alignment odd": ({"alignment": 3}, r"alignment is 3, expected 1, 2, 4, 8 or 16"),
    "alignment 32": ({"alignment": 32}, r"alignment is 32, expected 1, 2, 4, 8 or 16"),
    "device": ({"device": -1}, r"device is -1, expected 0 or more"),
    "device over 32 bits": ({"device": 2**31}, r"device is 2147483648, expected .* 32 bits"),
    "x with padding": ({"padding": (1, 2**30)}, r"padding is 1x1073741824, expected fewer"),
    "w with dilation": ({"dilation": (1, LARGEST)}, r"dilation is 1x2147483647, expected fewer"),
}


@pytest.mark.parametrize(("changes", "words"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_field_is_named_with_its_value(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        problem(**changes)


@pytest.mark.parametrize("field", ["padding", "stride", "dilation", "x", "w", "y"])
@pytest.mark.parametrize("value", [2**31, 2**32, 2**62, 2**63 - 1])
def test_what_does_not_fit_in_32_bits_is_refused(field: str, value: int) -> None:
    # 2^32 + a valid number would be valid again if it were cut to 32 bits.
    sizes = (*BASE[field][:-1], value)
    with pytest.raises(ValueError, match=rf"^{field} is .*{value}, expected"):
        problem(**{field: sizes})


@pytest.mark.parametrize("value", [2**63, 2**64, 2**100])
def test_what_does_not_fit_in_64_bits_is_refused(value: int) -> None:
    with pytest.raises(TypeError):
        problem(groups=value)


@pytest.mark.parametrize("field", BASE)
def test_every_field_must_be_given(field: str) -> None:
    assert core is not None
    with pytest.raises(TypeError):
        core.Problem(**{name: value for name, value in BASE.items() if name != field})


@pytest.mark.parametrize("value", ["yes", "", [True], {}])
def test_a_bias_that_is_no_bool_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        problem(bias=value)


def large(x: tuple[int, ...], channels: int = 1) -> dict[str, Any]:
    return {
        "x": x, "w": (channels, x[1], 1, 1), "y": (x[0], channels, *x[2:]),
        "padding": (0, 0), "stride": (1, 1), "dilation": (1, 1), "groups": 1,
    }  # fmt: skip


def test_a_tensor_of_all_elements_that_32_bits_count_is_accepted() -> None:
    assert core is not None
    accepted = problem(**large((1, 1, 1, LARGEST)))
    assert core.legacy_forward_output_size(accepted) == [1, 1, 1, LARGEST]


@pytest.mark.parametrize(
    "x", [(1, 1, 2, 2**30), (2**16, 2**16, 1, 1), (LARGEST, LARGEST, LARGEST, LARGEST)]
)
def test_more_elements_than_32_bits_count_are_refused(x: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^x is .*at most {LARGEST} elements.*32-bit"):
        problem(**large(x))


def test_the_largest_numbers_do_not_overflow_the_arithmetic() -> None:
    kernel = {"x": (1, 1, 1, 1), "w": (1, 1, LARGEST, 1), "y": (1, 1, 1, 1), "groups": 1}
    with pytest.raises(ValueError, match=r"^padding is 2147483647x0, expected fewer than 2\^31"):
        problem(**kernel, dilation=(LARGEST, 1), padding=(LARGEST, 0), stride=(LARGEST, 1))
    with pytest.raises(ValueError, match=r"^dilation is 2147483647x1, expected fewer than 2\^31"):
        problem(**kernel, dilation=(LARGEST, 1), padding=(LARGEST // 2, 0), stride=(LARGEST, 1))
    with pytest.raises(ValueError, match=r"^y is 1x1x1x1, expected the size"):
        problem(**kernel, dilation=(1, 1), padding=(LARGEST // 2 - 1, 0), stride=(LARGEST, 1))
