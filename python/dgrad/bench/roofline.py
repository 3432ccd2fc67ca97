"""The least time that a layer can take on a GPU, from ceilings measured on that GPU.

Note [Roofline]

A pass over a layer cannot take less time than moving its tensors once through memory, nor less
than its multiply-adds at the rate of the matrix units. The larger of both is its floor:

    floor = max(bytes / copy bandwidth, 2 * multiply-adds / matrix rate)

Multiply-adds are the real ones. An input pixel meets a tap of the kernel where the product lands
inside the output, at ``h * stride - padding + dilation * kh`` in [0, H_out); padding cuts some off.
Rows and columns are independent, so their pairs are counted apart:

    multiply-adds = N * C_in * (C_out / groups) * pairs of rows * pairs of columns

A dense convolution of the zero-stuffed input would count stride_h * stride_w times as many. All
three directions are sums over the same triples of input, weight and output, so they have the same
number. Bias additions are not counted.

Each byte counts once. Forward: x, w and bias are read, y is written. The backward pass of a
training step is a pass of its own, because grad_output exists only after the forward pass: x, w
and grad_output are read, their gradients and the bias's are written, and it does twice the
multiply-adds. The floors of the two passes are added.

The ceilings are the fastest runs of a large copy (bytes read and written) and of a large matrix
product in the dtype (float32 with tf32 where convolutions may use it). The output, which is written
again and again, may stay in the L2 cache, so a small layer may pass its floor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from dgrad._geometry import Geometry, output_size
from dgrad._layers import DTYPES, Layer
from dgrad.bench.timing import measure

_COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 24}
_MATRIX_SIZE = {"cuda": 8192, "cpu": 256}
_BUDGET_S = {"cuda": 0.3, "cpu": 0.01}


@dataclass(frozen=True, slots=True)
class Pass:
    """Floating-point operations (two for a multiply-add) and bytes moved, each counted once."""

    flops: int
    bytes: int


def passes(layer: Layer, direction: str) -> tuple[Pass, ...]:
    """What "forward" or "training" does at least; see Note [Roofline]."""
    item = layer.dtype.itemsize
    x = math.prod(layer.input) * item
    w = layer.input[1] * (layer.out_channels // layer.groups) * math.prod(layer.kernel) * item
    y = math.prod(output_shape(layer)) * item
    bias = layer.out_channels * item if layer.bias else 0
    flops = 2 * multiply_adds(layer)
    forward = Pass(flops, x + w + bias + y)
    if direction == "forward":
        return (forward,)
    return forward, Pass(2 * flops, 2 * (x + w) + y + bias)


def multiply_adds(layer: Layer) -> int:
    """Products of an input pixel and a weight that land inside the output."""
    pairs = (
        _pairs(
            layer.input[2 + axis],
            size,
            layer.kernel[axis],
            layer.stride[axis],
            layer.padding[axis],
            layer.dilation[axis],
        )
        for axis, size in enumerate(output_shape(layer)[2:])
    )
    channels = layer.input[1] * (layer.out_channels // layer.groups)
    return layer.input[0] * channels * math.prod(pairs)


def output_shape(layer: Layer) -> tuple[int, int, int, int]:
    """(N, C_out, H_out, W_out)"""
    geometry = Geometry(layer.padding, layer.stride, layer.dilation, layer.groups)
    size = output_size(layer.input[2:], layer.kernel, geometry, layer.output_padding)
    return layer.input[0], layer.out_channels, *size


def _pairs(size: int, output: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Pairs of a row h and a tap k with 0 <= h * stride - padding + dilation * k < output."""
    count = 0
    for tap in range(kernel):
        shift = padding - dilation * tap
        first = max(0, -(-shift // stride))
        last = min(size - 1, (output - 1 + shift) // stride)
        count += max(0, last - first + 1)
    return count


# --- ceilings -----------------------------------------------------------------------------------

Ceilings = Mapping[str, Any]  # {"copy_bytes_per_s": float, "matmul_flops_per_s": {dtype: float}}


def floor_ms(work: Sequence[Pass], dtype: str, ceilings: Ceilings) -> float:
    """The least time of these passes one after the other, in milliseconds."""
    bandwidth, rate = ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"][dtype]
    seconds = (max(each.bytes / bandwidth, each.flops / rate) for each in work)
    return float(sum(seconds)) * 1e3


def measure_ceilings(device: torch.device, dtypes: Sequence[str], tf32: bool) -> dict[str, Any]:
    """Copy bandwidth in bytes per second and matrix rate in operations per second, by dtype.

    `tf32` says whether float32 may use it. Leaves PyTorch's precision of float32 products changed.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    return {
        "copy_bytes_per_s": _copied_per_s(device),
        "matmul_flops_per_s": {dtype: _multiplied_per_s(device, dtype) for dtype in dtypes},
    }


def _copied_per_s(device: torch.device) -> float:
    source = torch.ones(_COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _per_s(2 * source.nbytes, partial(target.copy_, source), device)


def _multiplied_per_s(device: torch.device, dtype: str) -> float:
    n = _MATRIX_SIZE[device.type]
    a, b = (torch.randn(n, n, dtype=DTYPES[dtype], device=device) for _ in "ab")
    return _per_s(2 * n**3, partial(torch.mm, a, b, out=torch.empty_like(a)), device)


def _per_s(work: int, call: Callable[[], object], device: torch.device) -> float:
    fastest_ms = measure(call, device, budget_s=_BUDGET_S[device.type]).min_ms
    return float(f"{work / fastest_ms * 1e3:.5g}")


def larger(a: Ceilings, b: Ceilings) -> dict[str, Any]:
    """The larger of each ceiling: what was reached once can be reached."""
    rates, others = a["matmul_flops_per_s"], b["matmul_flops_per_s"]
    return {
        "copy_bytes_per_s": max(a["copy_bytes_per_s"], b["copy_bytes_per_s"]),
        "matmul_flops_per_s": {
            dtype: max(rates.get(dtype, 0.0), others.get(dtype, 0.0))
            for dtype in dict.fromkeys((*rates, *others))
        },
    }
