"""Values, shapes, strides and dtypes on the GPU, against float64 and against PyTorch."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

import dgrad
from gpu_cases import BOTH_LAYOUTS, PRECISIONS, dgrad_results
from reference import (
    LAYOUTS,
    Case,
    arguments,
    assert_close,
    expected,
    nan_in_free_memory,
    pytorch_results,
)

pytestmark = pytest.mark.gpu

SWEEP_SIZE = 320

HALF_AND_FULL = ("float64", "float32", "float16", "bfloat16")


def check(case: Case) -> None:
    """Values agree with float64; shapes, dtypes and strides are PyTorch's; all is written."""
    given = arguments(case)
    wanted = expected(case, given)
    shapes = [wanted["output"].value.shape, *(leaf.shape for leaf in given.leaves)]
    with nan_in_free_memory(shapes, case.dtype):
        found = dgrad_results(case, given)
    theirs = pytorch_results(case, given)
    assert found.keys() == wanted.keys() == theirs.keys()
    for name, actual in found.items():
        what = f"{name} of {case}"
        assert_close(actual, wanted[name], case.tolerance, what)
        assert actual.dtype == case.dtype, what
        assert actual.stride() == theirs[name].stride(), (
            f"{what}: strides {actual.stride()}, PyTorch's are {theirs[name].stride()}"
        )


def test_random_problem_agrees_with_float64_and_has_pytorchs_strides(swept: Case) -> None:
    check(swept)


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 1)], ids=lambda s: f"s{s[0]}x{s[1]}")
@pytest.mark.parametrize(
    "kernel",
    [(1, 1), (3, 7), (3, 5), (2, 2), (4, 4), (5, 1)],
    ids=lambda k: f"k{k[0]}x{k[1]}",
)
def test_each_kernel_stride_precision_and_layout(
    kernel: tuple[int, int], stride: tuple[int, int], precision: str, layout: str
) -> None:
    check(
        Case(
            n=2,
            c_in=16,
            c_out=8,
            size=(6, 9),
            kernel=kernel,
            stride=stride,
            padding=(kernel[0] // 2, kernel[1] // 2),
            precision=precision,
            layout=layout,
            weight_layout=layout,
            grad_layout=layout,
        )
    )


SPECIAL = {
    "depthwise": Case(c_in=32, c_out=32, groups=32, kernel=(4, 4), stride=(2, 2), padding=(1, 1)),
    "depthwise, two outputs a channel": Case(c_in=6, c_out=12, groups=6, stride=(2, 1)),
    "groups": Case(c_in=16, c_out=32, groups=4, kernel=(3, 5), stride=(2, 3), dilation=(2, 1)),
    "groups of one image are a batch": Case(n=1, c_in=64, c_out=24, groups=8, stride=(2, 2)),
    "output padding as large as the stride": Case(
        stride=(1, 2), dilation=(3, 3), output_padding=(2, 2)
    ),
    "output padding of two strides": Case(
        n=None, stride=(1, 1), dilation=(4, 3), output_padding=(3, 2), padding=(1, 0)
    ),
    "output padding below the stride": Case(stride=(3, 2), output_padding=(2, 1)),
    "stride over the kernel": Case(kernel=(2, 1), stride=(3, 3), output_padding=(2, 1)),
    "padding takes most of the output": Case(kernel=(5, 5), padding=(4, 4), size=(5, 6)),
    "padding over the kernel": Case(kernel=(2, 2), padding=(3, 2), size=(8, 9)),
    "one pixel in, one pixel out": Case(size=(1, 1), kernel=(1, 1)),
    "one pixel in": Case(size=(1, 1), kernel=(4, 4), c_in=64, c_out=32),
    "one pixel in, one channel": Case(n=1, c_in=1, c_out=1, size=(1, 1), kernel=(2, 2)),
    "one row": Case(size=(1, 9), kernel=(1, 5), stride=(1, 2)),
    "one column": Case(size=(9, 1), kernel=(5, 1), stride=(2, 1)),
    "one channel": Case(c_in=1, c_out=1, kernel=(3, 3), stride=(2, 2)),
    "without batch": Case(n=None, stride=(2, 2), padding=(1, 1), output_padding=(1, 1)),
    "large kernel and stride": Case(
        n=1, c_in=56, c_out=1, kernel=(9, 9), stride=(4, 4), padding=(4, 4), output_padding=(3, 3)
    ),
    "every second row gets no tap": Case(
        c_in=8, c_out=16, kernel=(3, 5), stride=(2, 3), padding=(1, 2), dilation=(2, 1), groups=4
    ),
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", SPECIAL)
def test_special_problem(name: str, precision: str) -> None:
    check(replace(SPECIAL[name], precision=precision))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", HALF_AND_FULL)
@pytest.mark.parametrize("which", ["layout", "weight_layout", "grad_layout"])
def test_each_layout_of_each_tensor(which: str, precision: str, layout: str) -> None:
    case = Case(n=3, c_in=8, c_out=16, stride=(2, 1), padding=(1, 1), precision=precision)
    check(replace(case, **{which: layout}))


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("c_out", [1, 5])
@pytest.mark.parametrize("c_in", [1, 5])
@pytest.mark.parametrize("size", [(1, 1), (4, 1), (1, 4), (4, 4)])
def test_strides_are_pytorchs_where_sizes_of_one_make_the_layout_ambiguous(
    size: tuple[int, int], c_in: int, c_out: int, kernel: tuple[int, int]
) -> None:
    for layout in BOTH_LAYOUTS:
        for weight_layout in BOTH_LAYOUTS:
            for n in (None, 1, 2):
                case = Case(
                    n=n,
                    c_in=c_in,
                    c_out=c_out,
                    size=size,
                    kernel=kernel,
                    layout=layout,
                    weight_layout=weight_layout,
                    precision="float16",
                )
                given = arguments(case)
                ours = dgrad_results(case, given)
                theirs = pytorch_results(case, given)
                for name, actual in ours.items():
                    assert actual.stride() == theirs[name].stride(), f"{name} of {case}"


# --- what must not be mixed up ------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_equal_sizes_with_other_dilation_are_another_problem(order: tuple[int, int]) -> None:
    """Height 2, kernel 2, stride 2, output 5 is dilation 1 and output padding 1, or dilation 2."""
    one = Case(size=(2, 2), kernel=(2, 2), stride=(2, 2), output_padding=(1, 1))
    cases = (one, replace(one, output_padding=(0, 0), dilation=(2, 2)))
    dgrad.plan_cache.clear()
    for index in order:
        check(cases[index])


def test_equal_sizes_with_other_groups_are_another_problem() -> None:
    dgrad.plan_cache.clear()
    for groups in (1, 2, 4):
        check(Case(c_in=8, c_out=8, groups=groups))


def test_tf32_and_strict_float32_are_different_problems() -> None:
    case = Case(c_in=64, c_out=64, size=(16, 16), padding=(1, 1))
    for precision in ("tf32", "float32", "tf32", "float32"):
        check(replace(case, precision=precision))


def test_repeated_calls_read_the_new_values() -> None:
    case = Case(c_in=8, c_out=8, stride=(2, 2))
    for seed in range(4):
        check(replace(case, seed=seed))


# --- alignment ----------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", ["shifted", "shifted_channels_last"])
def test_tensors_one_element_off_an_aligned_address(precision: str, layout: str) -> None:
    case = Case(
        n=2,
        c_in=16,
        c_out=32,
        size=(8, 8),
        stride=(2, 2),
        padding=(1, 1),
        precision=precision,
        layout=layout,
        weight_layout=layout,
        grad_layout=layout,
    )
    given = arguments(case)
    size = given.input.element_size()
    assert given.input.data_ptr() % 16 == given.weight.data_ptr() % 16 == size % 16
    check(case)


def test_aligned_and_misaligned_tensors_in_turn() -> None:
    for layout in ("nchw", "shifted", "nchw", "shifted"):
        check(Case(c_in=8, c_out=8, precision="float16", layout=layout))


# --- what is written ----------------------------------------------------------------------------


def test_the_output_reuses_poisoned_memory() -> None:
    """The claim that the checks for unwritten elements stand on."""
    case = Case(c_in=8, c_out=8)
    given = arguments(case)
    dgrad_results(case, given)
    gc.collect()  # not between: it could free what fits better
    with nan_in_free_memory([(2, 8, *case.output_size)], case.dtype) as addresses, torch.no_grad():
        output = dgrad.conv_transpose2d(given.input, given.weight, **case.options)
    assert output.data_ptr() in addresses


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_elements_without_a_tap_are_the_bias_exactly(precision: str, layout: str) -> None:
    case = Case(
        c_in=8,
        c_out=8,
        kernel=(1, 2),
        stride=(3, 3),
        output_padding=(2, 2),
        precision=precision,
        layout=layout,
    )
    given = arguments(case)
    assert given.bias is not None
    with nan_in_free_memory([(2, 8, *case.output_size)], case.dtype):
        output = dgrad_results(case, given)["output"]
    bias = given.bias.detach().view(1, -1, 1, 1)
    for rows, columns in ((1, 0), (2, 0), (0, 2), (1, 1)):
        gap = output[:, :, rows::3, columns::3]
        assert torch.equal(gap, bias.expand(gap.shape))


# --- empty, module, inputs ----------------------------------------------------------------------


@pytest.mark.parametrize("precision", HALF_AND_FULL)
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_an_empty_batch_gives_what_pytorch_gives(layout: str, precision: str) -> None:
    case = Case(n=0, stride=(2, 2), precision=precision, layout=layout, weight_layout=layout)
    given = arguments(case)
    ours = dgrad_results(case, given)
    theirs = pytorch_results(case, given)
    assert ours["output"].shape == (0, case.c_out, *case.output_size)
    for name, actual in ours.items():
        assert actual.dtype == case.dtype
        assert actual.stride() == theirs[name].stride(), name
        assert torch.equal(actual, theirs[name]), name
    assert not ours["grad_weight"].any()


@pytest.mark.parametrize("output_size", [None, (15, 19), [2, 12, 16, 20], (16, 19)])
@pytest.mark.parametrize("shape", [(2, 8, 8, 10), (8, 8, 10)])
def test_the_module_agrees_with_pytorchs_module(shape: tuple[int, ...], output_size: Any) -> None:
    if output_size is not None and len(shape) == 3 and len(output_size) == 4:
        output_size = output_size[1:]
    torch.manual_seed(1)
    ours = dgrad.ConvTranspose2d(8, 12, 3, stride=2, padding=1, device="cuda", dtype=torch.float64)
    torch.manual_seed(1)
    theirs = torch.nn.ConvTranspose2d(
        8, 12, 3, stride=2, padding=1, device="cuda", dtype=torch.float64
    )
    x = torch.randn(shape, device="cuda", dtype=torch.float64)
    actual, wanted = ours(x, output_size), theirs(x, output_size)
    assert actual.shape == wanted.shape
    torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_strict_float32_by_pytorchs_rule_for_equal() -> None:
    """Closer than any tolerance of this file asks: float32 throughout rounds like float32."""
    case = Case(c_in=32, c_out=32, size=(12, 12), precision="float32")
    given = arguments(case)
    wanted = expected(case, given)["output"].value
    output = dgrad_results(case, given)["output"].cpu().double()
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)


def test_inputs_are_left_as_they_are() -> None:
    case = Case(c_in=8, c_out=8, stride=(2, 2))
    given = arguments(case)
    before = [tensor.detach().clone() for tensor in (*given.leaves, given.grad_output)]
    dgrad_results(case, given)
    for tensor, old in zip((*given.leaves, given.grad_output), before, strict=True):
        assert torch.equal(tensor, old)
