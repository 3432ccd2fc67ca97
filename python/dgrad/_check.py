"""Holds the results of candidates against each other while they are timed.

cuDNN has engines that are wrong for some sizes and say nothing (``BLOCKED`` in _candidates.py has
those that were found). The first candidate that may run is cuDNN's own choice, and PyTorch's.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .exceptions import TorchOutOfMemoryError

if TYPE_CHECKING:
    from torch import Tensor

    from ._core import Problem

WRONG = "its result is not that of the first candidate"

# Relative norms. Wrong engines are off by far more, right ones by far less.
_TRUSTED = {"float16": 0.05, "bfloat16": 0.05, "tf32": 0.05, "float32": 1e-3, "float64": 1e-9}


class Check:
    """Called after the first run of each candidate that is timed, with the result in place.

    The first result is kept. Raises ValueError for one that differs from it by more than precision
    explains. Without memory for a copy nothing is checked, nor where the first is not finite.
    """

    def __init__(self, result: Tensor, problem: Problem) -> None:
        self._result = result
        self._limit = _TRUSTED["tf32" if problem.tf32 else problem.dtype]
        # Below and above these, numbers round to zero or to infinity, in one engine and not in all.
        numbers = torch.finfo(result.dtype)
        self._least = numbers.tiny * math.sqrt(result.numel())
        self._large = numbers.max / 8
        self._kept: Tensor | None = None
        self._has_memory = True

    def spoil(self) -> None:
        """Before a candidate's first run: what it leaves unwritten shall show."""
        self._result.fill_(math.nan)

    def drop(self) -> None:
        """Give the copy's memory back; nothing is checked any more."""
        self._kept, self._has_memory = None, False

    def __call__(self) -> None:
        if not self._has_memory:
            return
        try:
            if self._kept is None:
                self._kept = self._result.clone()
                return
            norm = _norm(self._kept)
            error = _norm(self._result - self._kept)
            overflows = math.isinf(_norm(self._result)) and self._largest() > self._large
        except TorchOutOfMemoryError:
            self.drop()
            return
        if overflows or not math.isfinite(norm):
            return
        if not error <= self._limit * norm + self._least:
            raise ValueError(f"{WRONG}: {error / (norm or 1):.2g} apart (relative norm)")

    def _largest(self) -> float:
        assert self._kept is not None
        return max(abs(float(each)) for each in torch.aminmax(self._kept))


def _norm(tensor: Tensor) -> float:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return float(torch.linalg.vector_norm(tensor, dtype=dtype))
