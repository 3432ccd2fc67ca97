"""Options, the header, parts, skipping without a GPU, clean switches; the rest: *_fixtures.py."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad import _fallback, _ops, log, measure
from dgrad import config as dgrad_config
from dgrad._layers import DIRECTIONS
from dgrad.bench import environment
from dgrad.config import PROVIDERS, Policy
from dgrad.selection import Selection
from gpu_record import Record

pytest_plugins = ["compare_fixtures", "store_fixtures"]
# Before they are imported: then a failing assert says what it compared, as in a test.
pytest.register_assert_rewrite(
    "claims", "core_problem", "fake_cudnn", "fake_device", "gpu_cases", "kernels", "pretended",
    "reference", "same", "stored",
)  # fmt: skip

from fake_cudnn import Start, starting  # noqa: E402
from fake_device import Device  # noqa: E402
from reference import Case, pytorch_tf32, random_case, set_pytorch_tf32  # noqa: E402

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
        "after the others. Parts that run at once want few threads each: OMP_NUM_THREADS=2",
    )


def pytest_configure(config: pytest.Config) -> None:
    text = config.getoption("repro")
    if text is not None:
        config.stash[_REPRO] = _parse_repro(text, config.getoption("seed"))
    config.pluginmanager.register(Record(config), "dgrad-gpu-record")


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


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Let a cuDNN that is pretended answer; see fake_cudnn.py."""
    yield from starting(monkeypatch)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A GPU that is pretended, for what measures; see fake_device.py."""
    return Device(monkeypatch)


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


@pytest.fixture
def restored_flags(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No flag is set before the test, and PyTorch's switches are as before after it."""
    defaults = dgrad_config.Flags()
    monkeypatch.setattr(dgrad_config, "_base", defaults)
    monkeypatch.setattr(dgrad_config, "_flags", defaults)
    deterministic = torch.backends.cudnn.deterministic
    algorithms = torch.are_deterministic_algorithms_enabled()
    yield
    torch.backends.cudnn.deterministic = deterministic
    torch.use_deterministic_algorithms(algorithms)


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


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """On a busy machine, waking other threads for thousands of tiny operators takes minutes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def nothing_said_yet() -> Iterator[None]:
    """No reason for PyTorch's operator was said, and no call is known."""
    log._told.clear()
    dgrad.plan_cache.clear()
    yield
    log._told.clear()
    dgrad.plan_cache.clear()


@pytest.fixture
def strict_and_never_pytorch() -> Iterator[None]:
    with dgrad.flags(allow_tf32=False, fallback="error"):
        yield


@pytest.fixture
def directions_run(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directions that run from now on, in their order."""
    run, directions = _fallback.run, []

    def spy(direction: str, *arguments: Any) -> Tensor:
        directions.append(direction)
        return run(direction, *arguments)

    monkeypatch.setattr(_fallback, "run", spy)
    return directions


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing is compiled, and no reason for PyTorch's operator was said."""
    torch._dynamo.reset()
    log._told.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Selection]]:
    """All new selections of the test, in order; what earlier tests chose is forgotten."""
    made: list[Selection] = []
    tell = log.selected

    def selected(selection: Selection, policy: Policy) -> None:
        made.append(selection)
        tell(selection, policy)

    monkeypatch.setattr(log, "selected", selected)
    dgrad.plan_cache.clear()
    # Which candidate runs is then cuDNN's order alone, whatever measuring would say.
    with dgrad.flags(selection="heuristic"):
        yield made
    dgrad.plan_cache.clear()


@pytest.fixture
def nothing_known() -> None:
    """No call is known, the tensors are the same in each run, and PyTorch never runs instead."""
    torch.manual_seed(0)
    dgrad.plan_cache.clear()
    dgrad.set_flags(fallback="error")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the compiler take dgrad's operators for CPU tensors too; PyTorch's run inside."""
    real = _ops.unsuitable

    def unsuitable(input: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
        return real(input, weight, bias) if input.is_cuda or input.numel() == 0 else None

    monkeypatch.setattr(_ops, "unsuitable", unsuitable)
