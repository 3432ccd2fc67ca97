"""Options, the header, skipping without a GPU, clean switches, and the record of a gpu run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from code_hash import code_hash
from dgrad import _ops, measure
from dgrad import config as dgrad_config
from dgrad._layers import DIRECTIONS
from dgrad.bench import environment
from dgrad.config import PROVIDERS
from reference import Case, pytorch_tf32, random_case, set_pytorch_tf32

_TESTS = Path(__file__).resolve().parent
_RESULTS = _TESTS / "results"
_DEFAULT_SEED = 20260117
_MEASURE_BUDGET_S = 0.004  # of a problem
_USUAL_S = 0.5  # what a gpu test takes that is not marked


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dgrad")
    group.addoption(
        "--seed",
        type=int,
        default=_DEFAULT_SEED,
        help=f"of the random problems of the sweep (default {_DEFAULT_SEED})",
    )
    group.addoption(
        "--repro",
        metavar="ID|JSON",
        help="run one problem of the sweep alone: its number under --seed, or its JSON",
    )
    group.addoption(
        "--provider",
        choices=PROVIDERS,
        help="let only this provider's candidates run in the gpu tests that force none; tests "
        "whose processes it does not reach are left out",
    )
    group.addoption(
        "--part",
        type=_part,
        metavar="K/N",
        help="run the K-th of N parts of the gpu tests; `python tests/merge_gpu.py` makes one "
        "record of all. The last one has the tests that want the GPU for themselves: to be run "
        "after the others",
    )


def pytest_configure(config: pytest.Config) -> None:
    text = config.getoption("repro")
    if text is not None:
        config.stash[_REPRO] = _parse_repro(text, config.getoption("seed"))
    config.pluginmanager.register(_Record(config), "dgrad-gpu-record")


def _part(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"{text}: expected K/N, K from 1 to N")
    return int(number), int(count)


def in_part(costs: list[float], number: int, count: int) -> list[bool]:
    """Which of the tests, by their seconds, are in a part: each goes to the least filled one."""
    filled = [0.0] * count
    chosen = []
    for cost in costs:
        least = filled.index(min(filled))
        filled[least] += cost
        chosen.append(least == number - 1)
    return chosen


_REPRO = pytest.StashKey[Case]()


def _parse_repro(text: str, seed: int) -> Case:
    if text.strip().removeprefix("sweep-").isdecimal():
        return random_case(seed, int(text.strip().removeprefix("sweep-")))
    try:
        return Case.from_json(text)
    except (TypeError, ValueError) as error:
        raise pytest.UsageError(f"--repro {text}: {error}") from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with a parameter ``swept`` runs once for each problem of the sweep."""
    if "swept" not in metafunc.fixturenames:
        return
    repro = metafunc.config.stash.get(_REPRO, None)
    if repro is not None:
        metafunc.parametrize("swept", [repro], ids=["repro"])
        return
    count = metafunc.module.SWEEP_SIZE
    seed = metafunc.config.getoption("seed")
    cases = [random_case(seed, index) for index in range(count)]
    metafunc.parametrize("swept", cases, ids=[f"sweep-{index}" for index in range(count)])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.stash.get(_REPRO, None) is not None:
        alone = [item for item in items if "swept" in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=[item for item in items if item not in alone])
        items[:] = alone
    if config.getoption("provider") is not None:
        items[:] = [item for item in items if item.get_closest_marker("processes") is None]
    part = config.getoption("part")
    if part is not None:
        of_gpu = [item for item in items if item.get_closest_marker("gpu") is not None]
        alone = [item for item in of_gpu if item.get_closest_marker("alone") is not None]
        number, count = part
        if alone and count > 1:
            of_gpu = [item for item in of_gpu if item not in alone]
            count -= 1
        costs = [_cost_s(item) for item in of_gpu]
        order = sorted(range(len(of_gpu)), key=lambda i: -costs[i])  # the long ones first
        kept = in_part([costs[i] for i in order], number, count)
        items[:] = [of_gpu[i] for i, keep in sorted(zip(order, kept, strict=True)) if keep]
        if number > count:
            items[:] = alone
    reason = dgrad.unavailable_reason()
    if reason is not None:
        skip = pytest.mark.skip(reason=f"dgrad cannot run on a GPU here: {reason}")
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(skip)


def _cost_s(item: pytest.Item) -> float:
    marker = item.get_closest_marker("seconds")
    return float(marker.args[0]) if marker is not None else _USUAL_S


def pytest_report_header(config: pytest.Config) -> list[str]:
    versions = environment.versions()
    shown = ("dgrad", "torch", "cuda", "driver", "cudnn_loaded", "cudnn_compiled")
    lines = [", ".join(f"{name} {versions[name]}" for name in shown)]
    devices = ", ".join(str(device["name"]) for device in environment.devices())
    lines.append(f"devices: {devices or 'none'}; sweep seed {config.getoption('seed')}")
    repro = config.stash.get(_REPRO, None)
    if repro is not None:
        lines.append(f"repro: {repro.to_json()}")
    return lines


@pytest.fixture(autouse=True)
def _no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own store; those of the store name a folder."""
    monkeypatch.setenv("DGRAD_STORE", "off")


@pytest.fixture
def own_store(_no_store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of the test's own, and nothing known of any problem."""
    monkeypatch.setenv("DGRAD_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("DGRAD_LOG_FILE", raising=False)
    dgrad.plan_cache.clear()
    yield tmp_path / "store"
    dgrad.plan_cache.clear()


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., str]:
    """Write a file: text, a list as JSON, or JSON lines."""

    def write(content: str | list[Any], name: str = "what.json") -> str:
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return str(path)

    return write


@pytest.fixture(autouse=True)
def _switches_as_before() -> Iterator[None]:
    """Each test may change the global switches of PyTorch and dgrad; none passes them on."""
    cudnn = torch.backends.cudnn
    names = ("enabled", "benchmark", "deterministic")
    before = {name: getattr(cudnn, name) for name in names}
    tf32 = pytorch_tf32()
    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    flags = dgrad_config._base
    max_size = dgrad.plan_cache.max_size
    yield
    for name, value in before.items():
        if getattr(cudnn, name) != value:
            setattr(cudnn, name, value)
    if pytorch_tf32() != tf32:
        set_pytorch_tf32(tf32)
    torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
    dgrad_config._base = dgrad_config._flags = flags
    dgrad.plan_cache.max_size = max_size


@pytest.fixture(autouse=True)
def _chosen_fast(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _switches_as_before: None
) -> None:
    """The gpu tests meet thousands of problems: little time for each, and what --provider says."""
    if request.node.get_closest_marker("gpu") is not None:
        provider = request.config.getoption("provider")
        algorithm = dict.fromkeys(DIRECTIONS, provider) if provider else None
        dgrad.set_flags(measure_budget=_MEASURE_BUDGET_S, algorithm=algorithm)
        monkeypatch.setattr(measure, "_AHEAD", 2)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler take dgrad's operators for CPU tensors too; PyTorch's run inside."""
    real = _ops.unsuitable

    def unsuitable(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
        return real(input, weight, bias) if input.is_cuda or input.numel() == 0 else None

    monkeypatch.setattr(_ops, "unsuitable", unsuitable)


# --- the record of a gpu run --------------------------------------------------------------------


class _Record:
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
