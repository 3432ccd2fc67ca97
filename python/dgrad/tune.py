"""Selecting ahead: all problems of a log, of a list of layers or of a model, for the store.

What the store has already is not measured again, so an interrupted run is simply repeated.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import _loader, config
from ._layers import DIRECTIONS, layers, run_problem
from ._watch import watching
from .bench._model_file import WorkerError, unreadable
from .exceptions import TorchOutOfMemoryError, first_line
from .explain import warm_up
from .selection import PROBLEM_FIELDS, Selection

_SEED = 42
_Call = Callable[[], object]


class FileError(Exception):
    """The file holds nothing to select for. The message says why."""


# --- what a file holds --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Entry:
    """One thing to select for: a parsed JSON value, why it could not be parsed, or a model's file.

    `where` says where in the file it stands.
    """

    where: str
    value: object


def read(file: str) -> list[Entry]:
    """The entries of a log of JSON lines, of a JSON list of layers, or of a KernelBench-style .py.

    Raises FileError for a file that cannot be read or holds no entry. A bad line among good ones
    is an entry too, which fails when its turn comes.
    """
    if (reason := unreadable(file)) is not None:
        raise FileError(f"{file}: {reason}")
    path = Path(file)
    if path.suffix == ".py":
        return [Entry(path.name, path)]
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            return _listed(json.loads(text), file)
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(f"{file}: {error}") from error
    entries = [
        Entry(f"line {number}", _parsed(line))
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip()
    ]
    if not any(isinstance(entry.value, dict) for entry in entries):
        raise FileError(
            f"{file}: expected a JSON list of layers, one JSON object a line, or a file named *.py"
        )
    return entries


def _listed(values: list[Any], file: str) -> list[Entry]:
    if not values:
        raise FileError(f"{file}: the list is empty")
    names = [value.get("name") if isinstance(value, dict) else None for value in values]
    return [
        Entry(f"entry {number} ({name})" if name else f"entry {number}", value)
        for number, (name, value) in enumerate(zip(names, values, strict=True), start=1)
    ]


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON: {error}")


# --- what an entry runs -------------------------------------------------------------------------


def _calls(entry: Entry, backward: bool, device: int) -> list[_Call]:
    """What to run for an entry. Raises FileError for a model, others for a bad entry."""
    value = entry.value
    if isinstance(value, Exception):
        raise value
    if isinstance(value, Path):
        return [_model(value, backward, device)]
    if not isinstance(value, dict):
        raise ValueError(f"expected a layer or a record of a selection, not {value!r:.80}")
    if "problem" in value:
        return [*_recorded(value["problem"], backward, device)]
    directions = DIRECTIONS if backward else DIRECTIONS[:1]
    return [partial(layer.explain, directions) for layer in layers(value)]


def _recorded(fields: object, backward: bool, device: int) -> Iterator[_Call]:
    """The calls for a record's problem, with `backward` for the layer's other directions too."""
    if not isinstance(fields, dict) or fields.keys() != set(PROBLEM_FIELDS):
        raise ValueError(f"problem is not an object of {', '.join(PROBLEM_FIELDS)}")
    make = _loader.require().Problem
    own = fields["direction"]
    others = [direction for direction in DIRECTIONS if backward and direction != own]
    for direction in (own, *others):
        try:
            bias = fields["bias"] if direction == own else False
            changed = {"device": device, "direction": direction, "bias": bias}
            problem = make(**{**fields, **changed})
        except TypeError as error:
            raise ValueError("problem has a field of a wrong type") from error
        yield partial(run_problem, problem)


def _model(path: Path, backward: bool, device: int) -> _Call:
    from .bench._worker import Contestant, Request

    contestant = Contestant(Request("dgrad", str(path), f"cuda:{device}", _SEED, full_size=True))
    try:
        contestant.load()
        model, inputs = contestant.build(swap=True)
    except WorkerError as error:
        raise FileError(f"{path}: {error}") from error
    return partial(warm_up, model, *inputs, backward=backward)


# --- all entries --------------------------------------------------------------------------------


class Tuning:
    """Selects for entries one by one and counts what came of it.

    Args:
        selection: "measure" or "exhaustive".
        backward: select for the gradients too.
        device: index of the GPU, which must be the current one.

    Attributes:
        failures (list of (str, str)): where, and why.
    """

    def __init__(self, selection: str = "exhaustive", backward: bool = False, device: int = 0):
        self._flags = {"selection": selection, "fallback": "error"}
        self._backward, self._device = backward, device
        self._begin = time.perf_counter()
        self._sources: dict[Any, str] = {}  # by problem
        self.failures: list[tuple[str, str]] = []

    def add(self, entry: Entry) -> list[tuple[str, str]]:
        """Select all problems of an entry; what failed of it. FileError for a wrong model."""
        before = len(self.failures)
        try:
            calls = _calls(entry, self._backward, self._device)
        except (RuntimeError, TypeError, ValueError) as error:
            self._fail(entry, error)
            return self.failures[before:]
        for call in calls:
            self._run(entry, call)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # cuDNN loads its kernels into what PyTorch leaves free
        return self.failures[before:]

    def _run(self, entry: Entry, call: _Call) -> None:
        with watching() as events, config.flags(**self._flags):
            try:
                call()
            except Exception as error:  # whatever a model raises
                self._fail(entry, error)
            except SystemExit as error:  # of a model too
                self._fail(entry, RuntimeError(f"SystemExit: {error}"))
        for event in events:
            if isinstance(event, Selection):
                self._sources.setdefault(event.problem, event.source)

    def _fail(self, entry: Entry, error: Exception) -> None:
        text = first_line(error)
        memory = isinstance(error, TorchOutOfMemoryError) and "out of memory" not in text
        self.failures.append((entry.where, f"out of memory: {text}" if memory else text))

    def summary(self) -> dict[str, Any]:
        """Plain data: how many problems were new (measured now), known (stored) and alone (with
        one usable candidate, so nothing to measure), the failures, and the seconds it took."""
        sources = list(self._sources.values())
        return {
            "problems": len(sources),
            "new": sources.count("measured"),
            "known": sources.count("stored"),
            "alone": sources.count("heuristic"),
            "failed": [{"where": where, "reason": reason} for where, reason in self.failures],
            "seconds": round(time.perf_counter() - self._begin, 3),
        }
