"""Timing candidates of one problem against each other on the device."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch

_SAMPLES = 5
_SAMPLE_MS = 1.0  # a sample is so many runs back to back that it takes about this long
_MAX_RUNS = 50
_DROP_FACTOR = 4.0  # a candidate this much slower than the best is not sampled again


class Contestant:
    """One candidate while it is timed: ``run`` queues its work once, on the current stream."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run
        self.samples_ms: list[float] = []
        self.error: Exception | None = None

    def fail(self, error: Exception) -> None:
        # Its traceback would hold the workspace while the others are timed.
        self.error = error.with_traceback(None)

    @property
    def time_ms(self) -> float | None:
        """The median of one run in milliseconds, None if it was not timed or failed."""
        if self.error is not None or not self.samples_ms:
            return None
        return max(statistics.median(self.samples_ms), 1e-6)  # events can give 0


def measure(
    contestants: list[Contestant], budget_s: float | None, errors: tuple[type[Exception], ...]
) -> None:
    """Time the contestants, in rounds of shuffled order, until each has its samples.

    Runs lie back to back between two events, so that the host's share counts where it is what
    limits. A contestant that raises one of ``errors`` keeps the error and leaves. When
    ``budget_s`` seconds are spent no further one is begun: those not reached stay without a time.
    The current stream alone is waited for.
    """
    begin = time.perf_counter()
    # Its own generator: the program's random numbers stay as they are.
    order = random.Random(len(contestants))

    def spent() -> bool:
        return budget_s is not None and time.perf_counter() - begin > budget_s

    for contestant in contestants:  # in cuDNN's order: the promising ones come first
        if spent():
            break
        try:
            _sample(contestant, 1)  # loads kernels; tells nothing about the next run
            contestant.samples_ms = [_sample(contestant, 1)]
        except errors as error:
            contestant.fail(error)
    timed = [contestant for contestant in contestants if contestant.time_ms is not None]
    if not timed:
        return
    best_ms = min(contestant.samples_ms[0] for contestant in timed)
    timed = [c for c in timed if c.samples_ms[0] <= _DROP_FACTOR * best_ms]
    if len(timed) > 1:
        _sample_in_rounds(timed, order, spent, errors)


def _sample_in_rounds(
    timed: list[Contestant],
    order: random.Random,
    spent: Callable[[], bool],
    errors: tuple[type[Exception], ...],
) -> None:
    runs = {
        id(c): max(1, min(_MAX_RUNS, round(_SAMPLE_MS / max(c.samples_ms[0], 1e-3)))) for c in timed
    }
    first = {id(c): c.samples_ms.pop() for c in timed}
    for _ in range(_SAMPLES):
        if spent():
            break
        for contestant in order.sample(timed, len(timed)):
            if contestant.error is not None:
                continue
            try:
                contestant.samples_ms.append(_sample(contestant, runs[id(contestant)]))
            except errors as error:
                contestant.fail(error)
    for contestant in timed:
        if not contestant.samples_ms:
            contestant.samples_ms = [first[id(contestant)]]


def _sample(contestant: Contestant, runs: int) -> float:
    """Milliseconds of one of ``runs`` runs back to back."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(runs):
        contestant.run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / runs
