"""Run a model with PyTorch's layers and with dgrad's: equal outputs, and which is faster?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import dgrad
from dgrad.bench._worker import Request
from dgrad.bench.timing import Timing

_SEED = 42
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
    `float64_errors`, where the outputs differ, is how far "pytorch" and "dgrad" are from float64.
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

    `file` is in KernelBench's format; None means dgrad.bench.default_model. `budget_s` is the time
    spent on timed runs of each contestant. On the CPU the batch is cut to 1 unless `full_size`.
    `selection` is dgrad's flag of that name. With `training` a step is timed, forward and backward
    of the sum of squares, and the gradients of all parameters are compared too. The rest of the
    model with dgrad's layers has the setting with which PyTorch was faster.
    Raises FileError for a wrong file or device, CompareError where a contestant failed or died.
    """
    where = _device(device)
    if file is not None and not Path(file).is_file():
        raise FileError(f"{file}: no such file")
    results: dict[str, dict[str, Any]] = {}
    timings: dict[str, Timing] = {}
    for setting in _WHO:
        benchmark = setting == "pytorch_benchmark" or (
            setting == "dgrad"
            and timings["pytorch_benchmark"].median_ms < timings["pytorch"].median_ms
        )
        request = Request(
            setting, file, str(where), seed, budget_s, full_size, selection, training, benchmark
        )
        results[setting] = _run_worker(request)
        timings[setting] = Timing(**results[setting].pop("timing"))
    shares = {name: result.pop("share") for name, result in results.items()}
    return Comparison(
        file=file,
        training=training,
        device=str(where),
        pytorch=timings["pytorch"],
        pytorch_benchmark=timings["pytorch_benchmark"],
        dgrad=timings["dgrad"],
        shares=shares,
        **results["dgrad"],
    )


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


def _run_worker(request: Request) -> dict[str, Any]:
    who = f"{request.file or 'built-in model'}: {_WHO[request.setting]}"
    with tempfile.TemporaryDirectory(prefix="dgrad-compare-") as folder:
        question, answer = Path(folder, "request.json"), Path(folder, "result.json")
        question.write_text(json.dumps(asdict(request)))
        command = [sys.executable, "-m", "dgrad.bench._worker", str(question), str(answer)]
        # the worker finds the same packages as this process, however it found them
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            text=True,
            errors="replace",
        )
        if process.returncode != 0 or not answer.is_file():
            tail = "\n".join(process.stderr.splitlines()[-_TAIL_LINES:])
            raise CompareError(f"{who}: its process {_end(process.returncode)}\n{tail}".rstrip())
        result: dict[str, Any] = json.loads(answer.read_text())
    if "error" in result:
        raise (FileError if result["fault"] == "file" else CompareError)(
            f"{who}: {result['error']}"
        )
    return result


def _end(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
