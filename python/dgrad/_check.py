"""Holds the results of candidates against each other while they are timed.

cuDNN has engines that are wrong for some sizes and say nothing (``BLOCKED`` in _candidates.py has
those that were found). The first candidate is cuDNN's own choice, and PyTorch's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .exceptions import TorchOutOfMemoryError

if TYPE_CHECKING:
    from torch import Tensor

    from ._core import Problem

# Relative norms. Wrong engines are off by far more, right ones by far less.
_TRUSTED = {"float16": 0.05, "bfloat16": 0.05, "tf32": 0.05, "float32": 1e-3, "float64": 1e-9}

DOUBT = "its result is not that of the first candidate"  # begins the reason; not stored as one


class Check:
    """Called after the first run of each candidate that is timed, with the result in place.

    Raises ValueError for a result that differs from the first candidate's by more than precision
    explains. Without memory for a copy nothing is checked, nor where the first is not finite.
    """

    def __init__(self, result: Tensor, problem: Problem) -> None:
        self._result = result
        self._limit = _TRUSTED["tf32" if problem.tf32 else problem.dtype]
        self._first: Tensor | None = None

    def __call__(self) -> None:
        try:
            if self._first is None:
                self._first = self._result.clone()
                return
            norm = _norm(self._first)
            error = _norm(self._result - self._first)
        except TorchOutOfMemoryError:
            return
        if math.isfinite(norm) and not error <= self._limit * norm:
            raise ValueError(f"{DOUBT}: {error / (norm or 1):.2g} apart (relative norm)")


def _norm(tensor: Tensor) -> float:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=dtype))
