"""Engines that are blocked for some problems only are right for the others."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dgrad
from cases import DTYPES, TOLERANCES
from gpu_layers import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("strict_and_never_pytorch")]


def behind(tensor: Tensor) -> Tensor:
    """The same 16 bytes behind an aligned address."""
    offset = 16 // tensor.element_size()
    buffer = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device="cuda")
    return buffer.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("precision", ["tf32", "float16", "bfloat16"])
def test_engine_70_is_right_where_it_may_run(precision: str, layout: str) -> None:
    draw, dtype = random.Random(70), DTYPES["float32" if precision == "tf32" else precision]
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    torch.manual_seed(70)
    ran = refused = 0
    for _ in range(40):
        groups, stride = draw.choice([1, 1, 2, 4]), draw.choice([1, 2, 3])
        kernel = draw.choice([1, 2, 3, 4, 5]), draw.choice([1, 2, 3, 4, 7])
        c_in, c_out = (groups * draw.choice([8, 16, 24, 40]) for _ in "xy")
        size = draw.choice([2, 3, 4, 7, 8, 13, 17]), draw.choice([2, 4, 8, 16, 17])
        x = torch.randn(draw.choice([1, 2, 3, 4]), c_in, *size, device="cuda", dtype=dtype)
        w = torch.randn(c_in, c_out // groups, *kernel, device="cuda", dtype=dtype)
        x, w = (t.contiguous(memory_format=memory_format) for t in (x, w))
        options = {"stride": stride, "padding": (0, kernel[1] // 2), "groups": groups}
        leaf = w.double().requires_grad_()
        y = F.conv_transpose2d(x.double(), leaf, **options)
        grad = torch.randn_like(y).to(dtype).contiguous(memory_format=memory_format)
        (wanted,) = torch.autograd.grad(y, leaf, grad.double())
        w.requires_grad_()
        with dgrad.flags(allow_tf32=precision == "tf32", selection="heuristic"):
            found = dgrad.conv_transpose2d(behind(x), w, **options)
            with dgrad.flags(algorithm={"wgrad": "graph:eng70"}):
                try:
                    (actual,) = torch.autograd.grad(found, w, behind(grad))
                except dgrad.NotSupportedError as error:
                    refusal = str(error)
                    if "graph:eng70 (" in refusal:  # else cuDNN does not offer it
                        assert layout == "nchw"
                        assert "its result is wrong in nchw" in refusal
                        assert prod(x.shape) * x.element_size() % 128
                        refused += 1
                    continue
        assert relative_error(actual, wanted) < TOLERANCES[precision], (x.shape, w.shape, options)
        ran += 1
    assert ran >= 10
    assert (refused > 0) == (layout == "nchw")
