"""Arguments made up at random, one of them spoiled: PyTorch's result or class of error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dgrad
from good_call import raised

WILD = st.one_of(
    st.integers(-1, 6),
    st.sampled_from([1.0, True, "1", None, 2**64, (1, 2**64), (), (1,) * 3, [0, 9], (2, 1.0)]),
    st.tuples(st.integers(-1, 6), st.integers(-1, 6)),
)
DTYPE = st.sampled_from([torch.float32] * 8 + [torch.float64, torch.int64, torch.complex64])


def numbers(least: int) -> st.SearchStrategy[Any]:
    number = st.integers(least, least + 2)
    return st.one_of(number, st.tuples(number, number), st.lists(number, min_size=1, max_size=2))


@st.composite
def arguments_with_at_most_one_spoiled(draw: st.DrawFn) -> tuple[Any, ...]:
    # Where two are wrong, either class of error is right.
    groups, channels, out_channels = (draw(st.integers(1, n)) for n in (2, 3, 2))
    input_size, kernel = (draw(st.tuples(st.integers(1, 4), st.integers(1, 4))) for _ in "ab")
    dtype = draw(DTYPE)
    input = torch.randn(draw(st.integers(1, 2)), channels * groups, *input_size).to(dtype)
    weight = torch.randn(channels * groups, out_channels, *kernel).to(dtype)
    bias = draw(st.sampled_from([None, torch.randn(out_channels * groups).to(dtype)]))
    stride, dilation = draw(numbers(1)), draw(numbers(1))
    made = [input, weight, bias, stride, draw(numbers(0)), 0, groups, dilation]
    place = draw(st.integers(0, 7))
    if place > 2:
        made[place] = draw(st.one_of(st.just(made[place]), WILD))
        return tuple(made)
    tensor = made[place] if made[place] is not None else torch.ones(1, dtype=dtype)
    others: list[Any] = [made[place], made[place], None, 1, "text", tensor.tolist()]
    others += [tensor.sum(0), tensor[None], tensor[:0], tensor.repeat_interleave(2, dim=0)]
    if place < 2:
        others += [torch.randn(tensor.shape).to(draw(DTYPE)), tensor.transpose(2, 3)]
        others += [tensor.to(memory_format=torch.channels_last)]
        others += [tensor.narrow(draw(st.integers(1, 3)), 0, 0)]
    made[place] = draw(st.sampled_from(others))
    return tuple(made)


@contextmanager
def without_onednn() -> Iterator[None]:
    # torch.backends.mkldnn.flags also sets a tf32 switch, which warns without an Intel GPU.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@settings(deadline=None, max_examples=300)
@given(arguments_with_at_most_one_spoiled())
def test_any_arguments_give_pytorchs_result_or_pytorchs_class_of_error(
    arguments: tuple[Any, ...],
) -> None:
    # oneDNN runs a few arguments that PyTorch's other backends refuse, such as a dilation of 0.
    with without_onednn():
        expected = raised(F.conv_transpose2d, *arguments)
        found = raised(dgrad.conv_transpose2d, *arguments)
        if expected is not None:
            assert isinstance(found, type(expected)), f"{found!r} in place of {expected!r}"
            return
        wanted = F.conv_transpose2d(*arguments)
        if len(arguments[0]) == 0 and found is not None:
            assert isinstance(found, RuntimeError)  # PyTorch checks less of an empty batch
            return
        assert found is None, f"{found!r} where PyTorch gives a result"
        result = dgrad.conv_transpose2d(*arguments)
    assert result.stride() == wanted.stride()
    torch.testing.assert_close(result, wanted, rtol=0, atol=0)
