"""The record of a gpu run: results/gpu.json."""

from __future__ import annotations

import json
import os
import platform
import shlex
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch

from code_hash import code_hash
from dgrad.bench import environment

_TESTS = Path(__file__).resolve().parent
_RESULTS = _TESTS / "results"


class Record:
    """Writes results/gpu.json after a run of all gpu tests; part of them leaves it as it is.

    With --provider it is results/gpu-PROVIDER.json, with --part a file for merge_gpu.py.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._selected: list[str] = []
        self._outcomes: dict[str, str] = {}
        self._ran: set[str] = set()
        self._duration_s = 0.0
        self._is_partial = not _covers_all_tests(config)

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        if any(item.get_closest_marker("gpu") is not None for item in items):
            self._is_partial = True

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._is_partial = True

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._selected = [
            item.nodeid for item in session.items if item.get_closest_marker("gpu") is not None
        ]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if "gpu" not in report.keywords:
            return
        self._duration_s += report.duration
        if report.when == "call" and not report.skipped:
            self._ran.add(report.nodeid)
        if report.failed or report.when == "call" or report.skipped:
            worst = self._outcomes.get(report.nodeid) == "failed"
            self._outcomes[report.nodeid] = "failed" if worst else report.outcome

    def pytest_sessionfinish(self) -> None:
        if self._is_partial or not self._ran or len(self._outcomes) != len(self._selected):
            return
        record = _RESULTS / f"{self._name()}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        unfinished = record.with_suffix(".tmp")
        unfinished.write_text(json.dumps(self._to_dict(), indent=1) + "\n")
        os.replace(unfinished, record)

    def _name(self) -> str:
        provider, part = (self._config.getoption(name) for name in ("provider", "part"))
        name = f"gpu-{provider}" if provider else "gpu"
        return f"{name}.part-{part[0]}-of-{part[1]}" if part else name

    def _to_dict(self) -> dict[str, Any]:
        versions = environment.versions()
        outcomes = list(self._outcomes.values())
        return {
            "device": torch.cuda.get_device_name(0),
            "driver": versions["driver"],
            "cuda": versions["cuda"],
            "cudnn": versions["cudnn_loaded"],
            "cudnn_compiled": versions["cudnn_compiled"],
            "pytorch": versions["torch"],
            "python": platform.python_version(),
            "dgrad": versions["dgrad"],
            "command": _command(self._config),
            "passed": outcomes.count("passed"),
            "failed": outcomes.count("failed"),
            "skipped": outcomes.count("skipped"),
            "failures": [name for name, outcome in self._outcomes.items() if outcome == "failed"],
            "duration_s": round(self._duration_s, 1),
            "seed": self._config.getoption("seed"),
            "code_hash": code_hash(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def _covers_all_tests(config: pytest.Config) -> bool:
    """Whether the command line leaves no test file out; the deselected ones are told apart later.

    Some options leave tests out while they are collected, and no hook tells of them.
    """
    if any(config.getoption(name, None) for name in ("ignore", "ignore_glob", "lf", "collectonly")):
        return False
    paths = [config.invocation_params.dir / argument for argument in config.args]
    return any("::" not in str(path) and _TESTS.is_relative_to(path.resolve()) for path in paths)


def _command(config: pytest.Config) -> str:
    """The command line, without the folders of this machine."""
    words = []
    for word in map(str, config.invocation_params.args):
        path = Path(word)
        if path.is_absolute():
            inside = path.is_relative_to(config.rootpath)
            word = str(path.relative_to(config.rootpath)) if inside else path.name
        words.append(word)
    return shlex.join(["pytest", *words])
