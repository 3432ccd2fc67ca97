"""The policy: which candidate runs under which flags, and what is planned and asked only once.

cuDNN's part is played by a fake: its answers are the premise here, not what is tested.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

import dgrad
from dgrad._runner import Runner
from fake_cudnn import (
    HEURISTIC,
    MIB,
    STREAM,
    THREE,
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


def test_the_first_in_cudnns_order_runs(start: Start) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("ALGO_0"), FakeResult("GEMM"))
    run()
    pointers = (X.data_ptr(), W.data_ptr(), Y.data_ptr())
    assert core.ran == [("ALGO_1", *pointers, 0, STREAM)]
    assert core.planned == [("ALGO_1", "DEFAULT_MATH")]


def test_a_workspace_is_had_from_the_allocator(start: Start) -> None:
    core = start(FakeResult("ALGO_1", workspace_bytes=MIB))
    run()
    assert names(core) == ["ALGO_1"]


def test_a_runner_plans_once_and_runs_often(start: Start) -> None:
    core = start(FakeResult("ALGO_1"))
    runner = Runner(FakeProblem(), HEURISTIC)
    for _ in range(3):
        runner.run(X, W, Y)
    assert len(core.planned) == 1
    assert len(core.ran) == 3


def test_the_plan_that_was_timed_is_the_one_that_runs(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*THREE)
    fake_times(core, monkeypatch, {"ALGO_1": 1.0, "ALGO_0": 2.0, "GEMM": 3.0})
    run(selection="measure")
    assert names(core)[-1] == "ALGO_1"
    assert len(core.planned) == len(set(core.planned)) == 3
    # The others are gone: another thread's, or another choice, is made anew.
    run(selection="measure", algorithm="legacy:GEMM")
    assert names(core)[-1] == "GEMM"
    assert len(core.planned) == 4


def test_cudnn_is_asked_once_for_each_problem(start: Start) -> None:
    core = start(FakeResult("ALGO_1"))
    problem = FakeProblem(dtype="float64", tf32=False)
    for _ in range(3):
        run(problem)
        run(problem, deterministic=True)
    assert core.heuristics == 1
    run(replace(problem, groups=2))
    assert core.heuristics == 2
    dgrad.plan_cache.clear()
    run(problem)
    assert core.heuristics == 3


def test_what_cudnn_rejects_does_not_run(start: Start) -> None:
    core = start(FakeResult("GEMM", rejected="CUDNN_STATUS_NOT_SUPPORTED"), FakeResult("ALGO_0"))
    run()
    assert names(core) == ["ALGO_0"]


def test_deterministic_forbids_what_is_not(start: Start) -> None:
    core = start(FakeResult("ALGO_0", deterministic=False), FakeResult("ALGO_1"))
    run(deterministic=False)
    run(deterministic=True)
    run(deterministic=False)
    assert names(core) == ["ALGO_0", "ALGO_1", "ALGO_0"]


def test_the_workspace_limit_forbids_what_takes_more(start: Start) -> None:
    core = start(
        FakeResult("GEMM", workspace_bytes=2 * MIB),
        FakeResult("ALGO_1", workspace_bytes=MIB),
        FakeResult("ALGO_0"),
    )
    for limit in (None, 2 * MIB, 2 * MIB - 1, MIB, MIB - 1, 0):
        run(workspace_limit=limit)
    assert names(core) == ["GEMM", "GEMM", "ALGO_1", "ALGO_1", "ALGO_0", "ALGO_0"]


def test_the_limit_holds_for_the_true_workspace_and_not_the_estimate(start: Start) -> None:
    core = start(FakeResult("GEMM", workspace_bytes=10), FakeResult("ALGO_0"))
    core.true_workspace_bytes["GEMM"] = 3 * MIB
    run(workspace_limit=MIB)
    assert names(core) == ["ALGO_0"]
    run(workspace_limit=3 * MIB)
    assert names(core) == ["ALGO_0", "GEMM"]
    text = refused(workspace_limit=MIB, algorithm="legacy:GEMM")
    assert "its workspace of 3.0 MiB is over workspace_limit 1.0 MiB" in text


@pytest.mark.parametrize(
    "math_type", ["DEFAULT_MATH", "TENSOR_OP_MATH", "TENSOR_OP_MATH_ALLOW_CONVERSION"]
)
def test_strict_float32_runs_in_no_other_math_type_than_fma(start: Start, math_type: str) -> None:
    strict = FakeProblem(tf32=False)
    core = start(FakeResult("ALGO_1", math_type), FakeResult("ALGO_0", "FMA_MATH"))
    run(strict)
    assert core.planned == [("ALGO_0", "FMA_MATH")]
    start(FakeResult("ALGO_1", math_type))
    dgrad.plan_cache.clear()
    assert "it may round float32" in refused(strict)


def test_float32_is_never_converted_to_half_precision(start: Start) -> None:
    core = start(
        FakeResult("ALGO_1", "TENSOR_OP_MATH_ALLOW_CONVERSION"),
        FakeResult("ALGO_1", "TENSOR_OP_MATH"),
    )
    run(FakeProblem(tf32=True))
    assert core.planned == [("ALGO_1", "TENSOR_OP_MATH")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_types_run_in_any_math_type(start: Start, dtype: str) -> None:
    core = start(FakeResult("ALGO_1", "TENSOR_OP_MATH"), FakeResult("ALGO_0", "FMA_MATH"))
    run(FakeProblem(dtype=dtype, tf32=False))
    assert core.planned == [("ALGO_1", "TENSOR_OP_MATH")]


def test_the_flags_in_force_are_in_the_snippet(start: Start) -> None:
    start(FakeResult("ALGO_1", workspace_bytes=MIB), FakeResult("ALGO_0", deterministic=False))
    text = refused(deterministic=True, workspace_limit=1000)
    assert "it is not deterministic" in text
    assert "its workspace of 1.0 MiB is over workspace_limit 1000 B" in text
    assert "allow_tf32=True, deterministic=True, workspace_limit=1000, fallback='error'" in text
    # Also against PyTorch's switch, which the reader may have turned.
    assert "deterministic=False, workspace_limit=10," in refused(
        workspace_limit=10, algorithm="graph"
    )
