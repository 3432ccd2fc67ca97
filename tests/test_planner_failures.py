"""The policy where something fails: cuDNN's heuristic, a plan, a run, or memory that is short."""

from __future__ import annotations

import threading

import pytest

import dgrad
from dgrad import _measuring, _runner, config, store
from dgrad._runner import Runner
from dgrad.exceptions import TorchOutOfMemoryError, cudnn_error
from fake_cudnn import (
    HEURISTIC,
    MIB,
    REFUSED,
    THREE,
    FakeEngine,
    FakeProblem,
    FakeResult,
    Start,
    W,
    X,
    Y,
    fake_times,
    names,
    refused,
    run,
)


def test_where_cudnn_offers_nothing_the_error_says_so(start: Start) -> None:
    start()
    assert "(cuDNN offers none)" in refused()


def test_a_failing_heuristic_is_the_reason_of_all(start: Start) -> None:
    core = start()
    core.results = cudnn_error(3000, "cudnnGet returned 3000", "cudnnGet", "")
    text = refused()
    assert text.count("cudnnGet returned 3000") == 2
    assert "legacy:ALGO_0" in text
    assert "legacy:ALGO_1" in text


@pytest.mark.parametrize("when", ["unplannable", "failing"])
def test_an_algorithm_that_fails_is_not_tried_again(start: Start, when: str) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    getattr(core, when)["GEMM"] = REFUSED
    for _ in range(3):
        run()
        run(deterministic=True)
    assert names(core) == ["ALGO_1"] * 6
    assert core.planned.count(("GEMM", "DEFAULT_MATH")) == 1
    assert core.attempts.count("GEMM") == (when == "failing")
    text = refused(algorithm="legacy:GEMM")
    assert "cudnnFinalize returned 3000: the why" in text
    assert "more lines" not in text
    assert core.planned.count(("GEMM", "DEFAULT_MATH")) == 1


def test_a_plan_that_cannot_be_made_in_a_capture_rejects_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    capturing = True
    cuda = vars(_runner)["torch"].cuda
    monkeypatch.setattr(cuda, "is_current_stream_capturing", lambda: capturing)
    core.unplannable["GEMM"] = cudnn_error(4000, "not in a capture", "cudnnBackendFinalize", "")
    run()
    assert names(core) == ["ALGO_1"]
    core.unplannable["ALGO_1"] = core.unplannable["GEMM"]
    with pytest.raises(dgrad.CudnnError, match="not in a capture"):
        run(deterministic=True)
    capturing = False
    core.unplannable.clear()
    run()
    assert names(core)[-1] == "GEMM"


@pytest.mark.parametrize("status", [3000, 4003, 5000])
@pytest.mark.parametrize("broken", ["legacy", "graph"])
def test_a_heuristic_that_fails_leaves_the_other_provider(
    start: Start, broken: str, status: int
) -> None:
    error = cudnn_error(status, "cudnnGet failed", "cudnnGet", "")
    if broken == "legacy":
        core = start(convolution=[FakeEngine("eng1")])
        core.results = error
    else:
        core = start(FakeResult("ALGO_1"), convolution=error)
    run()
    assert names(core) == ["ALGO_1" if broken == "graph" else "convolution:eng1"]
    reasons = [c.rejected for c in dgrad.selections()[0][0].candidates if c.rejected]
    passing = "cuDNN could not be asked this time: " if status > 4000 else ""
    assert set(reasons) == {f"{passing}cudnnGet failed"}


def test_a_failure_on_one_thread_is_known_to_all(start: Start) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    core.failing["GEMM"] = REFUSED
    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert core.attempts == ["GEMM", "ALGO_1", "ALGO_1"]


def test_an_algorithm_that_fails_later_is_replaced_in_the_same_runner(start: Start) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    runner = Runner(FakeProblem(), HEURISTIC)
    runner.run(X, W, Y)
    core.failing["GEMM"] = REFUSED
    runner.run(X, W, Y)
    assert names(core) == ["GEMM", "ALGO_1"]


def test_an_error_that_is_not_cudnns_is_passed_on(start: Start) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    core.failing["GEMM"] = KeyError("a bug")
    with pytest.raises(KeyError):
        run()


def test_out_of_memory_lets_the_next_one_run(start: Start) -> None:
    core = start(FakeResult("GEMM", workspace_bytes=3 * MIB), FakeResult("ALGO_1"))
    core.free_bytes = MIB
    run()
    run()
    assert names(core) == ["ALGO_1"] * 2
    assert core.planned.count(("GEMM", "DEFAULT_MATH")) == 1


def test_out_of_memory_for_all_is_told_apart(start: Start) -> None:
    core = start(
        FakeResult("GEMM", workspace_bytes=3 * MIB),
        FakeResult("WINOGRAD", rejected="CUDNN_STATUS_NOT_SUPPORTED"),
    )
    core.free_bytes = MIB
    with pytest.raises(dgrad.OutOfMemoryError) as caught:
        run()
    assert isinstance(caught.value, TorchOutOfMemoryError)
    assert isinstance(caught.value, dgrad.NotSupportedError)
    text = str(caught.value)
    assert "dgrad is out of memory for" in text
    assert "out of memory: no room for its workspace of 3.0 MiB: CUDA out of memory" in text
    assert "And so on" not in text
    assert "CUDNN_STATUS_NOT_SUPPORTED" in text


def test_memory_that_was_freed_is_used_again(start: Start) -> None:
    core = start(FakeResult("GEMM", workspace_bytes=3 * MIB))
    core.free_bytes = MIB
    with pytest.raises(dgrad.OutOfMemoryError):
        run()
    core.free_bytes = 4 * MIB
    run()
    assert names(core) == ["GEMM"]


def test_what_the_flags_forbid_is_not_out_of_memory(start: Start) -> None:
    core = start(
        FakeResult("GEMM", workspace_bytes=3 * MIB),
        FakeResult("WINOGRAD", rejected="CUDNN_STATUS_NOT_SUPPORTED"),
        FakeResult("ALGO_0"),
    )
    core.free_bytes = MIB
    run()
    assert names(core) == ["ALGO_0"]
    refused(algorithm="legacy:WINOGRAD")


def test_an_interrupted_measuring_after_a_capture_is_taken_up_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("GEMM"))
    measured = fake_times(core, monkeypatch, {"ALGO_1": 5.0, "GEMM": 0.5})
    measure, cuda = _measuring.measure, vars(_runner)["torch"].cuda
    runner = Runner(FakeProblem(), config.policy(dgrad.Flags(selection="measure")))
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "is_current_stream_capturing", lambda: True)
        runner.run(X, W, Y)
    with monkeypatch.context() as patch:
        patch.setattr(_measuring, "measure", interrupted)
        with pytest.raises(KeyboardInterrupt):
            runner.run(X, W, Y)
    assert (_measuring.measure, measured) == (measure, [])
    runner.run(X, W, Y)
    assert len(measured) == 1
    assert names(core)[-1] == "GEMM"


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_times_are_stored_before_the_memory_of_measuring_is_given_back(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That one waits for the device, and may be interrupted."""
    core, written = start(FakeResult("ALGO_1"), FakeResult("GEMM")), []
    fake_times(core, monkeypatch, {"ALGO_1": 5.0, "GEMM": 0.5})
    monkeypatch.setattr(store, "write", lambda problem, candidates: written.append(problem))
    monkeypatch.setattr(_measuring.Check, "drop", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(selection="measure")
    assert len(written) == 1
    run(selection="measure")
    assert names(core)[-1] == "GEMM"


def test_where_the_first_candidate_fails_the_second_time_the_next_one_is_the_measure(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*THREE)
    times: dict[str, float | None] = {"ALGO_1": 2.0, "ALGO_0": 3.0, "GEMM": None}
    fake_times(core, monkeypatch, times)
    run(selection="measure")
    core.failing["ALGO_1"] = REFUSED
    times["GEMM"] = 1.0
    run(selection="exhaustive")
    assert names(core) == ["ALGO_1", "ALGO_0", "GEMM"]
    rejected = [c.rejected for c in dgrad.selections()[-1][0].candidates]
    assert rejected == ["cudnnFinalize returned 3000: the why", None, None]
