"""What tests of the known calls share: their marks, tensors, and a count of native runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad

NATIVE = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"),
        reason="this PyTorch has no C exchange table of DLPack",
    ),
    pytest.mark.usefixtures("nothing_known"),
]


def tensors(
    x: tuple[int, ...] = (2, 8, 9, 9), w: tuple[int, ...] = (8, 6, 3, 3), **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    groups = options.pop("groups", 1)
    return (
        torch.randn(x, device="cuda", **options),
        torch.randn(w, device="cuda", **options) / 8,
        torch.randn(w[1] * groups, device="cuda", **options),
    )


def used(call: Callable[[], object]) -> int:
    """How many native runs a call makes: each is a hit that no Python entry counts."""
    ready = dgrad.plan_cache.ready
    before = 0 if ready is None else ready.hits
    call()
    ready = dgrad.plan_cache.ready
    return (0 if ready is None else ready.hits) - before
