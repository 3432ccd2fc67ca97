"""The suites of bench and the roofline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from bench_layers import KERNELBENCH, SMALL
from dgrad._layers import Layer
from dgrad.bench import roofline
from dgrad.bench.suite import Case, cases

CEILINGS = {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": {"float32": 1e12, "float16": 2e12}}


# --- suites -------------------------------------------------------------------------------------


def test_the_layers_are_89_and_each_has_a_source() -> None:
    found = cases("layers")
    assert len(found) == len({case.label for case in found}) == 89
    assert all(case.source and case.source.startswith("github:") for case in found)
    assert {case.dtype for case in found} == {"float32"}
    assert any(case.layer.bias for case in found)


def test_the_kernelbench_suite_has_the_sizes_of_the_seven_problems() -> None:
    found = {case.name: case for case in cases("kernelbench")}
    assert found.keys() == {f"kb{number}" for number in KERNELBENCH}
    for number, (x, w, stride, padding, dilation, groups, y) in KERNELBENCH.items():
        case = found[f"kb{number}"]
        layer = Layer(x, y[1], w[2:], stride, padding, (0, 0), dilation, groups)
        assert case.layer == layer
        assert roofline.output_shape(layer) == y
        assert case.source is not None
        assert f"level1/{number}_" in case.source


def test_a_suite_is_crossed_with_dtypes_and_layouts(file: Callable[..., str]) -> None:
    found = cases(file(SMALL), ["bfloat16", "float64"], ["nchw", "nhwc"], "training", only="2$")
    assert [case.label for case in found] == [
        f"net/up2 {dtype} {layout}"
        for dtype in ("bfloat16", "float64")
        for layout in ("nchw", "nhwc")
    ]
    assert [case.layer.channels_last for case in found] == [False, True] * 2
    assert found[0].layer.dtype is torch.bfloat16
    assert found[0].direction == "training"
    lines = file("".join(json.dumps(entry) + "\n" for entry in SMALL))
    assert [case.layer for case in cases(lines)] == [case.layer for case in cases(file(SMALL))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_a_case_survives_the_way_through_json(dtype: str, layout: str) -> None:
    for case in cases("layers", [dtype], [layout], "training"):
        assert Case.from_dict(json.loads(json.dumps(case.to_dict()))) == case


# --- the roofline -------------------------------------------------------------------------------

_PAIRS = {
    "kernel": (1, 6),
    "stride": (1, 4),
    "padding": (0, 3),
    "output_padding": (0, 2),
    "dilation": (1, 3),
}


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    n, c_in, c_out, groups, h, w = (draw(st.integers(1, most)) for most in (2, 2, 2, 3, 6, 6))
    pairs = {name: draw(st.tuples(*[st.integers(*ends)] * 2)) for name, ends in _PAIRS.items()}
    try:
        return Layer((n, c_in * groups, h, w), c_out * groups, groups=groups, **pairs)
    except RuntimeError:  # output_padding too large, or nothing left of the output
        reject()


def _tensors(layer: Layer) -> dict[str, torch.Tensor]:
    """x and w of ones, and y without bias."""
    x = torch.ones(layer.input, dtype=torch.float64)
    w = torch.ones(layer.input[1], layer.out_channels // layer.groups, *layer.kernel).double()
    geometry = (layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation)
    return {"x": x, "w": w, "y": F.conv_transpose2d(x, w, None, *geometry)}


@given(layers())
@settings(max_examples=200, deadline=None)
def test_multiply_adds_are_the_products_that_reach_the_output(layer: Layer) -> None:
    # in a convolution of ones each output is the number of its products
    assert roofline.multiply_adds(layer) == int(_tensors(layer)["y"].sum())


def test_every_second_output_row_of_kb75_has_no_product() -> None:
    (kb75,) = cases("kernelbench", only="kb75")
    small = replace(kb75.layer, input=(1, 32, 16, 16))
    assert roofline.multiply_adds(small) == int(_tensors(small)["y"].sum())
    stuffed = 31 * 46 * 3 * 5 * 32 * 16  # as a dense convolution would count, without padding
    assert roofline.multiply_adds(small) < stuffed / 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_each_byte_counts_once_in_each_pass(dtype: torch.dtype, bias: bool) -> None:
    layer = Layer((2, 4, 5, 6), 6, (3, 2), (2, 1), (1, 0), (1, 0), groups=2, bias=bias, dtype=dtype)
    sizes = {name: t.to(dtype).nbytes for name, t in _tensors(layer).items()}
    b = torch.ones(6, dtype=dtype).nbytes if bias else 0
    x, w, y = (sizes[name] for name in "xwy")
    (forward,) = roofline.passes(layer, "forward")
    assert forward.bytes == x + w + b + y
    assert forward.flops == 2 * roofline.multiply_adds(layer)
    first, backward = roofline.passes(layer, "training")
    assert first == forward
    reads, writes = x + w + y, x + w + b
    assert backward.bytes == reads + writes
    assert backward.flops == 2 * forward.flops


def test_the_floor_is_the_slower_of_memory_and_multiply_adds() -> None:
    moving, computing = roofline.Pass(1, 10**6), roofline.Pass(10**10, 1)
    assert roofline.floor_ms([moving], "float32", CEILINGS) == pytest.approx(1.0)
    assert roofline.floor_ms([computing], "float32", CEILINGS) == pytest.approx(10.0)
    assert roofline.floor_ms([computing], "float16", CEILINGS) == pytest.approx(5.0)
    assert roofline.floor_ms([moving, computing], "float32", CEILINGS) == pytest.approx(11.0)


def test_of_two_runs_the_larger_ceilings_hold() -> None:
    other = {"copy_bytes_per_s": 2e9, "matmul_flops_per_s": {"float32": 9e11, "bfloat16": 3e12}}
    rates = {"float32": 1e12, "float16": 2e12, "bfloat16": 3e12}
    larger = {"copy_bytes_per_s": 2e9, "matmul_flops_per_s": rates}
    assert roofline.larger(CEILINGS, other) == roofline.larger(other, CEILINGS) == larger
