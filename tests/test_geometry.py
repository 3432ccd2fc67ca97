"""Sizes, strides and padding: PyTorch and cuDNN are the oracles."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import dgrad
from dgrad import _call, _loader
from dgrad._arguments import check_sizes
from dgrad._geometry import (
    Geometry,
    Pair,
    appended_rows,
    integer,
    is_channels_last,
    output_size,
    pair,
)
from dgrad._operands import INPUTS
from dgrad.exceptions import NotSupportedError

core, reason = _loader.load()
needs_cudnn = pytest.mark.skipif(core is None, reason=f"no cuDNN: {reason}")


class Case:
    """Arguments that conv_transpose2d accepts."""

    def __init__(
        self, images: int, channels: Pair, size: Pair, kernel: Pair, geometry: Geometry, extra: Pair
    ) -> None:
        self.input = (images, channels[0] * geometry.groups, *size)
        self.weight = (channels[0] * geometry.groups, channels[1], *kernel)
        self.geometry = geometry
        self.output_padding = extra

    def tensors(self, **options: Any) -> tuple[Tensor, Tensor]:
        return torch.randn(self.input, **options), torch.randn(self.weight, **options)

    def by_pytorch(self, input: Tensor, weight: Tensor) -> Tensor:
        padding, stride, dilation, groups = self.geometry
        return F.conv_transpose2d(
            input, weight, None, stride, padding, self.output_padding, groups, dilation
        )

    def by_dgrad(self, input: Tensor, weight: Tensor) -> Tensor:
        padding, stride, dilation, groups = self.geometry
        return dgrad.conv_transpose2d(
            input, weight, None, stride, padding, self.output_padding, groups, dilation
        )

    def __repr__(self) -> str:
        return (
            f"Case(input={self.input}, weight={self.weight}, {self.geometry}, "
            f"output_padding={self.output_padding})"
        )


def pairs(least: int, most: int) -> st.SearchStrategy[Pair]:
    return st.tuples(st.integers(least, most), st.integers(least, most))


@st.composite
def cases(draw: st.DrawFn, most: int = 6) -> Case:
    stride, dilation = draw(pairs(1, 5)), draw(pairs(1, 5))
    size, kernel = draw(pairs(1, most)), draw(pairs(1, 4))
    padding = draw(pairs(0, 4))
    # All that PyTorch allows, so also stride <= output_padding < dilation.
    vertical, horizontal = (max(stride[i], dilation[i]) - 1 for i in (0, 1))
    extra = (draw(st.integers(0, vertical)), draw(st.integers(0, horizontal)))
    geometry = Geometry(padding, stride, dilation, draw(st.integers(1, 3)))
    assume(min(output_size(size, kernel, geometry, extra)) >= 1)
    return Case(draw(st.integers(1, 3)), draw(pairs(1, 3)), size, kernel, geometry, extra)


@settings(deadline=None, max_examples=100)
@given(cases(most=40))
def test_the_output_has_pytorchs_size(case: Case) -> None:
    input, weight = case.tensors(device="meta")
    expected = case.by_pytorch(input, weight).shape
    found = output_size(case.input[2:], case.weight[2:], case.geometry, case.output_padding)
    assert found == tuple(expected[2:])
    assert case.by_dgrad(input, weight).shape == expected
    assert check_sizes(input, weight, None, case.geometry, case.output_padding) == found


def test_the_output_has_pytorchs_size_where_it_exceeds_32_bits() -> None:
    geometry = Geometry((0, 0), (70_000, 70_000), (1, 1), 1)
    input = torch.empty(1, 1, 3, 3, device="meta")
    expected = F.conv_transpose2d(input, input, stride=70_000).shape
    assert output_size((3, 3), (3, 3), geometry, (0, 0)) == tuple(expected[2:])
    assert dgrad.conv_transpose2d(input, input, stride=70_000).shape == expected


@settings(deadline=None, max_examples=100)
@given(cases())
def test_appended_rows_stand_for_output_padding(case: Case) -> None:
    input, weight = case.tensors(dtype=torch.float64)
    expected = case.by_pytorch(input, weight)
    rows, columns = appended_rows(case.output_padding, case.geometry.stride)
    case.output_padding = (
        case.output_padding[0] - rows * case.geometry.stride[0],
        case.output_padding[1] - columns * case.geometry.stride[1],
    )
    assert all(0 <= case.output_padding[i] < case.geometry.stride[i] for i in (0, 1))
    found = case.by_pytorch(F.pad(input, (0, columns, 0, rows)), weight)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


class ProblemsOnly:
    """The native module up to its problems, taken to be for device 0, and no further."""

    def __init__(self) -> None:
        self.problems: list[Any] = []

    def Problem(self, **fields: Any) -> Any:
        assert core is not None
        self.problems.append(core.Problem(**(fields | {"device": 0})))
        return self.problems[-1]


def problems_of(
    direction: str, a: Tensor, b: Tensor, geometry: Geometry, size: Pair
) -> tuple[_call.Call, list[Any]]:
    recorder = ProblemsOnly()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_call, "_loader", SimpleNamespace(require=lambda: recorder))
        call = _call.Call(direction, a, b, geometry, size)
    return call, recorder.problems


@needs_cudnn
@pytest.mark.parametrize("channels_last", [False, True])
@settings(deadline=None, max_examples=50)
@given(case=cases())
def test_cudnn_agrees_with_the_problems_of_all_directions(case: Case, channels_last: bool) -> None:
    assert core is not None
    layout = torch.channels_last if channels_last else torch.contiguous_format
    y, w = (t.contiguous(memory_format=layout) for t in case.tensors())
    x = case.by_pytorch(y, w)
    rows, columns = appended_rows(case.output_padding, case.geometry.stride)
    y = F.pad(y, (0, columns, 0, rows))
    tensors = {"x": x, "w": w, "y": y}
    for direction, result in (("dgrad", "x"), ("fprop", "y"), ("wgrad", "w")):
        a, b = (tensors[name] for name in INPUTS[direction])
        size = tensors[result].shape[2:]
        _, (problem,) = problems_of(direction, a, b, case.geometry, (size[0], size[1]))
        for name, tensor in tensors.items():
            assert tuple(getattr(problem, name)) == tuple(tensor.shape)
        assert core.legacy_forward_output_size(problem) == list(y.shape)
        pairs_ = (tuple(getattr(problem, name)) for name in ("padding", "stride", "dilation"))
        assert (*pairs_, problem.groups) == case.geometry


SIZES = st.tuples(*[st.sampled_from([0, 1, 1, 2, 3])] * 4)
STRIDES = st.tuples(*[st.sampled_from([0, 1, 1, 2, 3, 6, 9, 18, 100])] * 4)


@settings(deadline=None, max_examples=400)
@given(size=SIZES, stride=STRIDES)
@example(size=(1, 1, 1, 1), stride=(1, 1, 1, 1))
@example(size=(2, 1, 3, 3), stride=(9, 1, 3, 1))
@example(size=(2, 1, 3, 3), stride=(9, 9, 3, 1))
@example(size=(1, 3, 1, 1), stride=(3, 1, 1, 1))
@example(size=(1, 3, 1, 1), stride=(3, 1, 3, 3))
@example(size=(2, 3, 0, 2), stride=(6, 1, 6, 3))
def test_channels_last_is_what_pytorch_reads_it_as(
    size: tuple[int, ...], stride: tuple[int, ...]
) -> None:
    # Padding on all sides makes its output in the memory format that PyTorch reads the input as,
    # and makes it large enough for the strides to tell which.
    storage = torch.zeros(1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True) if n))
    padded = F.pad(storage.as_strided(size, stride), (1,) * 8)
    layout = torch.channels_last if is_channels_last(size, stride) else torch.contiguous_format
    assert padded.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("size", [(2, 3, 4), (2, 3, 4, 5, 6)])
def test_only_tensors_of_four_dimensions_are_channels_last(size: tuple[int, ...]) -> None:
    stride = torch.empty(size, device="meta").stride()
    assert not is_channels_last(size, stride)


@pytest.mark.parametrize(
    ("value", "expected"), [(2, (2, 2)), ((1, 2), (1, 2)), ([1, 2], (1, 2)), ((3,), (3, 3))]
)
def test_a_pair_is_read_as_by_pytorch(value: Any, expected: Pair) -> None:
    assert pair(value, "stride") == expected
    one = torch.empty(1, 1, 2, 2, device="meta")
    shapes = {F.conv_transpose2d(one, one, stride=s).shape for s in (value, expected)}
    assert len(shapes) == 1


def test_an_integer_of_another_library_is_an_integer() -> None:
    numpy = pytest.importorskip("numpy")
    assert pair((numpy.int64(2), torch.tensor(3)), "stride") == (2, 3)
    assert type(integer(numpy.int32(4), "groups")) is int


LARGEST = 2**31 - 1  # elements of one tensor in cuDNN's legacy descriptors


def shapes(x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...]) -> dict[str, Any]:
    return {"x": x, "w": w, "y": y}


@given(images=st.integers(1, 10**6), large=st.integers(1, LARGEST), small=st.integers(1, LARGEST))
def test_the_most_images_that_fit_go_into_one_call(images: int, large: int, small: int) -> None:
    count = _call._images_per_call(
        shapes((images, 1, 1, large), (1, 1, 1, 1), (images, 1, small, 1))
    )
    assert count * max(large, small) <= LARGEST < (count + 1) * max(large, small)


@pytest.mark.parametrize(
    ("x", "w", "y", "words"),
    [
        ((1, 2, 2**15, 2**15), (1, 2, 1, 1), (1, 1, 1, 1), "one image of the output"),
        ((1, 1, 1, 1), (1, 2, 1, 1), (1, 2, 2**15, 2**15), "one image of the input"),
        ((1, 1, 1, 1), (2**11, 2**10, 32, 32), (1, 1, 1, 1), "weight has shape"),
    ],
)
def test_what_is_too_large_for_any_call_is_refused_in_words(
    x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...], words: str
) -> None:
    with pytest.raises(NotSupportedError, match=f"{words}.* {LARGEST}"):
        _call._images_per_call(shapes(x, w, y))


@needs_cudnn
@pytest.mark.parametrize("images", [1, 3, 4, 5, 8, 9])
def test_a_batch_over_the_limit_is_split_without_a_gap(
    images: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_call, "MAX_ELEMENTS", 4 * 2 * 5 * 5)  # four images of the output
    y, w = torch.empty(images, 3, 3, 3), torch.empty(3, 2, 3, 3)
    geometry = Geometry((0, 0), (1, 1), (1, 1), 1)
    call, problems = problems_of("dgrad", y, w, geometry, (5, 5))
    bounds = [(start, stop) for _, start, stop in call._parts]
    assert [start for start, _ in bounds] + [images] == [0] + [stop for _, stop in bounds]
    lengths = {stop - start for start, stop in bounds}
    assert max(lengths) == min(images, 4)
    assert {problem.x[0] for problem in problems} == {problem.y[0] for problem in problems}
    assert {problem.x[0] for problem in problems} == lengths


@pytest.mark.parametrize(
    ("pointer", "expected"),
    [(0, 16), (512, 16), (513, 1), (514, 2), (516, 4), (520, 8), (528, 16), (2**47 + 24, 8)],
)
def test_alignment_is_the_largest_power_of_two_up_to_16(pointer: int, expected: int) -> None:
    assert _call._alignment(pointer) == expected
    assert pointer % expected == 0
