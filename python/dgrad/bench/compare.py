"""Run a model with PyTorch's layers and with dgrad's: equal outputs, and which is faster?"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

import dgrad
from dgrad.bench._model_file import unreadable
from dgrad.bench._process import Failure, Process
from dgrad.bench._worker import Request
from dgrad.bench.timing import Timing

_SEED = 42
_TURNS = 25  # a fifth of them only for PyTorch, see _samples
_LEAST_TURNS = 5
_BUDGET_S = 1.0
_TAIL_LINES = 15
_WHO = {
    "pytorch": "PyTorch",
    "pytorch_benchmark": "PyTorch with benchmark on",
    "dgrad": "dgrad",
}


class CompareError(Exception):
    """No comparison was made. The message says why; `exit_code` is the command's."""

    exit_code = 3


class FileError(CompareError):
    """The compared file, or what was asked, is wrong."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Comparison:
    """The answer of one comparison: plain data.

    `max_abs_diff` is None where the outputs cannot be subtracted or the difference is not finite.
    `float64_errors`, where the outputs or gradients differ, is how far "pytorch" and "dgrad" are
    from float64.
    `shares` are the parts, from 0 to 1, of each contestant's time that pass in its transposed
    convolutions. `ratio` is the better of PyTorch's two medians divided by dgrad's: above 1 dgrad
    is faster.
    """

    file: str | None
    training: bool
    device: str
    device_name: str
    dtype: str | None
    layers: int
    equal: bool
    max_abs_diff: float | None
    tolerance: float | None
    differences: list[str]
    float64_errors: dict[str, float] | None
    pytorch: Timing
    pytorch_benchmark: Timing
    dgrad: Timing
    shares: dict[str, float]
    selected: list[str]
    notes: list[str]
    versions: dict[str, str | None]

    @property
    def ratio(self) -> float:
        best_ms = min(self.pytorch.median_ms, self.pytorch_benchmark.median_ms)
        return best_ms / self.dgrad.median_ms

    def to_dict(self) -> dict[str, Any]:
        """What `compare --json` prints."""
        result = asdict(self)
        timings = {name: result.pop(name) for name in _WHO}
        for name, timing in timings.items():
            result[f"{name}_ms"] = timing.pop("median_ms")
        return {**result, "spreads": timings, "ratio": self.ratio}


def compare(
    file: str | None = None,
    *,
    device: str | None = None,
    seed: int = _SEED,
    budget_s: float | None = None,
    full_size: bool = False,
    selection: str | None = None,
    training: bool = False,
) -> Comparison:
    """Compare on `device` (default: the GPU, else the CPU), each contestant in a fresh process.

    All hold the model at once and are timed in short turns. `file` is in KernelBench's format;
    None means dgrad.bench.default_model. `budget_s` is the time spent on runs of each contestant
    (default 1). On the CPU the batch is cut to 1, and dgrad.bench.default_model has a smaller
    image too, unless `full_size`. `selection` is dgrad's flag of that name. With `training` a step
    is timed, forward, backward of the sum of squares and SGD's update, and the gradients of all
    parameters are compared too. The rest of the model with dgrad's layers has the setting with
    which PyTorch was faster in the first turns.
    Raises FileError for a wrong file or device, CompareError where a contestant failed or died.
    """
    where = _device(device)
    if file is not None and (reason := unreadable(file)) is not None:
        raise FileError(f"{file}: {reason}")
    workers = {
        name: _Worker(Request(name, file, str(where), seed, full_size, selection, training))
        for name in _WHO
    }
    shares = {}
    try:
        for worker in workers.values():  # all together: each takes seconds
            worker.start()
        samples = _samples(workers, _BUDGET_S if budget_s is None else budget_s)
        for name, worker in workers.items():
            result = worker.ask("finish")
            shares[name] = result.pop("share")
            worker.stop()  # what checks the outputs makes more models
    finally:
        for worker in workers.values():
            worker.stop(kindly=False)
    return Comparison(
        file=file,
        training=training,
        device=str(where),
        shares=shares,
        pytorch=Timing.from_samples(samples["pytorch"]),
        pytorch_benchmark=Timing.from_samples(samples["pytorch_benchmark"]),
        dgrad=Timing.from_samples(samples["dgrad"]),
        **result,
    )


class _Worker(Process):
    """A contestant, whose failures are those of the comparison."""

    def __init__(self, request: Request) -> None:
        words = json.dumps(asdict(request))
        super().__init__("dgrad.bench._worker", words, last_lines=_TAIL_LINES)
        self._what = request.file or "built-in model"
        self._who = _WHO[request.setting]

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        try:
            return super().ask(do, **fields)
        except Failure as failure:
            if failure.fault == "file":  # the same whoever runs it
                raise FileError(f"{self._what}: {failure}") from failure
            raise CompareError(f"{self._what}: {self._who}: {failure}") from failure


def _samples(workers: Mapping[str, Process], budget_s: float) -> dict[str, list[float]]:
    """Each one's times in milliseconds, taken in turn: what slows the machine hits all alike.

    The turns are many and short, as a machine may be slow for a second. PyTorch's first ones say
    which setting dgrad's model has; they are left out, as none of dgrad's lie between them.
    """
    *peers, ours = workers
    prepared = [workers[name].ask("prepare", benchmark="benchmark" in name) for name in peers]
    run_s = max(answer["run_s"] for answer in prepared)
    # No more than runs that fit: each turn has one at least, however long it takes.
    turns = max(_LEAST_TURNS, min(_TURNS, int(budget_s / run_s)))
    first = turns // 5

    def take(names: list[str], turns_taken: int) -> dict[str, list[float]]:
        samples: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(turns_taken):
            for name in names[:: -1 if turn % 2 else 1]:
                answer = workers[name].ask("sample", seconds=budget_s / turns)
                samples[name] += answer["samples_ms"]
        return samples

    tried = take(peers, first)
    faster = min(peers, key=lambda name: statistics.median(tried[name]))
    workers[ours].ask("prepare", benchmark="benchmark" in faster)
    return take([*workers], turns - first)


def _device(wanted: str | None) -> torch.device:
    usable = torch.cuda.is_available()
    try:
        device = torch.device(wanted or ("cuda" if usable else "cpu"))
    except RuntimeError as error:
        raise FileError(f"--device {wanted}: {error}") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise FileError(f"--device {wanted}: expected cpu, cuda or cuda:N")
    if not usable:
        raise FileError(f"--device {wanted}: PyTorch finds no GPU here")
    if (device.index or 0) >= torch.cuda.device_count():
        raise FileError(f"--device {wanted}: there are {torch.cuda.device_count()} GPUs here")
    if not dgrad.is_available():
        # PyTorch would run in dgrad's layers too, and the comparison would say nothing
        raise CompareError(
            f"dgrad cannot run on the GPU here: {dgrad.unavailable_reason()} "
            "(--device cpu compares on the CPU)"
        )
    return torch.device("cuda", device.index or 0)
