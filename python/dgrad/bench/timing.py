"""Fair timing of a callable: warmed up, many runs, median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

_MAX_RUNS = 400  # of one sample, of which `compare` takes 25
# A CPU run of a large layer takes seconds, and its first run already pays for all that is lazy.
_WARM_UP_RUNS = {"cuda": 3, "cpu": 1}
_WARM_UP_S = {"cuda": 0.2, "cpu": 0.05}
_LEAST_RUNS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Median, quartiles and minimum of the time of one run, in milliseconds."""

    median_ms: float
    q1_ms: float
    q3_ms: float
    min_ms: float
    runs: int

    @classmethod
    def from_samples(cls, samples_ms: Sequence[float]) -> Timing:
        """Summarise at least one sample; raises ValueError without any."""
        if not samples_ms:
            raise ValueError("samples_ms is empty: expected at least one time in milliseconds")
        if len(samples_ms) == 1:
            q1 = median = q3 = samples_ms[0]
        else:
            q1, median, q3 = statistics.quantiles(samples_ms, n=4, method="inclusive")
        return cls(median, q1, q3, min(samples_ms), len(samples_ms))

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


class Sampler:
    """Times a call on `device` as often as it is asked to; the first calls warm it up, each time.

    On a GPU each run lies between two CUDA events on the current stream, and nothing waits between
    the runs; the time is the device's, plus what the host could not hide. On the CPU it is wall
    time.

    The caches are not flushed between runs: a problem that fits the GPU's L2 is timed warm, for
    each contestant alike.

    Attributes:
        run_s (float): about how long a run takes.
    """

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        self._call, self._device = call, device
        self._kind = "cuda" if device.type == "cuda" else "cpu"
        self.run_s = _warm_up(call, device, _WARM_UP_RUNS[self._kind], _WARM_UP_S[self._kind])

    def sample(self, seconds: float, least: int = 1) -> list[float]:
        """Milliseconds of each run, in about so many seconds; of `least` runs even past them.

        A quarter of the time warms up what another process has cooled down since: the clocks and
        the caches. Where fewer than four runs fit, each is long enough to do so by itself.
        """
        runs = max(least, int(seconds / max(self.run_s, 1e-9)))
        cold = min(_MAX_RUNS, runs // 4)
        sample = _sample_cuda if self._kind == "cuda" else _sample_cpu
        return sample(self._call, self._device, cold, min(_MAX_RUNS, runs - cold))


def measure(call: Callable[[], object], device: torch.device, *, budget_s: float) -> Timing:
    """What a :class:`Sampler` says in about `budget_s` seconds; at least three runs."""
    return Timing.from_samples(Sampler(call, device).sample(budget_s, _LEAST_RUNS))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _warm_up(
    call: Callable[[], object], device: torch.device, min_runs: int, min_s: float
) -> float:
    """Run until both limits are passed; return the seconds that one run took."""
    call()  # the first run also selects, compiles and allocates: it says nothing about the others
    _synchronize(device)
    begin = time.perf_counter()
    runs, elapsed_s = 0, 0.0
    while runs < min_runs or elapsed_s < min_s:
        call()
        _synchronize(device)
        runs += 1
        elapsed_s = time.perf_counter() - begin
    return elapsed_s / runs


def _sample_cuda(
    call: Callable[[], object], device: torch.device, cold: int, runs: int
) -> list[float]:
    event: Callable[..., Any] = torch.cuda.Event  # without type hints in PyTorch
    with torch.cuda.device(device):
        events = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(runs)]
        torch.cuda.synchronize(device)
        for _ in range(cold):
            call()  # nothing waits here either: the queue is as full as it will be
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        return [float(start.elapsed_time(end)) for start, end in events]


def _sample_cpu(
    call: Callable[[], object], device: torch.device, cold: int, runs: int
) -> list[float]:
    samples_ms = []
    for _ in range(cold):
        call()
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        samples_ms.append((time.perf_counter() - begin) * 1e3)
    return samples_ms
