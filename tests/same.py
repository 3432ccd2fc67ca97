"""Tensors that are the same in every bit, stride and device."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.stride() == expected.stride()
    assert found.device == expected.device
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
