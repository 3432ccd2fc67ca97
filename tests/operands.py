"""What the tests of the operators and of compiled code share: devices, tensors, a version."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
on_each_device = pytest.mark.parametrize("device", DEVICES)
compiles = pytest.mark.skipif(
    torch.__version__ < "2.7", reason="PyTorch's operator runs before 2.7"
)


def tensors(device: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """A large side (2, 4, 12, 15), a filter and a small side: of a layer with groups."""
    torch.manual_seed(0)
    sizes = (2, 4, 12, 15), (6, 2, 4, 3), (2, 6, 6, 15)
    x, w, y = (torch.randn(size, device=device, dtype=dtype) for size in sizes)
    return x, w, y
