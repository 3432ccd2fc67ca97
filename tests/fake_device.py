"""A GPU that is pretended: its name, and a clock that the runs themselves advance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dgrad import measure as measuring
from dgrad.measure import Contestant, measure

ROUNDS = 5
HOST_ROUNDS = 9

Time = float | Callable[[int], float]


def pretend_name(monkeypatch: pytest.MonkeyPatch, name: str = "NVIDIA Pretended 1") -> None:
    """Let every GPU be of this name, for the store."""
    properties = SimpleNamespace(name=name, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


class Failure(Exception):
    pass


class Device:
    """A GPU on which each run takes what it is told to, and nothing else takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms = 0.0
        self.host_now_ms = 0.0
        self.held = False  # then the host does not limit
        self.cold = False  # nothing of a run's tensors is in the cache
        self.memory = True
        self.events: list[str] = []
        self.holds_ms: list[float] = []
        cuda = SimpleNamespace(Event=lambda enable_timing: FakeEvent(self), _sleep=self.hold)
        fake = SimpleNamespace(cuda=cuda, empty=self.empty, uint8=None)
        monkeypatch.setattr(measuring, "torch", fake)
        clock = SimpleNamespace(perf_counter=lambda: self.host_now_ms / 1e3)
        monkeypatch.setattr(measuring, "time", clock)
        monkeypatch.setattr(measuring, "_AHEAD", 1)

    def hold(self, cycles: int) -> None:
        self.held = True
        self.holds_ms.append(cycles / measuring._CYCLES_PER_MS)
        self.events.append("hold")

    def empty(self, size: int, dtype: object, device: str) -> Any:
        if not self.memory:
            raise Failure("no memory")
        return SimpleNamespace(zero_=self.flush)

    def flush(self) -> None:
        assert self.held
        self.now_ms += 0.07
        self.cold = True

    def contestant(
        self,
        name: str,
        time_ms: Time,
        *,
        device_ms: Time | None = None,
        host_ms: Time = 0.0,
        cold_ms: float = 0.0,
        check: Callable[[], None] = lambda: None,
    ) -> Contestant:
        """One whose runs take so many milliseconds; a function is given the number of the run.

        On the device alone they take ``device_ms``, or the same; ``cold_ms`` more out of its cache.
        To queue a run takes the host ``host_ms``.
        """
        runs = 0

        def of(time_ms: Time) -> float:
            return time_ms(runs) if callable(time_ms) else time_ms

        def run() -> None:
            nonlocal runs
            self.events.append(name)
            self.now_ms += of(time_ms if device_ms is None or not self.held else device_ms)
            self.now_ms += cold_ms if self.cold else 0.0
            self.host_now_ms += of(host_ms)
            self.cold = False
            runs += 1

        def prepare(built: object) -> Callable[[], None]:
            assert built == f"plan of {name}"
            self.events.append(f"prepare {name}")
            return run

        return Contestant(lambda: f"plan of {name}", prepare, check)

    def count(self, name: str) -> int:
        return self.events.count(name)


class FakeEvent:
    def __init__(self, device: Device) -> None:
        self._device = device
        self._at_ms = 0.0

    def record(self) -> None:
        self._at_ms = self._device.now_ms

    def synchronize(self) -> None:
        self._device.held = False
        self._device.host_now_ms = self._device.now_ms

    def elapsed_time(self, end: FakeEvent) -> float:
        return end._at_ms - self._at_ms


def time(contestants: Sequence[Contestant], budget_s: float | None = None) -> list[float | None]:
    measure([*contestants], budget_s, (Failure,))
    return [c if c is None else round(c, 9) for c in (each.time_ms for each in contestants)]


def rounds(contestant: Contestant) -> int:
    """How many rounds it took part in, where it was timed."""
    return len(contestant.samples_ms)
