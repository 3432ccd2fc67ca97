"""A problem with a bias for the tests of bias, and the right result of it."""

from __future__ import annotations

import torch
from torch import Tensor

from dgrad.exceptions import cudnn_error
from fake_cudnn import BIAS, VALUE, FakeProblem, FakeResult

BIASED = FakeProblem(bias=True)
LEGACY = FakeResult("ALGO_1", "FMA_MATH")
NOT_SUPPORTED = cudnn_error(3000, "cudnnRun returned 3000", "cudnnRun", "")


def biased(x: Tensor, bias: Tensor = BIAS) -> Tensor:
    """The right result."""
    return torch.full(x.shape, VALUE) + bias.view(1, 2, 1, 1)
