"""The bias's gradient in two steps: what is cut how, and that the sums are those of one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dgrad._channel_sums import channel_sums, in_two_steps

_NCHW, _NHWC = torch.contiguous_format, torch.channels_last
_CUT = [  # shape, layout, and the parts of the first step
    ((1, 96, 74, 74), _NCHW, (1, 96, 37, 148)),  # short rows, few of them
    ((1, 3, 256, 256), _NCHW, (1, 3, 4, 16384)),  # long rows, few of them
    ((100, 32, 28, 28), _NCHW, (100, 32, 1, 784)),  # an image at a time
    ((3, 3, 211, 211), _NCHW, (3, 3, 1, 44521)),  # no row of a good length: by images
    ((1, 64, 128, 128), _NHWC, (256, 64, 64)),  # many channels
    ((1, 32, 544, 960), _NHWC, (256, 2040, 32)),  # many pixels
    ((1, 5, 136, 240), _NHWC, (4080, 8, 5)),  # few channels
]
_WHOLE = [
    ((2, 6, 19, 19), _NCHW),  # small
    ((8, 1, 256, 256), _NCHW),  # one channel
    ((1, 256, 96, 96), _NCHW),  # a block of threads to each row
    ((1 << 18, 4, 1, 1), _NCHW),
    ((1, 3, 512, 512), _NHWC),
    ((1, 64, 8209, 1), _NHWC),  # no run of a good length
]
_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def _grad(shape: tuple[int, ...], layout: torch.memory_format, dtype: torch.dtype) -> Tensor:
    # Integers, of which all sums here are exact in float32.
    grad = torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0))
    return grad.to(dtype).contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize(("shape", "layout", "parts"), _CUT)
def test_two_steps_sum_what_one_does(
    shape: tuple[int, ...], layout: torch.memory_format, parts: tuple[int, ...], dtype: torch.dtype
) -> None:
    grad = _grad(shape, layout, dtype)
    way = in_two_steps(grad.shape, grad.stride())
    assert way is not None
    assert way.keywords == {"shape": parts}  # type: ignore[attr-defined]
    found = channel_sums(grad)
    assert found.dtype == dtype
    assert torch.equal(found, grad.sum((0, 2, 3), dtype=torch.float64).to(dtype))


@pytest.mark.parametrize(("shape", "layout"), _WHOLE)
def test_one_step_where_it_is_as_fast(shape: tuple[int, ...], layout: torch.memory_format) -> None:
    grad = _grad(shape, layout, torch.float32)
    assert in_two_steps(grad.shape, grad.stride()) is None
    assert torch.equal(channel_sums(grad), grad.sum((0, 2, 3)))


def test_other_strides_and_no_elements() -> None:
    for grad in (
        torch.ones(1).expand(4, 64, 64, 64),
        _grad((1, 64, 128, 256), _NHWC, torch.float32)[..., ::2],
        _grad((4, 64, 64, 64), _NCHW, torch.float32).transpose(0, 1),
        torch.ones(0, 64, 128, 128),
    ):
        assert torch.equal(channel_sums(grad), grad.sum((0, 2, 3)))


def test_half_precision_adds_in_float32() -> None:
    """Parts beyond float16's range, of a sum within it."""
    grad = torch.full((2, 64, 128, 128), 1024.0, dtype=torch.float16)
    grad[1] = -1024.0
    for layout in (_NCHW, _NHWC):
        found = channel_sums(grad.contiguous(memory_format=layout))
        assert torch.equal(found, torch.zeros(64, dtype=torch.float16))


def test_what_is_not_finite_stays_in_its_channel() -> None:
    grad = _grad((1, 64, 128, 128), _NHWC, torch.float32)
    grad[0, 3, 5, 7], grad[0, 9, 0, 0] = float("nan"), float("inf")
    found = channel_sums(grad)
    assert found.isnan().nonzero().flatten().tolist() == [3]
    assert found.isinf().nonzero().flatten().tolist() == [9]
