"""Timing candidates of one problem against each other on the device."""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import torch

from .exceptions import TorchOutOfMemoryError

_LOOKS = 3  # at what the first would drop and the host may have disturbed
_ROUNDS = 5
_HOST_ROUNDS = 9  # where the host limits, which is disturbed more often than the device
_HOST_JUDGED = 3  # before so many of them none leaves
_SURE_ROUNDS = 2  # whatever the budget: a single run says little
_SAMPLE_MS = 1.0  # a sample is so many runs back to back that it takes about this long
_HOST_SAMPLE_MS = 0.5  # where the host limits: of more and shorter samples one is undisturbed
_MAX_RUNS = 50
_DROP_FACTOR = 4.0  # a candidate this much slower than the best by one run is not sampled again
_LEAVE_FACTOR = 1.25  # by the samples of a round or more
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
_BUILDERS = min(4, _CORES)  # more compile no faster in cuDNN
_AHEAD = 2 * _BUILDERS  # so many are built before their turn comes
_PATIENCE_S = 0.05  # for one that is built, before the budget is looked at again

# Below this time of one run the host may be what limits, and hide what the device takes.
_HOST_MS = 0.1
_HOST_SHARE = 0.5  # so is it where queueing takes more of the time: of many kernels a run, say
CLOSE = 1.5  # candidates this close are then told apart by their time on the device
_CACHE_MS = 1.0  # and up to this time those that are not far behind: tensors may fit its cache
_DEVICE_PAIRS = 5
_DEVICE_SAMPLES = 3
_FLUSH_BYTES = 256 << 20  # no GPU's cache holds more
_CYCLES_PER_MS = 3_000_000  # no GPU's clock is faster
_LONG_MS = 10.0  # of such runs few are enough

Errors = tuple[type[Exception], ...]


class _NoThreadError(Exception):
    """Nothing was built."""


class Contestant:
    """One candidate while it is timed.

    Args:
        build: makes what is to be run. It may take a second, and is called in a thread of its own.
        prepare: gets that when its turn comes; gives what queues the work once on the current
            stream, or None if it turned out not to be wanted.
        check: called after the first run; raises if the result is not to be trusted.
    """

    def __init__(
        self,
        build: Callable[[], Any],
        prepare: Callable[[Any], Callable[[], None] | None],
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.build = build
        self.prepare = prepare
        self.check = check
        self.reached = False
        self.run: Callable[[], None] | None = None
        self.samples_ms: list[float] = []
        self.device_samples_ms: list[float] = []
        self.host_limits = False  # whether it may have in the last sample
        self.error: Exception | None = None

    def fail(self, error: Exception) -> None:
        # Its traceback would hold the workspace while the others are timed.
        self.error = error.with_traceback(None)

    @property
    def time_ms(self) -> float | None:
        """One run in milliseconds, None if it was not timed or failed.

        The median of its samples; where the host limits the least, as in :mod:`timeit`.
        """
        return self._of(self.samples_ms)

    @property
    def device_ms(self) -> float | None:
        """That of the device alone, see `sample_device`; None where it was not asked for."""
        return self._of(self.device_samples_ms)

    def _of(self, samples_ms: list[float]) -> float | None:
        if self.error is not None or not samples_ms:
            return None
        # The lower of two in the middle: what disturbs makes a run longer, never shorter.
        middle = min if self.host_limits else statistics.median_low
        return max(middle(samples_ms), 1e-6)  # events can give 0

    def sample(self, runs: int) -> float:
        """Milliseconds of one of ``runs`` runs back to back."""
        assert self.run is not None
        start, end = _events()
        begin = time.perf_counter()
        start.record()
        for _ in range(runs):
            self.run()
        end.record()
        host_ms = (time.perf_counter() - begin) * 1e3
        end.synchronize()
        sample_ms = float(start.elapsed_time(end))
        self.host_limits = sample_ms / runs <= _HOST_MS or host_ms > _HOST_SHARE * sample_ms
        return sample_ms / runs

    def sample_device(self, flush: Callable[[], object]) -> float:
        """The same on the device alone: half of the runs find nothing of theirs in its cache.

        A call in a loop finds what fits there, one in a model what is left between two calls.
        """
        assert self.run is not None
        time_ms = self.time_ms or 0.0
        wanted = round(_SAMPLE_MS / max(2 * time_ms, 1e-3))
        pairs = [_events() for _ in range(max(1, min(_DEVICE_PAIRS, wanted)))]
        # The device is held back until the host has queued all runs.
        hold_ms = 6 * len(pairs) * (time_ms if self.host_limits else _HOST_MS)
        torch.cuda._sleep(int(hold_ms * _CYCLES_PER_MS))
        for start, end in pairs:
            flush()
            start.record()
            self.run()
            self.run()
            end.record()
        pairs[-1][1].synchronize()
        return statistics.median(float(start.elapsed_time(end)) / 2 for start, end in pairs)


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def measure(
    contestants: Sequence[Contestant],
    budget_s: float | None,
    errors: Errors,
    late: Callable[[], Sequence[Contestant]] = tuple,
) -> None:
    """Time the contestants, in rounds of shuffled order, until each has its samples.

    Runs lie back to back between two events, so that the host's share counts where it is what
    limits. Of short runs those that are close get their time on the device too, in and out of its
    cache; where the host limits so do all that it may have slowed, as the replay of a CUDA graph
    has no host's share. A contestant that raises one of ``errors`` keeps the error
    and leaves; after each round those leave that are far behind. When ``budget_s`` seconds are
    spent no further one is begun: those not reached stay without a time. Of long runs, those that
    were only built by then are not reached either. ``late`` is asked, when all have their times,
    for more to join the best. The current stream alone is waited for.
    """
    begin = time.perf_counter()
    # Its own generator: the program's random numbers stay as they are.
    order = random.Random(len(contestants))

    def spent() -> bool:
        return budget_s is not None and time.perf_counter() - begin > budget_s

    _begin(contestants, spent, errors)
    _look_again(contestants, errors)
    timed = _sample_in_rounds(_within(_DROP_FACTOR, contestants), order, spent, errors)
    joined = late()
    if joined:
        _begin(joined, lambda: False, errors)
        _look_again([*timed, *joined], errors)
        timed = _within(_DROP_FACTOR, [*timed, *joined])
        timed = _sample_in_rounds(timed, order, spent, errors)
    host_limits = _host_limits(timed)
    if timed and ((_fastest_ms(timed) or 0.0) <= _CACHE_MS or host_limits):
        close = _within(_leave_factor(timed), timed)
        flush = _flush(errors)
        least = _sample_device(close, order, errors, flush)
        if host_limits and (_fastest_ms(timed) or 0.0) <= _CACHE_MS and not spent():
            slowed = _within(_DROP_FACTOR, [*contestants, *joined])
            slowed = [c for c in slowed if c.host_limits and c not in close]
            _sample_device(slowed, order, errors, flush, least)


def _begin(contestants: Sequence[Contestant], spent: Callable[[], bool], errors: Errors) -> None:
    """Build each, and run it twice: for a first look at its time."""
    waiting = iter(contestants)  # the promising ones come first
    begun: list[tuple[Contestant, Future[Any]]] = []
    pool = ThreadPoolExecutor(_BUILDERS, "dgrad-build")
    try:
        while True:
            while len(begun) < _AHEAD and not spent():
                contestant = next(waiting, None)
                if contestant is None:
                    break
                contestant.reached = True
                begun.append((contestant, _submit(pool, contestant)))
            fastest = _fastest_ms(contestants)
            if spent() and fastest is not None:
                for contestant, built in begun:
                    contestant.reached = fastest < _LONG_MS and not built.cancel()
                begun = [(contestant, built) for contestant, built in begun if contestant.reached]
            if not begun:
                return
            # The first one is what the others are held against; then those that are built.
            awaited = [begun[0][1]] if fastest is None else [built for _, built in begun]
            finished, _ = wait(awaited, _PATIENCE_S, FIRST_COMPLETED)
            turn = next((i for i, (_, built) in enumerate(begun) if built in finished), None)
            if turn is None:
                continue
            contestant, built = begun.pop(turn)
            try:
                contestant.run = contestant.prepare(_result(built, contestant, errors))
                if contestant.run is not None:
                    contestant.sample(1)  # loads kernels; tells nothing about the next run
                    contestant.check()
                    contestant.samples_ms = [contestant.sample(1)]
            except errors as error:
                contestant.fail(error)
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: ThreadPoolExecutor, contestant: Contestant) -> Future[Any]:
    try:
        return pool.submit(contestant.build)
    except RuntimeError:  # the interpreter is ending, or there is no thread to be had
        failed: Future[Any] = Future()
        failed.set_exception(_NoThreadError())
        return failed


def _result(built: Future[Any], contestant: Contestant, errors: Errors) -> Any:
    """What was built; what failed is built again here, as its thread may be what was at fault."""
    # Asked for and not raised: a traceback would hold the callers' tensors, and be held by them.
    if isinstance(built.exception(), (_NoThreadError, *errors)):
        return contestant.build()
    return built.result()


def _look_again(contestants: Sequence[Contestant], errors: Errors) -> None:
    """Threads that built disturbed the first look: others at those that it would drop."""
    for look in range(_LOOKS):
        fastest = _fastest_ms(contestants) or 0.0
        for contestant in contestants:
            time_ms = contestant.time_ms or 0.0
            again = contestant.host_limits or (look == 0 and time_ms < _LONG_MS)
            if again and time_ms > _DROP_FACTOR * fastest:
                try:
                    contestant.samples_ms = [min(time_ms, contestant.sample(1))]
                except errors as error:
                    contestant.fail(error)


def _fastest_ms(contestants: Sequence[Contestant]) -> float | None:
    return min((t for c in contestants if (t := c.time_ms) is not None), default=None)


def _within(factor: float, contestants: Sequence[Contestant]) -> list[Contestant]:
    """Those that are not slower than the best by more than a factor."""
    limit = factor * (_fastest_ms(contestants) or 0.0)
    return [c for c in contestants if (t := c.time_ms) is not None and t <= limit]


def _sample_in_rounds(
    timed: list[Contestant], order: random.Random, spent: Callable[[], bool], errors: Errors
) -> list[Contestant]:
    """Those that were in the last round."""
    if not timed:
        return timed
    first = {id(c): c.samples_ms[0] for c in timed}
    for number in range(_HOST_ROUNDS):
        rounds, sure = _rounds(timed)
        if number >= rounds or (number >= sure and spent()):
            break
        for contestant in order.sample(timed, len(timed)):
            try:
                sample_ms = contestant.sample(_runs(first[id(contestant)]))
            except errors as error:
                contestant.fail(error)
                continue
            if number == 0:
                contestant.samples_ms.clear()  # a single run says less than many back to back
            contestant.samples_ms.append(sample_ms)
        timed = _within(_leave_factor(timed, number + 1), timed)
    return timed


def _runs(time_ms: float) -> int:
    """How many runs are a sample."""
    wanted_ms = _HOST_SAMPLE_MS if time_ms <= _HOST_MS else _SAMPLE_MS
    return max(1, min(_MAX_RUNS, round(wanted_ms / max(time_ms, 1e-3))))


def _rounds(timed: Sequence[Contestant]) -> tuple[int, int]:
    """How many rounds, and how many of them whatever the budget."""
    fastest, host_limits = _fastest_ms(timed) or 0.0, _host_limits(timed)
    rounds = _HOST_ROUNDS if host_limits else _ROUNDS
    if host_limits and fastest <= _CACHE_MS:
        return rounds, rounds  # they take milliseconds
    return rounds, _SURE_ROUNDS if fastest < _LONG_MS else 0


def _host_limits(timed: Sequence[Contestant]) -> bool:
    return any(contestant.host_limits for contestant in timed)


def _leave_factor(timed: Sequence[Contestant], samples: int = _HOST_ROUNDS) -> float:
    if not _host_limits(timed):
        return _LEAVE_FACTOR
    # Where the host limits, what else it does may be all that a few samples show.
    if samples < _HOST_JUDGED:
        return math.inf
    return CLOSE if samples >= _ROUNDS else 2 * CLOSE


def _sample_device(
    close: list[Contestant],
    order: random.Random,
    errors: Errors,
    flush: Callable[[], object],
    least: float = math.inf,
) -> float:
    """Time on the device alone those that the host, or the cache, may show in a wrong light.

    Those that are far behind ``least``, of others, or the best of these leave after two samples.
    Returns the least of all.
    """
    for number in range(_DEVICE_SAMPLES):
        for contestant in order.sample(close, len(close)):
            try:
                contestant.device_samples_ms.append(contestant.sample_device(flush))
            except TorchOutOfMemoryError:  # what empties the cache holds some: it has run before
                contestant.device_samples_ms.clear()
            except errors as error:
                contestant.fail(error)
        close = [c for c in close if c.device_ms is not None]
        least = min((least, *(c.device_ms or math.inf for c in close)))
        if number > 0:  # a single one may be disturbed
            close = [c for c in close if (c.device_ms or math.inf) <= _LEAVE_FACTOR * least]
    return least


def _flush(errors: Errors) -> Callable[[], object]:
    """What fills the device's cache with something else; without memory for it, nothing."""
    try:
        return torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_
    except errors:
        return lambda: None
