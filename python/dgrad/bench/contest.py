"""PyTorch's settings and dgrad against each other, case by case, each in a process of its own.

Each contestant keeps its process for the whole run, so that what PyTorch's caches hold under one
setting never serves another. All hold a case at once and are asked for samples in turn, in
alternating order: what the GPU's clock does hits all alike. Only one of them works at any time.

Note [Selector]
dgrad selects in one process and is timed in another, which has the selection from the store, as any
later process of a user has it. In a process that has selected each kernel takes longer to begin, on
an H200 by up to 0.35 us; most likely as a selection loads hundreds of them.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from dgrad import store
from dgrad.bench._process import Failure, Process
from dgrad.bench.suite import Case
from dgrad.bench.timing import Timing

PEERS = ("torch", "torch-benchmark", "torch-compile")
SELECTIONS = ("measure", "exhaustive", "heuristic")
OURS = "dgrad"
_MODULE = "dgrad.bench._bench_worker"
_PATIENCE_S = 900.0  # for one answer: compiling and exhaustive selection take long
_TIMES = ("device_ms", "eager_ms", "host_us")


class ContestError(Exception):
    """A contestant's process does not start. The message says why."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a run is made; the cases of one record share them.

    Attributes:
        against: the peers: "torch" (cudnn.benchmark off), "torch-benchmark" (on) and
            "torch-compile" (torch.compile in its default mode, cudnn.benchmark on).
        selection: dgrad's flag.
        rounds: how often each contestant is sampled.
        device: "cuda", or "cpu" for a rehearsal: PyTorch's operator runs in all contestants.
    """

    against: tuple[str, ...] = PEERS[:2]
    selection: str = "exhaustive"
    rounds: int = 5
    device: str = "cuda"


class Contest:
    """The contestants of a run. Used in a ``with`` block, at whose end their processes end.

    Raises ContestError where a process does not start.

    Attributes:
        machine (dict): device, driver, versions and tf32, as dgrad's process sees them.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = tempfile.TemporaryDirectory() if store.path() is None else None
        self._workers = {name: self._worker(name) for name in (*settings.against, OURS)}
        self._selector = self._worker(OURS) if settings.device == "cuda" else None
        self.machine: dict[str, Any] = {}

    def _worker(self, name: str) -> Process:
        settings = self._settings
        arguments = name, settings.device, settings.selection
        environment = {"DGRAD_STORE": self._folder.name} if self._folder is not None else None
        return Process(_MODULE, *arguments, patience_s=_PATIENCE_S, environment=environment)

    def __enter__(self) -> Contest:
        try:
            for worker in self._all():  # all together: each takes seconds
                worker.start()
            for name, worker in self._workers.items():
                self.machine = self._must(name, worker, "describe")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop(kindly=error is None)

    def _stop(self, kindly: bool = False) -> None:
        for worker in self._all():
            worker.stop(kindly)
        if self._folder is not None:
            self._folder.cleanup()

    def _all(self) -> list[Process]:
        return [*self._workers.values(), *([] if self._selector is None else [self._selector])]

    def _must(self, name: str, worker: Process, do: str, **fields: Any) -> dict[str, Any]:
        try:
            return worker.ask(do, **fields)
        except Failure as failure:
            raise ContestError(f"{name}: {failure}") from failure

    def ceilings(self, dtypes: Sequence[str]) -> dict[str, Any]:
        """See :func:`dgrad.bench.roofline.measure_ceilings`; in a process of its own."""
        worker = self._worker("torch")
        try:
            return self._must("ceilings", worker, "ceilings", dtypes=list(dtypes))
        finally:
            worker.stop(kindly=False)  # it has answered, or nobody waits for that any more

    def run(self, case: Case) -> dict[str, Any]:
        """Time one case; plain data.

        Returns:
            The case's fields; under "selected" what dgrad has chosen; and under "contestants" for
            each either "error", or the times of one call: "device_ms" (median, q1, q3, min and the
            number of runs), "eager_ms" and "host_us" (medians). "calls" is how many were in one
            CUDA graph, and "not_captured" why there was none, or None.
        """
        answers: dict[str, dict[str, Any]] = {}
        errors: dict[str, str] = {}
        samples: dict[str, dict[str, list[float]]] = {}
        for name, worker in self._workers.items():
            try:
                if name == OURS:
                    self._select(case)
                answers[name] = worker.ask("prepare", case=case.to_dict())
                samples[name] = {kind: [] for kind in _TIMES}
            except Failure as failure:
                errors[name] = str(failure)
        for turn in range(self._settings.rounds):
            names = [name for name in samples if name not in errors]
            for name in names if turn % 2 == 0 else reversed(names):
                try:
                    sample = self._workers[name].ask("sample")
                except Failure as failure:
                    errors[name] = str(failure)
                    continue
                for kind, found in samples[name].items():
                    found += sample[kind] if kind == "device_ms" else [sample[kind]]
        for worker in self._workers.values():
            _release(worker)
        return {
            **case.to_dict(),
            "contestants": {
                name: {"error": errors[name]}
                if name in errors
                else _summed_up(samples[name], answers[name])
                for name in self._workers
            },
            "selected": answers.get(OURS, {}).get("selected", []),
        }

    def _select(self, case: Case) -> None:
        """Bring the case's selections into the store, see Note [Selector]. Raises Failure."""
        if self._selector is None:
            return
        try:
            self._selector.ask("select", case=case.to_dict())
        finally:
            _release(self._selector)


def _release(worker: Process) -> None:
    if not worker.running:
        return
    try:
        spoiled = worker.ask("release")["spoiled"]
    except Failure:
        spoiled = True
    if spoiled:
        worker.stop(kindly=False)


def _summed_up(samples: dict[str, list[float]], answer: dict[str, Any]) -> dict[str, Any]:
    timing = Timing.from_samples(samples["device_ms"]).to_dict()
    return {
        "device_ms": {name.removesuffix("_ms"): _short(value) for name, value in timing.items()},
        "eager_ms": _short(statistics.median(samples["eager_ms"])),
        "host_us": _short(statistics.median(samples["host_us"])),
        "calls": answer["calls"],
        "not_captured": answer["not_captured"],
    }


def _short(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.5g}")
