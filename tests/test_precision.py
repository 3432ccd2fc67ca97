"""What precision and determinism decide between is timed at once, and nothing is timed twice."""

from __future__ import annotations

import logging

import pytest
import torch

import dgrad
from dgrad import _measuring, _runner, config
from dgrad._knowledge import everything, knowledge_of
from dgrad._runner import Runner
from dgrad.exceptions import TorchOutOfMemoryError, cudnn_error
from fake_cudnn import (
    STRICT,
    FakeProblem,
    FakeResult,
    Start,
    W,
    X,
    Y,
    fake_times,
    names,
    run,
)

NOT_SUPPORTED = cudnn_error(3000, "cudnnRun returned 3000", "cudnnRun", "")
NOT_STARTED = cudnn_error(1001, "cudnnCreate returned 1001", "cudnnCreate", "")
EITHER = (FakeResult("ALGO_1"), FakeResult("ALGO_0", "FMA_MATH"), FakeResult("GEMM", "FMA_MATH"))
EITHER_MS: dict[str, float | None] = {"ALGO_1": 1.0, "ALGO_0": 3.0, "GEMM": 2.0}


def test_forbidding_tf32_needs_no_new_measuring(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(
        FakeResult("ALGO_1"), FakeResult("ALGO_0", "FMA_MATH"), FakeResult("GEMM", "FMA_MATH")
    )
    measured = fake_times(core, monkeypatch, {"ALGO_1": 1.0, "ALGO_0": 3.0, "GEMM": 2.0})
    run(FakeProblem(tf32=True), selection="measure")
    assert len(everything()) == 1
    run(FakeProblem(tf32=False), selection="measure")
    assert measured == [["ALGO_1", "ALGO_0", "GEMM"]]
    assert names(core) == ["ALGO_1", "GEMM"]


def test_nothing_is_measured_for_tf32_where_the_environment_turns_it_off(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its times would be those of full float32, and later processes would believe them."""
    core = start(*EITHER)
    measured = fake_times(core, monkeypatch, EITHER_MS)
    monkeypatch.setattr(config, "tf32_overridden", lambda: True)
    run(STRICT, selection="measure")
    assert measured == [["ALGO_0", "GEMM"]]
    assert len(everything()) == 1


@pytest.mark.parametrize("first", [False, True])
def test_switching_determinism_needs_no_new_measuring(
    first: bool, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(FakeResult("ALGO_0", deterministic=False), FakeResult("ALGO_1"))
    measured = fake_times(core, monkeypatch, {"ALGO_0": 1.0, "ALGO_1": 2.0})
    for deterministic in (first, not first):
        run(selection="measure", deterministic=deterministic)
    assert measured == [["ALGO_0", "ALGO_1"]]
    assert names(core) == (["ALGO_1", "ALGO_0"] if first else ["ALGO_0", "ALGO_1"])


def test_what_failed_with_tf32_is_not_tried_again_without_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(
        FakeResult("ALGO_0", "FMA_MATH"), FakeResult("GEMM", "FMA_MATH"), FakeResult("ALGO_1")
    )
    core.failing["GEMM"] = NOT_SUPPORTED
    measured = fake_times(core, monkeypatch, {"ALGO_0": 3.0, "ALGO_1": 1.0})
    run(selection="measure")
    Runner(FakeProblem(tf32=False), config.policy(dgrad.Flags(selection="measure"))).run(X, W, Y)  # type: ignore[arg-type]
    assert measured == [["ALGO_0", "ALGO_1"]]
    assert names(core) == ["ALGO_1", "ALGO_0"]


def test_allowing_tf32_needs_no_new_measuring(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it adds was measured with the strict problem, and all else was lent."""
    core = start(*EITHER)
    measured = fake_times(core, monkeypatch, EITHER_MS)
    run(STRICT, selection="measure")
    assert measured == [["ALGO_0", "GEMM"], ["ALGO_1"]]
    assert names(core) == ["GEMM"]
    ((selection, _),) = dgrad.selections()  # what did not run is none
    assert selection.source == "measured"
    run(FakeProblem(tf32=True), selection="measure")
    assert len(measured) == 2
    assert names(core) == ["GEMM", "ALGO_1"]


def test_a_strict_result_is_strict_whatever_was_measured_for_tf32(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*EITHER)
    values = {"ALGO_0": 1.0, "GEMM": 1.0, "ALGO_1": 1.01}

    def on_run(name: str, x: int, bias: int) -> None:
        X.fill_(values[name])

    core.on_run = on_run
    fake_times(core, monkeypatch, EITHER_MS)
    run(STRICT, selection="measure")
    assert torch.equal(X, torch.ones_like(X))
    tf32 = knowledge_of(FakeProblem(tf32=True))  # type: ignore[arg-type]
    assert [c.rejected for c in tf32.candidates] == [None] * 3  # 1 % apart is right for tf32
    strict = knowledge_of(STRICT)  # type: ignore[arg-type]
    assert [c.time_ms for c in strict.candidates] == [None, 3.0, 2.0]
    assert "tf32" in str(strict.candidates[0].rejected)


def test_what_was_timed_strictly_is_timed_once_though_tf32_was_known_before(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*EITHER)
    measured = fake_times(core, monkeypatch, EITHER_MS)
    run(FakeProblem(tf32=True), selection="heuristic")
    run(STRICT, selection="measure")
    assert measured == [["ALGO_0", "GEMM"], ["ALGO_1"]]


def test_what_was_timed_with_tf32_is_timed_once_though_the_strict_one_was_known_before(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*EITHER)
    measured = fake_times(core, monkeypatch, EITHER_MS)
    run(STRICT, selection="heuristic")
    run(FakeProblem(tf32=True), selection="measure")
    run(STRICT, selection="measure")
    assert measured == [["ALGO_1", "ALGO_0", "GEMM"]]
    assert names(core)[-1] == "GEMM"


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_types_are_measured_in_one_precision(
    start: Start, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    core = start(*EITHER)
    measured = fake_times(core, monkeypatch, EITHER_MS)
    run(FakeProblem(dtype=dtype, tf32=False), selection="measure")
    assert len(measured) == len(everything()) == 1


@pytest.mark.parametrize(
    "error",
    [NOT_SUPPORTED, TorchOutOfMemoryError("no room"), NOT_STARTED, RuntimeError("of whatever")],
    ids=lambda error: type(error).__name__,
)
def test_what_fails_for_tf32_does_not_disturb_the_strict_call(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    caplog.set_level(logging.DEBUG, "dgrad")
    core = start(*EITHER)
    core.failing["ALGO_1"] = error
    measured = fake_times(core, monkeypatch, EITHER_MS)
    run(STRICT, selection="measure")
    assert names(core)[-1] == "GEMM"
    assert measured[0] == ["ALGO_0", "GEMM"]
    assert str(error) in caplog.text
    run(STRICT, selection="measure")
    assert len(measured) == 2


def test_an_interrupt_while_tf32_is_measured_is_passed_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*EITHER)
    core.failing["ALGO_1"] = KeyboardInterrupt()  # type: ignore[assignment]
    fake_times(core, monkeypatch, EITHER_MS)
    with pytest.raises(KeyboardInterrupt):
        run(STRICT, selection="measure")
    run(STRICT, selection="measure")
    assert names(core)[-1] == "GEMM"


def test_in_a_capture_nothing_is_measured_for_tf32_either(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*EITHER)
    monkeypatch.setattr(vars(_runner)["torch"].cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(_measuring, "measure", lambda *_: pytest.fail("measured in a capture"))
    run(STRICT, selection="measure")
    assert names(core) == ["ALGO_0"]
    assert len(everything()) == 1
