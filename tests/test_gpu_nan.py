"""NaN and infinity on the GPU: what they reach, and what they do not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dgrad
from gpu_cases import BOTH_LAYOUTS, PRECISIONS, dgrad_results
from reference import Case, arguments, expected, pytorch, results, set_pytorch_tf32

pytestmark = pytest.mark.gpu


_NAN = float("nan")
_INF = float("inf")


@pytest.mark.parametrize("value", [_NAN, _INF, -_INF])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_a_bad_pixel_reaches_all_its_outputs_and_no_other_image(
    layout: str, precision: str, value: float
) -> None:
    case = Case(n=3, c_in=8, c_out=8, stride=(2, 2), bias=False, precision=precision, layout=layout)
    given = arguments(case)
    with torch.no_grad():
        given.input[1, 2, 3, 4] = value
    reached = ~expected(case, given)["output"].value.isfinite()
    assert reached.any()
    assert not reached.all()
    output = dgrad_results(case, given)["output"].cpu()
    assert not output[reached].isfinite().any()
    assert output[0].isfinite().all()
    assert output[2].isfinite().all()


# Where FFT is the fastest that cuDNN has, or strided kernels read neighbours times zero.
SPREADING = [
    Case(4, 32, 32, (48, 48), (7, 7), padding=(3, 3), bias=False),
    Case(2, 16, 16, (32, 32), (5, 5), padding=(2, 2), bias=False),
    Case(16, 64, 32, (16, 16), (4, 4), (2, 2), (1, 1), bias=False),
    Case(2, 56, 1, (20, 32), (9, 9), (4, 4), (4, 4), (3, 3), bias=False),
]


@pytest.mark.parametrize("precision", ["tf32", "float32", "float16"])
@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("case", SPREADING, ids=lambda case: str(case.kernel))
def test_nan_flows_as_in_pytorch_whatever_is_selected(
    case: Case, layout: str, precision: str
) -> None:
    case = replace(case, layout=layout, precision=precision)
    given = arguments(case)
    middle = tuple(size // 2 for size in given.input.shape)
    with torch.no_grad():
        given.input[middle] = _NAN
    reached = expected(case, given)["output"].value.isnan()

    set_pytorch_tf32(precision == "tf32")

    def nan(function: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return results(function, case, given, grad=False)["output"].isnan().cpu()

    theirs = nan(pytorch)
    with dgrad.flags(selection="heuristic"):
        assert torch.equal(nan(dgrad.conv_transpose2d), theirs), "another engine than PyTorch's"
    # Those that cuDNN compiles are left out: a second each.
    with dgrad.flags(selection="exhaustive", algorithm="legacy"):
        assert nan(dgrad.conv_transpose2d)[reached].all()
    with dgrad.flags(selection="measure", measure_budget=0.1):
        ours = nan(dgrad.conv_transpose2d)
    assert ours[reached].all()
    # PyTorch's engines differ in this: some multiply neighbours within a stride by zero.
    rows, columns = (ours.any(dim) for dim in ((0, 1, 3), (0, 1, 2)))
    for found, axis in ((rows, 2), (columns, 3)):
        others = tuple(dim for dim in range(4) if dim != axis)
        exact = reached.sum(others).nonzero().flatten()
        spread = found.nonzero().flatten()
        stride = case.stride[axis - 2]
        assert spread.min() >= exact.min() - stride
        assert spread.max() <= exact.max() + stride
    assert not ours[: middle[0]].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bad_weight_reaches_its_channel_and_no_other_group(precision: str) -> None:
    case = Case(c_in=8, c_out=8, groups=2, bias=False, precision=precision)
    given = arguments(case)
    with torch.no_grad():
        given.weight[1, 2, 1, 1] = _NAN
    reached = ~expected(case, given)["output"].value.isfinite()
    output = dgrad_results(case, given)["output"].cpu()
    assert output[reached].isnan().all()
    assert output[:, 4:].isfinite().all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_bad_incoming_gradient_reaches_both_gradients(precision: str) -> None:
    case = Case(n=2, c_in=8, c_out=8, stride=(2, 2), precision=precision)
    given = arguments(case)
    given.grad_output[1, 3, 2, 2] = _NAN
    wanted = expected(case, given)
    found = dgrad_results(case, given)
    for name in ("grad_input", "grad_weight", "grad_bias"):
        reached = ~wanted[name].value.isfinite()
        assert reached.any()
        assert found[name].cpu()[reached].isnan().all(), name
    assert found["grad_input"][0].isfinite().all()


def test_a_bad_bias_reaches_its_channel_alone() -> None:
    case = Case(c_out=6)
    given = arguments(case)
    assert given.bias is not None
    with torch.no_grad():
        given.bias[2] = _INF
    output = dgrad_results(case, given)["output"]
    assert (output[:, 2] == _INF).all()
    assert output[:, [0, 1, 3, 4, 5]].isfinite().all()
