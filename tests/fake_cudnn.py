"""A fake of the native module: cuDNN's answers are the premise of a test, not what is tested."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest
import torch

import dgrad
from dgrad import _candidates, _loader, _measuring, _runner, config
from dgrad._geometry import Pair
from dgrad._runner import Runner
from dgrad.exceptions import CudnnError, TorchOutOfMemoryError, cudnn_error

MIB = 2**20
STREAM = 77
REFUSED = cudnn_error(3000, "cudnnFinalize returned 3000: the why\nmore lines", "cudnnFinalize", "")

# What a runner is given. The sizes are those of FakeProblem, so that a bias fits x.
X, W, Y = torch.zeros(1, 2, 7, 7), torch.ones(4, 2, 3, 3), torch.ones(1, 4, 3, 3)
BIAS = torch.tensor([1.0, -2.0])


@dataclass(frozen=True)
class FakeProblem:
    """The fields of dgrad._core.Problem."""

    direction: str = "dgrad"
    dtype: str = "float32"
    tf32: bool = True
    layout: str = "nchw"
    x: tuple[int, ...] = (1, 2, 7, 7)
    w: tuple[int, ...] = (4, 2, 3, 3)
    y: tuple[int, ...] = (1, 4, 3, 3)
    padding: Pair = (0, 0)
    stride: Pair = (2, 2)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False
    alignment: int = 16
    device: int = 0


STRICT = FakeProblem(tf32=False)  # asks cuDNN's legacy heuristic once
STRICT_BIASED = replace(STRICT, bias=True)


@dataclass
class FakeResult:
    """What cuDNN's heuristic says of a legacy algorithm."""

    algorithm: str
    math_type: str = "DEFAULT_MATH"
    deterministic: bool = True
    workspace_bytes: int = 0
    rejected: str = ""


@dataclass
class FakeEngine:
    """What cuDNN's heuristic says of an engine; its plan tells the workspace and the true notes."""

    name: str
    notes: Sequence[str] = ()
    workspace_bytes: int = 0
    true_notes: Sequence[str] | None = None


@dataclass
class FakePlan:
    core: FakeCore
    name: str
    workspace_bytes: int
    notes: list[str] = field(default_factory=list)
    compiled: list[bytes] = field(default_factory=lambda: [b""])

    @property
    def compiles(self) -> bool:
        return any(part in self.core.compiling for part in self.name.split(" + "))

    def execute(self, x: int, w: int, y: int, bias: int, workspace: int, stream: int) -> None:
        self.core.attempts.append(self.name)
        if self.name in self.core.failing:
            raise self.core.failing[self.name]
        assert bool(workspace) is bool(self.workspace_bytes)
        self.core.ran.append((self.name, x, w, y, bias, stream))
        self.core.on_run(self.name, x, bias)


class FakeCore:
    """Answers like the native module, and notes what it is asked.

    A plan is named by its algorithm, or as "convolution:eng5"; two in a row as "A + bias:eng1".
    """

    def __init__(self, *results: FakeResult) -> None:
        self.results: list[FakeResult] | CudnnError = list(results)
        self.engines: dict[str, list[FakeEngine] | CudnnError] = {}  # by operation
        self.refusing: dict[str, list[str]] = {}  # by operation: modes of the heuristic, and why
        self.failing: dict[str, Exception] = {}  # by plan: raised when it runs
        self.unplannable: dict[str, Exception] = {}  # by plan: raised when it is planned
        self.true_workspace_bytes: dict[str, int] = {}  # where the heuristic's number is wrong
        self.compiling: set[str] = set()  # plans that cuDNN compiles for
        self.restored: list[str] = []
        self.kept_for_graphs: list[str] = []
        self.unrestorable: dict[str, CudnnError] = {}
        self.free_bytes = 2**40
        self.heuristics = 0
        self.planned: list[tuple[str, str]] = []
        self.attempts: list[str] = []
        self.ran: list[tuple[str, int, int, int, int, int]] = []
        # What a plan does: its name, and the pointers to x and to the bias.
        self.on_run: Callable[[str, int, int], None] = lambda name, x, bias: None

    def Problem(self, **fields: Any) -> FakeProblem:
        return FakeProblem(**fields)

    def legacy_algorithms(self, direction: str) -> list[str]:
        return ["ALGO_0", "ALGO_1"]

    def legacy_heuristic(self, problem: FakeProblem) -> list[FakeResult]:
        self.heuristics += 1
        if isinstance(self.results, CudnnError):
            raise self.results
        return self.results

    def legacy_plan(self, problem: FakeProblem, algorithm: str, math_type: str) -> FakePlan:
        self.planned.append((algorithm, math_type))
        if algorithm in self.unplannable:
            raise self.unplannable[algorithm]
        assert isinstance(self.results, list)
        estimated = next(
            result.workspace_bytes
            for result in self.results
            if (result.algorithm, result.math_type) == (algorithm, math_type)
        )
        return FakePlan(self, algorithm, self.true_workspace_bytes.get(algorithm, estimated))

    def graph_heuristic(
        self, problem: FakeProblem, operation: str
    ) -> tuple[list[FakeEngine], list[str]]:
        engines = self.engines.get(operation, [])
        if isinstance(engines, CudnnError):
            raise engines
        return engines, self.refusing.get(operation, [])

    def keep_for_graphs(self, plan: FakePlan) -> None:
        self.kept_for_graphs.append(plan.name)

    def restored_plan(self, device: int, compiled: bytes) -> FakePlan:
        name = compiled.decode()
        self.restored.append(name)
        if name in self.unrestorable:
            raise self.unrestorable[name]
        return self._engine_plan(*name.split(":"))

    def graph_plan(self, problem: FakeProblem, operation: str, engine: str) -> FakePlan:
        name = f"{operation}:{engine}"
        self.planned.append((operation, engine))
        if name in self.unplannable:
            raise self.unplannable[name]
        return self._engine_plan(operation, engine)

    def _engine_plan(self, operation: str, engine: str) -> FakePlan:
        name = f"{operation}:{engine}"
        known = self.engines.get(operation, [])
        assert not isinstance(known, CudnnError)
        for each in known:
            if each.name == engine:
                notes = each.notes if each.true_notes is None else each.true_notes
                made = [name.encode()] if name in self.compiling else [b""]
                return FakePlan(self, name, each.workspace_bytes, list(notes), made)
        raise ValueError(f"engine is '{engine}', expected a name such as 'eng5_k2=3_k24=0'")

    def sequence(self, first: FakePlan, second: FakePlan) -> FakePlan:
        size = max(first.workspace_bytes, second.workspace_bytes)
        name, compiled = f"{first.name} + {second.name}", first.compiled + second.compiled
        return FakePlan(self, name, size, first.notes + second.notes, compiled)

    def storage(self, size: int, device: torch.device) -> Any:
        assert device == torch.device("cuda", 0)
        if size > self.free_bytes:
            raise TorchOutOfMemoryError(f"CUDA out of memory. Tried to allocate {size}.\nAnd so on")
        return SimpleNamespace(data_ptr=lambda: 4096)

    def begin(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand in the place of cuDNN, and of the GPU."""
        monkeypatch.setattr(_candidates, "_loader", SimpleNamespace(require=lambda: self))
        driver = SimpleNamespace(_cuda_getCurrentRawStream=lambda device: STREAM)
        cuda = SimpleNamespace(
            is_current_stream_capturing=lambda: False,
            memory_reserved=lambda device: 0,
            empty_cache=lambda: None,
            device=lambda device: nullcontext(),
        )
        fake_torch = SimpleNamespace(
            UntypedStorage=self.storage, device=torch.device, _C=driver, cuda=cuda
        )
        for module in (_runner, _measuring):
            monkeypatch.setattr(module, "torch", fake_torch)


Start = Callable[..., FakeCore]
HEURISTIC = config.policy(dgrad.Flags(selection="heuristic"))


THREE = (
    FakeResult("ALGO_1", workspace_bytes=2 * MIB),
    FakeResult("ALGO_0", deterministic=False),
    FakeResult("GEMM", workspace_bytes=MIB),
)


class StoredCore(FakeCore):
    """Its problems are real ones, which the store keeps."""

    def Problem(self, **fields: Any) -> Any:
        return _loader.require().Problem(**fields)


def real_problem(size: int = 3, **changes: Any) -> Any:
    """A problem of the native module itself, which the store and pickling know; one by its size."""
    core, reason = _loader.load()
    if core is None:
        pytest.skip(f"the native module cannot be used: {reason}")
    fields: dict[str, Any] = {
        "direction": "dgrad", "dtype": "float32", "tf32": True, "layout": "nchw",
        "x": (2, 8, 2 * size + 1, 9), "w": (4, 8, 3, 3), "y": (2, 4, size, 4),
        "padding": (0, 0), "stride": (2, 2), "dilation": (1, 1), "groups": 1, "bias": False,
        "alignment": 16, "device": 0,
    }  # fmt: skip
    return core.Problem(**(fields | changes))


def starting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A fixture that puts a fake in the place of cuDNN: these results, and engines by operation."""

    def put(*results: FakeResult, **engines: list[FakeEngine] | CudnnError) -> FakeCore:
        core = FakeCore(*results)
        core.engines = engines
        core.begin(monkeypatch)
        return core

    dgrad.plan_cache.clear()
    yield put
    dgrad.plan_cache.clear()


def run(problem: Any = None, bias: torch.Tensor | None = None, **flags: Any) -> None:
    with dgrad.flags(**{"selection": "heuristic", **flags}):
        Runner(problem or FakeProblem(), config.policy()).run(X, W, Y, bias)


def refused(problem: Any = None, bias: torch.Tensor | None = None, **flags: Any) -> str:
    with pytest.raises(dgrad.NotSupportedError) as caught:
        run(problem, bias, **flags)
    assert type(caught.value) is dgrad.NotSupportedError
    return str(caught.value)


def names(core: FakeCore) -> list[str]:
    """What ran, in order."""
    return [name for name, *_ in core.ran]


def floats_at(address: int, count: int) -> list[float]:
    """What a kernel would read."""
    return list((ctypes.c_float * count).from_address(address))


VALUE = 3.0  # what every convolution gives


def compute(core: FakeCore, x: torch.Tensor) -> list[list[float]]:
    """Let plans do to x what their names say; the list gets the bias values that each reads."""
    read: list[list[float]] = []

    def on_run(name: str, x_address: int, bias_address: int) -> None:
        assert x_address == x.data_ptr()
        x.fill_(VALUE)
        values: list[float] = []
        if "bias_rows" in name:  # a value for each channel of each image
            values = floats_at(bias_address, 2 * len(x))
            x.add_(torch.tensor(values).view(len(x), 2, 1, 1))
        elif "bias" in name:
            values = floats_at(bias_address, 2)
            x.add_(torch.tensor(values).view(1, 2, 1, 1))
        read.append(values)

    core.on_run = on_run
    return read


def fake_times(
    core: FakeCore,
    monkeypatch: pytest.MonkeyPatch,
    times: dict[str, float | None],
    device_times: Mapping[str, float] = MappingProxyType({}),
) -> list[list[str]]:
    """Timing gives these, by plan, and None where the budget ends before; and on the device.

    Returns what is timed, a list for each measuring.
    """
    measured: list[list[str]] = []

    def measure(contestants: list[Any], budget_s: float | None, errors: Any, late: Any) -> None:
        begin(contestants, errors)
        begin(late(), errors)

    def begin(contestants: list[Any], errors: Any) -> None:
        if contestants:
            measured.append([])
        for contestant in contestants:
            before = len(core.ran)
            try:
                run = contestant.prepare(contestant.build())
                contestant.reached = True
                if run is None:
                    continue
                run()
                contestant.check()
            except errors as error:
                contestant.fail(error)
                continue
            finally:
                done = names(core)[before:]
                del core.ran[before:]
            measured[-1] += done
            time_ms = times[done[0]]
            contestant.reached = time_ms is not None
            contestant.samples_ms = [] if time_ms is None else [time_ms]
            contestant.device_samples_ms = [device_times[n] for n in done[:1] if n in device_times]

    monkeypatch.setattr(_measuring, "measure", measure)
    return measured
