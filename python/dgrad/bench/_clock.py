"""Three times of one call: on the device alone, back to back, and until it returns."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from typing import Any

import torch

_SAMPLE_MS = 2.0  # of device time: far above the resolution of events
_EAGER_MS = 4.0
_HOST_MS = 20.0
_LONG_MS = 50.0  # a call that long is timed once and not thrice
MAX_CALLS = 512  # in one graph
_MAX_EAGER_CALLS = 200
_MAX_HOST_CALLS = 20  # few enough for the queue of the GPU

Call = Callable[[], object]
Sample = dict[str, Any]  # {"device_ms": [float, ...], "eager_ms": float, "host_us": float}


class GraphClock:
    """Times a call on the current CUDA stream, which must not be the default one.

    Device time is that of a CUDA graph of many calls, between events, so that nothing of the host
    is in it. The graph goes round the ``calls``, the same on tensors of their own, so that a call
    finds in the device's cache what it finds there in a model, and not what the last call left.
    Where they cannot be captured, calls back to back take the graph's place.

    Attributes:
        calls (int): how many are in a sample of device time.
        problem (str): why the calls could not be captured, or None.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._all = calls
        self._call = call = calls[0]
        self.problem: str | None = None
        for _ in range(3):  # on the capturing stream, as CUDA graphs ask
            call()
        torch.cuda.synchronize()
        self._eager_ms = self._between(lambda: _repeat(call, 3))[0] / 3
        self.calls = self._count(self._eager_ms)
        try:
            self._batch = self._capture()
            # The host may have been the slower one: then the graph is shorter than it seemed.
            call_ms = self._between(self._batch)[0] / self.calls
            count = self._count(call_ms)
            if count > 2 * self.calls:
                self.calls = count
                self._batch = self._capture()
        except Exception as error:
            # Leaving a failed capture fails too, and hides what failed first.
            words = str(error.__context__ or error).strip().splitlines()
            self.problem = words[0] if words else type(error).__name__
            self._batch = self._round

    def sample(self) -> Sample:
        """Device time a call of each of three samples, then eager and host time of one call."""
        device_ms = [
            each / self.calls for each in self._between(self._batch, 1 if self._long() else 3)
        ]
        runs = _count(_EAGER_MS, self._eager_ms, _MAX_EAGER_CALLS)
        eager_ms = self._between(lambda: _repeat(self._call, runs))[0] / runs
        runs = max(3, _count(_HOST_MS, self._eager_ms, _MAX_HOST_CALLS))
        return {"device_ms": device_ms, "eager_ms": eager_ms, "host_us": self._host_us(runs)}

    def _count(self, call_ms: float) -> int:
        """How many calls take long enough, and go round all there are."""
        return max(_count(_SAMPLE_MS, call_ms, MAX_CALLS), len(self._all))

    def _round(self) -> None:
        for call in islice(cycle(self._all), self.calls):
            call()

    def _long(self) -> bool:
        return self._eager_ms > _LONG_MS

    def _capture(self) -> Call:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            self._round()
        replay: Call = graph.replay
        return replay

    def _between(self, batch: Call, samples: int = 1) -> list[float]:
        """Milliseconds of each run of `batch` between two events.

        An untimed run goes first: while it keeps the GPU busy, the host queues the timed ones.
        """
        event: Callable[..., Any] = torch.cuda.Event  # without type hints in PyTorch
        pairs = [(event(enable_timing=True), event(enable_timing=True)) for _ in range(samples)]
        batch()
        for start, end in pairs:
            start.record()
            batch()
            end.record()
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) for start, end in pairs]

    def _host_us(self, runs: int) -> float:
        torch.cuda.synchronize()
        samples_us = _wall_us(self._call, runs)
        torch.cuda.synchronize()
        return statistics.median(samples_us)


class WallClock:
    """The same for the CPU, where the three times are one."""

    calls = 1
    problem = None

    def __init__(self, calls: Sequence[Call]) -> None:
        self._call = calls[0]
        self._call()

    def sample(self) -> Sample:
        samples_us = _wall_us(self._call, 3)
        middle_us = statistics.median(samples_us)
        device_ms = [each / 1e3 for each in samples_us]
        return {"device_ms": device_ms, "eager_ms": middle_us / 1e3, "host_us": middle_us}


def _repeat(call: Call, times: int) -> None:
    for _ in range(times):
        call()


def _count(wanted_ms: float, call_ms: float, most: int) -> int:
    """How many calls take `wanted_ms`, from 1 to `most`."""
    return max(1, min(most, math.ceil(wanted_ms / max(call_ms, 1e-6))))


def _wall_us(call: Call, runs: int) -> list[float]:
    samples_us = []
    for _ in range(runs):
        begin = time.perf_counter_ns()
        call()
        samples_us.append((time.perf_counter_ns() - begin) / 1e3)
    return samples_us
