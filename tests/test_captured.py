"""A CUDA graph gets the fastest on the device, made ready by a rehearsal before the capture."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import dgrad
from dgrad import _runner, config, log
from dgrad._runner import Runner
from dgrad._watch import watching
from dgrad.planner import for_graphs
from dgrad.selection import Candidate
from fake_cudnn import REFUSED, FakeCore, FakeProblem, FakeResult, Start, W, X, Y, fake_times, names

NOT_FOR_GRAPHS = (
    "a CUDA graph gets what eager calls get, and not dgrad::dgrad legacy:GEMM (DEFAULT_MATH): CUDA "
    "out of memory."
)


def engine(device_ms: float | None, **changes: object) -> Candidate:
    fields = {"time_ms": 0.04, "device_ms": device_ms, "workspace_bytes": 0, **changes}
    return Candidate("graph", "eng1", "FMA_MATH", True, **fields)  # type: ignore[arg-type]


LEGACY = Candidate("legacy", "ALGO_1", "FMA_MATH", True, 0, time_ms=0.02, device_ms=0.020)


@pytest.mark.parametrize(
    ("other", "flags", "index"),
    [
        (engine(0.010), {}, 1),
        (engine(0.0197), {}, None),  # within the noise
        (engine(None), {}, None),
        (engine(0.010, time_ms=None), {}, None),
        (engine(0.010, rejected="it is wrong"), {}, None),
        (engine(0.010, workspace_bytes=100), {"workspace_limit": 99}, None),
        (engine(0.010, workspace_bytes=100), {"workspace_limit": 100}, 1),
        (engine(0.010), {"selection": "heuristic"}, None),
        (engine(0.010), {"algorithm": "legacy:ALGO_1"}, None),
        (engine(0.010), {"algorithm": ["legacy", "graph"]}, None),
    ],
)
def test_a_graph_gets_what_is_faster_on_the_device(
    other: Candidate, flags: dict[str, object], index: int | None
) -> None:
    policy = config.policy(dgrad.Flags(**{"selection": "measure", **flags}))  # type: ignore[arg-type]
    assert for_graphs([LEGACY, other], "dgrad", policy, 0) == index


def test_the_fastest_of_several_is_taken_and_of_equals_the_smaller() -> None:
    policy = config.policy(dgrad.Flags())
    candidates = [LEGACY, engine(0.015), engine(0.010), engine(0.012)]
    assert for_graphs(candidates, "dgrad", policy, 0) == 2
    candidates += [engine(0.00995, workspace_bytes=1), engine(0.00992, workspace_bytes=2)]
    assert for_graphs(candidates, "dgrad", policy, 0) == 2
    candidates[2] = replace(candidates[2], deterministic=False)
    assert for_graphs(candidates, "dgrad", policy, 0) == 4


@pytest.fixture
def core(start: Start, monkeypatch: pytest.MonkeyPatch) -> FakeCore:
    monkeypatch.setattr(log, "_warned", {})
    core = start(FakeResult("ALGO_1"), FakeResult("GEMM"), FakeResult("ALGO_0"))
    times = {"ALGO_1": 0.020, "GEMM": 0.040, "ALGO_0": 0.041}
    fake_times(core, monkeypatch, times, {"ALGO_1": 0.019, "GEMM": 0.005, "ALGO_0": 0.010})
    return core


@pytest.fixture
def runner(core: FakeCore) -> Runner:
    return Runner(FakeProblem(), config.policy(dgrad.Flags(selection="measure")))


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    now = [False]
    cuda = vars(_runner)["torch"].cuda
    monkeypatch.setattr(cuda, "is_current_stream_capturing", lambda: now[0])
    return now


def run(core: FakeCore, runner: Runner) -> list[str]:
    core.ran.clear()
    runner.run(X, W, Y)
    return names(core)


def test_without_a_rehearsal_a_graph_gets_what_eager_calls_get(
    core: FakeCore, runner: Runner, capturing: list[bool]
) -> None:
    assert run(core, runner) == ["ALGO_1"]
    capturing[0] = True
    assert run(core, runner) == ["ALGO_1"]


def test_after_a_rehearsal_a_graph_gets_the_fastest_on_the_device(
    core: FakeCore, runner: Runner, capturing: list[bool]
) -> None:
    with watching() as events:
        assert run(core, runner) == ["GEMM", "ALGO_1"]  # the result is the chosen one's
    (selection,) = events
    assert isinstance(selection, dgrad.Selection)
    assert (selection.candidate.algorithm, selection.captured) == ("ALGO_1", 1)
    assert selection.to_dict()["captured"] == 1
    faster = "73.7 % faster on the device, 100.0 % slower with the host's share"
    assert str(selection).endswith(f"; CUDA graphs get legacy:GEMM (DEFAULT_MATH), {faster}")
    assert selection.verdicts()[1].endswith("; CUDA graphs get it")
    assert run(core, runner) == ["ALGO_1"]
    planned = len(core.planned)
    with watching():
        assert run(core, runner) == ["ALGO_1"], "it is ready"
    assert len(core.planned) == planned
    capturing[0] = True
    assert run(core, runner) == ["GEMM"]
    with watching():
        assert run(core, runner) == ["GEMM"], "nothing is made ready in a capture"
    capturing[0] = False
    assert run(core, runner) == ["ALGO_1"]


def test_a_compiled_plan_that_a_graph_got_stays_for_its_replays(
    core: FakeCore, runner: Runner, capturing: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_runner, "_loader", SimpleNamespace(require=lambda: core))
    core.compiling = {"GEMM"}
    with watching():
        run(core, runner)
    assert core.kept_for_graphs == []
    capturing[0] = True
    assert run(core, runner) == ["GEMM"]
    assert core.kept_for_graphs == ["GEMM"]


def test_one_that_fails_in_the_rehearsal_gives_its_place_to_the_next(
    core: FakeCore, runner: Runner, capturing: list[bool]
) -> None:
    run(core, runner)
    core.failing["GEMM"] = REFUSED
    with watching():
        assert run(core, runner)[-2:] == ["ALGO_0", "ALGO_1"]
    capturing[0] = True
    assert run(core, runner) == ["ALGO_0"]
    ((selection, _),) = dgrad.selections()
    assert selection.candidates[1].rejected is not None


def test_one_whose_workspace_is_over_the_limit_is_not_run(
    core: FakeCore, runner: Runner, capturing: list[bool]
) -> None:
    run(core, runner)
    core.true_workspace_bytes["GEMM"] = 5
    limited = Runner(FakeProblem(), config.policy(dgrad.Flags(workspace_limit=4)))
    with watching():
        assert run(core, limited) == ["ALGO_0", "ALGO_1"]
    capturing[0] = True
    assert run(core, limited) == ["ALGO_0"]


def test_without_memory_in_the_rehearsal_nothing_is_rejected(
    core: FakeCore, runner: Runner, capturing: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    run(core, runner)
    core.failing["GEMM"] = torch.cuda.OutOfMemoryError("CUDA out of memory.")
    with watching():
        assert run(core, runner)[-1] == "ALGO_1"
    assert NOT_FOR_GRAPHS in caplog.text
    capturing[0] = True
    assert run(core, runner) == ["ALGO_1"]
    ((selection, _),) = dgrad.selections()
    assert selection.candidates[1].rejected is None


def test_another_choice_forgets_what_graphs_get(
    core: FakeCore, runner: Runner, capturing: list[bool]
) -> None:
    with watching():
        run(core, runner)
    core.failing["ALGO_1"] = REFUSED
    assert run(core, runner)[-1] == "GEMM"
    assert runner._for_graphs is None
    capturing[0] = True
    assert run(core, runner) == ["GEMM"]


def test_without_memory_in_the_capture_the_chosen_one_runs(
    core: FakeCore, runner: Runner, capturing: list[bool], caplog: pytest.LogCaptureFixture
) -> None:
    with watching():
        run(core, runner)
    capturing[0] = True
    core.failing["GEMM"] = torch.cuda.OutOfMemoryError("CUDA out of memory.")
    assert run(core, runner)[-1] == "ALGO_1"
    ((selection, _),) = dgrad.selections()
    assert [candidate.rejected for candidate in selection.candidates] == [None] * 3
    assert NOT_FOR_GRAPHS in caplog.text
