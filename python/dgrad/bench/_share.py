"""How much of a model's time its transposed convolutions take."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_RUNS = {"cuda": 5, "cpu": 1}


def share(model: nn.Module, run: Callable[[], object], device: torch.device) -> float:
    """The part of ``run``'s time, from 0 to 1, that passes in the ConvTranspose2d of ``model``.

    On a GPU times are those between CUDA events, so that of a small model the gaps count that the
    host leaves. The median of a few runs, after one that is not counted.
    """
    kind = "cuda" if device.type == "cuda" else "cpu"
    begun: list[Any] = []  # the outermost first: one inside another is the other's time
    spans: list[tuple[Any, Any]] = []

    def before(module: nn.Module, _: object) -> None:
        begun.append(_mark(kind))

    def after(module: nn.Module, *_: object) -> None:
        span = begun.pop(), _mark(kind)
        if not begun:
            spans.append(span)

    hooks = [
        handle
        for module in model.modules()
        if isinstance(module, nn.ConvTranspose2d)
        for handle in (
            module.register_forward_pre_hook(before),
            module.register_forward_hook(after),
        )
    ]
    shares = []
    try:
        run()
        for _ in range(_RUNS[kind]):
            spans.clear()
            whole = _mark(kind)
            run()
            whole = whole, _mark(kind)
            if kind == "cuda":
                torch.cuda.synchronize(device)
            shares.append(sum(_elapsed(*span) for span in spans) / _elapsed(*whole))
    finally:
        for hook in hooks:
            hook.remove()
    return statistics.median(shares)


def _mark(kind: str) -> Any:
    if kind == "cpu":
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(begin: Any, end: Any) -> float:
    return float(end - begin if isinstance(begin, float) else begin.elapsed_time(end))
