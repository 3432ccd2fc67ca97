"""Tensors too large for one cuDNN call, and memory that does not grow."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from gpu_cases import UPSAMPLING, forward
from gpu_layers import held_bytes
from reference import Arguments, Case, arguments, results

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("strict_and_never_pytorch")]

_MIB = 2**20
_GIB = 2**30


def need_memory(count_bytes: int) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < count_bytes:
        pytest.skip(f"needs {count_bytes / _GIB:.0f} GiB of free GPU memory")


# 33 images of 2^26 elements: cuDNN takes 31 of them in one call.
IMAGES, STEP = 33, 31


@pytest.fixture(scope="module")
def large_tensors() -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    need_memory(32 * _GIB)
    torch.manual_seed(0)
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.float16}
    x = torch.randn(IMAGES, 8, 512, 512, **options)
    w = torch.randn(8, 64, 2, 2, **options)
    # Small, so that a sum over all images stays in float16's range.
    grad = torch.randn(IMAGES, 64, 1024, 1024, **options) / 8
    yield x, w, grad
    del x, w, grad
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.alone  # a process beside it may hold the memory
class TestMoreThan2To31Elements:
    def test_the_output_is_that_of_the_parts(
        self, large_tensors: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, w, _ = large_tensors
        with torch.no_grad(), dgrad.flags(deterministic=True):
            output = dgrad.conv_transpose2d(x, w, stride=2)
            assert output.numel() > 2**31
            for start in (0, STEP):
                part = dgrad.conv_transpose2d(x[start : start + STEP], w, stride=2)
                assert torch.equal(output[start : start + STEP], part)
            # Each output has one tap: a matrix product for each of the four.
            last = x[-1].double().flatten(1)
            for r, s in ((0, 0), (0, 1), (1, 0), (1, 1)):
                wanted = (w[:, :, r, s].double().T @ last).view(64, 512, 512)
                error = (output[-1, :, r::2, s::2].double() - wanted).norm() / wanted.norm()
                assert error < 2e-3

    def test_the_inputs_gradient_is_that_of_the_parts(
        self, large_tensors: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, w, grad = large_tensors
        with dgrad.flags(deterministic=True):
            whole = grad_input(x, w, grad)
            for start in (0, STEP):
                stop = start + STEP
                part = grad_input(x[start:stop], w, grad[start:stop])
                assert torch.equal(whole[start:stop], part)

    def test_the_weights_gradient_is_the_sum_over_the_parts(
        self, large_tensors: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        x, w, grad = large_tensors
        leaf = w.detach().requires_grad_()
        output = dgrad.conv_transpose2d(x, leaf, stride=2)
        (actual,) = torch.autograd.grad(output, [leaf], grad)
        del output
        wanted = torch.zeros(8, 64, 2, 2, device="cuda", dtype=torch.float64)
        for image, gradient in zip(x, grad, strict=True):
            rows = image.float().flatten(1)
            for r, s in ((0, 0), (0, 1), (1, 0), (1, 1)):
                columns = gradient[:, r::2, s::2].float().flatten(1)
                wanted[:, :, r, s] += (rows @ columns.T).double()
        assert (actual.double() - wanted).norm() <= 2e-3 * wanted.norm()


def grad_input(x: Tensor, w: Tensor, grad: Tensor) -> Tensor:
    leaf = x.detach().requires_grad_()
    (found,) = torch.autograd.grad(dgrad.conv_transpose2d(leaf, w, stride=2), [leaf], grad)
    return found


def test_one_image_that_is_too_large_is_refused_in_words() -> None:
    allocated = torch.cuda.memory_allocated()
    # Expanded: 2^30 elements that take no memory.
    x = torch.ones(1, device="cuda", dtype=torch.float16).expand(2, 1, 2**15, 2**15)
    w = torch.ones(1, 2, 1, 1, device="cuda", dtype=torch.float16)
    with pytest.raises(
        dgrad.NotSupportedError, match="one image of the output has 2147483648"
    ) as e:
        dgrad.conv_transpose2d(x, w)
    with pytest.raises(dgrad.NotSupportedError) as again:
        exec(str(e.value).partition("To reproduce:\n\n")[2], {})
    assert str(again.value) == str(e.value)
    del x, w, e, again
    assert torch.cuda.memory_allocated() <= allocated + _MIB


# --- memory -------------------------------------------------------------------------------------


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.seconds(80)
def test_host_memory_is_bounded_over_many_shapes() -> None:
    dgrad.plan_cache.clear()
    dgrad.plan_cache.max_size = 64
    w = torch.randn(4, 4, 3, 3, device="cuda")
    with dgrad.flags(selection="exhaustive"):  # loads all that measuring may load
        dgrad.conv_transpose2d(torch.ones(1, 4, 50, 50, device="cuda"), w, stride=2)
    shapes = [(height, width) for height in range(2, 42) for width in range(2, 27)]
    assert len(shapes) == 1000
    sizes = []
    with torch.no_grad():
        for index, (height, width) in enumerate(shapes):
            dgrad.conv_transpose2d(torch.ones(1, 4, height, width, device="cuda"), w, stride=2)
            assert dgrad.plan_cache.size <= 64
            if index % 100 == 99:
                gc.collect()
                sizes.append(resident_bytes())
    grown = sizes[-1] - sizes[2]  # over the last 700 shapes
    assert grown < 48 * _MIB, [f"{size / _MIB:.0f} MiB" for size in sizes]


def test_device_memory_returns_to_the_allocator() -> None:
    given = arguments(UPSAMPLING)
    results(dgrad.conv_transpose2d, UPSAMPLING, given)
    before = held_bytes()
    for layout in ("nchw", "channels_last", "slice"):
        for precision in ("tf32", "float16"):
            case = replace(UPSAMPLING, layout=layout, precision=precision, dilation=(3, 1))
            with dgrad.flags(allow_tf32=True):
                results(dgrad.conv_transpose2d, replace(case, output_padding=(2, 1)), _fresh(case))
    assert held_bytes() == before


def _fresh(case: Case) -> Arguments:
    return arguments(replace(case, output_padding=(2, 1)))


def test_an_error_holds_no_device_memory() -> None:
    given = arguments(UPSAMPLING)
    forward(UPSAMPLING, given)
    before = held_bytes()
    for _ in range(3):
        with (
            dgrad.flags(algorithm="legacy:ALGO_99"),
            pytest.raises(dgrad.NotSupportedError),
        ):
            forward(UPSAMPLING, given)
    assert held_bytes() == before
