"""Timing candidates of one problem against each other on the device."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch

_ROUNDS = 5
_SAMPLE_MS = 1.0  # a sample is so many runs back to back that it takes about this long
_MAX_RUNS = 50
_DROP_FACTOR = 4.0  # a candidate this much slower than the best by one run is not sampled again
_LEAVE_FACTOR = 1.25  # by the samples of a round or more


class Contestant:
    """One candidate while it is timed.

    ``prepare`` gives what queues its work once on the current stream, or None if it turned out
    not to be wanted. It is called when its turn comes: it may compile. ``check`` is called after
    the first run and raises if the result is not to be trusted.
    """

    def __init__(
        self,
        prepare: Callable[[], Callable[[], None] | None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.prepare = prepare
        self.check = check
        self.reached = False
        self.run: Callable[[], None] | None = None
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

    def sample(self, runs: int) -> float:
        """Milliseconds of one of ``runs`` runs back to back."""
        assert self.run is not None
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(runs):
            self.run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / runs


def measure(
    contestants: list[Contestant], budget_s: float | None, errors: tuple[type[Exception], ...]
) -> None:
    """Time the contestants, in rounds of shuffled order, until each has its samples.

    Runs lie back to back between two events, so that the host's share counts where it is what
    limits. A contestant that raises one of ``errors`` keeps the error and leaves; after each
    round those leave that are far behind. When ``budget_s`` seconds are spent no further one is
    begun: those not reached stay without a time. The current stream alone is waited for.
    """
    begin = time.perf_counter()
    # Its own generator: the program's random numbers stay as they are.
    order = random.Random(len(contestants))

    def spent() -> bool:
        return budget_s is not None and time.perf_counter() - begin > budget_s

    for contestant in contestants:  # the promising ones come first
        if spent():
            break
        contestant.reached = True
        try:
            contestant.run = contestant.prepare()
            if contestant.run is not None:
                contestant.sample(1)  # loads kernels; tells nothing about the next run
                contestant.check()
                contestant.samples_ms = [contestant.sample(1)]
        except errors as error:
            contestant.fail(error)
    timed = _within(_DROP_FACTOR, contestants)
    if len(timed) > 1:
        _sample_in_rounds(timed, order, spent, errors)


def _within(factor: float, contestants: list[Contestant]) -> list[Contestant]:
    """Those that are not slower than the best by more than a factor."""
    times = {id(c): time_ms for c in contestants if (time_ms := c.time_ms) is not None}
    limit = factor * min(times.values(), default=0.0)
    return [c for c in contestants if id(c) in times and times[id(c)] <= limit]


def _sample_in_rounds(
    timed: list[Contestant],
    order: random.Random,
    spent: Callable[[], bool],
    errors: tuple[type[Exception], ...],
) -> None:
    first = {id(c): c.samples_ms[0] for c in timed}
    for number in range(_ROUNDS):
        if spent():
            break
        for contestant in order.sample(timed, len(timed)):
            runs = max(1, min(_MAX_RUNS, round(_SAMPLE_MS / max(first[id(contestant)], 1e-3))))
            try:
                sample_ms = contestant.sample(runs)
            except errors as error:
                contestant.fail(error)
                continue
            if number == 0:
                contestant.samples_ms.clear()  # a single run says less than many back to back
            contestant.samples_ms.append(sample_ms)
        timed = _within(_LEAVE_FACTOR, timed)
