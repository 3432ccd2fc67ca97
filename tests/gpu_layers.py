"""What gpu tests share: layers, tensors, how far a result is off, what memory is held."""

from __future__ import annotations

import gc
import time

import torch
from torch import Tensor

# Layers whose candidates differ clearly and layers whose candidates tie, and of which kind.
SUITE = [
    ((8, 64, 128, 128), (64, 64, 3, 7), {}, {}),
    ((16, 32, 64, 128), (32, 64, 3, 3), {"stride": 5, "padding": 1, "dilation": 2}, {}),
    ((16, 32, 32, 64), (32, 16, 3, 5), {"stride": (2, 3), "padding": (1, 2), "groups": 4}, {}),
    ((8, 512, 32, 32), (512, 256, 2, 2), {"stride": 2}, {"dtype": "bfloat16"}),
    ((64, 256, 8, 8), (256, 128, 4, 4), {"stride": 2, "padding": 1}, {"backward": True}),
    ((2, 64, 64, 64), (64, 1, 4, 4), {"stride": 2, "padding": 1, "groups": 64}, {}),
    ((1, 8, 4, 4), (8, 8, 3, 3), {"stride": 2, "padding": 1}, {"bias": True}),
    (
        (16, 128, 32, 32),
        (128, 64, 3, 3),
        {"stride": 2, "padding": 1},
        {"dtype": "float16", "layout": "channels_last", "bias": True},
    ),
]


def tensors(
    x: tuple[int, ...] = (8, 64, 64, 64),
    w: tuple[int, ...] = (64, 64, 3, 5),
    dtype: str = "float32",
) -> tuple[Tensor, Tensor]:
    kind = getattr(torch, dtype)
    return (
        torch.randn(x, device="cuda", dtype=kind),
        torch.randn(w, device="cuda", dtype=kind),
    )


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def held_bytes(device: int = 0) -> int:
    """What is asked of PyTorch's allocator and not given back, when that no longer changes.

    Autograd's thread lets go of gradients after the call that waited for them, one at a time.
    """
    found: list[int] = []
    while len(found) < 3 or len(set(found[-3:])) > 1:
        gc.collect()
        torch.cuda.synchronize(device)
        torch.empty(1, device=f"cuda:{device}")  # the allocator takes in what streams are done with
        time.sleep(0.05)
        found.append(torch.cuda.memory_stats(device)["requested_bytes.all.current"])
        assert len(found) < 100, found
    return found[-1]
