"""Which candidates there are, in which order, and what is made of one: with a fake of cuDNN."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

import dgrad
from dgrad._candidates import gather, imprecision, make_plan, pass_operation
from dgrad.exceptions import cudnn_error
from dgrad.selection import Candidate
from fake_cudnn import REFUSED, STRICT, STRICT_BIASED, FakeEngine, FakeProblem, FakeResult, Start


def engines(count: int, first: int = 1) -> list[FakeEngine]:
    return [FakeEngine(f"eng{number}") for number in range(first, first + count)]


def order(candidates: Sequence[Candidate]) -> list[str]:
    """Short names in order: eng1, ALGO_1, eng1+identity, eng1/fused, eng1/add, eng1/eng7."""
    return [c.algorithm + (f"/{c.bias}" if c.bias else "") for c in candidates]


# --- gather -------------------------------------------------------------------------------------


def test_the_compiled_engines_stand_behind_the_first_eight(start: Start) -> None:
    start(
        FakeResult("ALGO_1", "FMA_MATH"),
        FakeResult("ALGO_0", "FMA_MATH"),
        convolution=engines(10),
        convolution_identity=engines(4, first=20),
        convolution_bias=engines(2, first=90),
        bias_rows=engines(2, first=95),
    )
    assert order(gather(STRICT)) == [
        *(f"eng{number}" for number in range(1, 9)),
        "eng20+identity", "eng21+identity",
        "eng9", "eng10", "ALGO_1", "ALGO_0",
        "eng22+identity", "eng23+identity",
    ]  # fmt: skip


def test_a_heuristic_mode_that_fails_beside_others_is_logged(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    core = start(convolution=[FakeEngine("eng1")])
    core.refusing["convolution"] = ["heuristic mode B: cudnnBackendFinalize returned 3000\nand on"]
    with caplog.at_level(logging.DEBUG, logger="dgrad"):
        assert [c.algorithm for c in gather(STRICT)] == ["eng1"]
    assert caplog.messages == [
        f"rejected graph:engines (DEFAULT_MATH) for {STRICT}: convolution, heuristic mode B: "
        "cudnnBackendFinalize returned 3000"
    ]


@pytest.mark.parametrize("direction", ["fprop", "wgrad"])
def test_gradients_have_no_compiled_engines(start: Start, direction: str) -> None:
    core = start(convolution=engines(2), convolution_identity=engines(2, first=20))
    assert order(gather(FakeProblem(direction, tf32=False))) == ["eng1", "eng2"]
    core.engines["convolution_identity"] = REFUSED
    assert order(gather(FakeProblem(direction, tf32=False))) == ["eng1", "eng2"]


def test_fewer_than_eight_all_stand_before_the_compiled_ones(start: Start) -> None:
    start(
        FakeResult("ALGO_1", "FMA_MATH"),
        convolution=engines(2),
        convolution_identity=engines(3, first=20),
    )
    assert order(gather(STRICT)) == [
        "eng1", "eng2", "ALGO_1", "eng20+identity", "eng21+identity", "eng22+identity",
    ]  # fmt: skip


def test_pytorch_adds_a_bias_but_in_candidates_of_their_own(start: Start) -> None:
    start(
        FakeResult("ALGO_1", "FMA_MATH"),
        FakeResult("ALGO_0", "FMA_MATH"),
        convolution=engines(9),
        convolution_identity=engines(1, first=20),
        convolution_bias=engines(4, first=30),
        bias_rows=engines(3, first=50),
    )
    assert order(gather(STRICT_BIASED)) == [
        "eng1/add", "eng2/add",
        "eng1/eng50",
        *(f"eng{number}/add" for number in range(3, 9)),
        "eng30/fused", "eng31/fused",
        "eng9/add", "ALGO_1/add", "ALGO_0/add",
        "eng1/eng51", "eng1/eng52",
        "eng32/fused", "eng33/fused",
    ]  # fmt: skip


def test_the_passes_are_tried_with_the_first_candidate_that_may_run(start: Start) -> None:
    start(
        FakeResult("ALGO_1", "FMA_MATH"),
        convolution=[FakeEngine("eng1", ["TENSOR_CORE"]), FakeEngine("eng2", ["FFT"])],
        bias_rows=engines(2, first=50),
    )
    assert order(gather(STRICT_BIASED)) == [
        "eng1/add", "eng2/add", "ALGO_1/eng50", "ALGO_1/add", "ALGO_1/eng51",
    ]  # fmt: skip


def test_where_nothing_may_run_no_pass_is_tried(start: Start) -> None:
    start(convolution=[FakeEngine("eng1", ["FFT"])], bias_rows=engines(2, first=50))
    assert order(gather(STRICT_BIASED)) == ["eng1/add"]


def test_without_an_engine_for_the_bias_pytorch_adds_it(start: Start) -> None:
    core = start(FakeResult("ALGO_1", "FMA_MATH"), convolution=engines(2))
    assert order(gather(STRICT_BIASED)) == ["eng1/add", "eng2/add", "ALGO_1/add"]
    core.engines["bias_rows"] = REFUSED
    found = gather(STRICT_BIASED)
    refused = found.pop(2)
    assert order(found) == ["eng1/add", "eng2/add", "ALGO_1/add"]
    assert all(c.rejected is None for c in found)
    assert refused.rejected == "cudnnFinalize returned 3000: the why"


def test_a_pass_that_is_less_right_is_rejected_with_its_own_reason(start: Start) -> None:
    problem = replace(STRICT_BIASED, dtype="float16")
    start(
        convolution=engines(1),
        bias_rows=[FakeEngine("eng50", ["REDUCED_PRECISION_REDUCTION"]), FakeEngine("eng51")],
    )
    plain, wrong, right = gather(problem)
    assert order([plain, wrong, right]) == ["eng1/add", "eng1/eng50", "eng1/eng51"]
    assert wrong.rejected == "it adds up in float16, not in float32"
    assert (plain.rejected, right.rejected) == (None, None)


@pytest.mark.parametrize("status", [1001, 4004])  # no GPU; no memory for its own state
@pytest.mark.parametrize("operation", ["convolution", "convolution_bias", "bias_rows"])
def test_a_cudnn_that_does_not_start_is_not_taken_for_a_refusal(
    start: Start, operation: str, status: int
) -> None:
    core = start(FakeResult("ALGO_1", "FMA_MATH"), bias_rows=engines(1))
    core.engines[operation] = cudnn_error(status, "it does not start", "cudnnCreate", "")
    with pytest.raises(dgrad.CudnnNotInitializedError):
        gather(STRICT_BIASED)


@pytest.mark.parametrize(
    ("changes", "operation"),
    [
        ({}, "bias_rows"),
        ({"dtype": "float16"}, "bias_rows"),
        ({"layout": "nhwc"}, "bias"),
        # one channel is contiguous and channels_last at once
        ({"layout": "nhwc", "x": (1, 1, 7, 7), "w": (4, 1, 3, 3)}, "bias_rows"),
    ],
)
def test_a_pass_sees_rows_where_the_channels_are_not_last(
    start: Start, changes: dict[str, Any], operation: str
) -> None:
    problem = replace(STRICT_BIASED, **changes)
    core = start(convolution=engines(1), bias=engines(1, 60), bias_rows=engines(1, 70))
    assert pass_operation(problem) == operation
    expected = {"bias": "eng60", "bias_rows": "eng70"}[operation]
    plain, passed = gather(problem)
    assert order([plain, passed]) == ["eng1/add", f"eng1/{expected}"]
    plan: Any = make_plan(problem, passed)
    assert plan.name == f"convolution:eng1 + {operation}:{expected}"
    assert (operation, expected) in core.planned


def test_a_refused_graph_is_one_rejected_candidate_and_no_error(start: Start) -> None:
    start(FakeResult("ALGO_1", "FMA_MATH"), convolution=REFUSED, convolution_identity=REFUSED)
    graph, legacy, compiled = gather(STRICT)
    assert [c.name for c in (graph, compiled)] == ["graph:engines", "graph:engines+identity"]
    for candidate in (graph, compiled):
        assert candidate.rejected == "cudnnFinalize returned 3000: the why"
        assert not candidate.out_of_memory
    assert (legacy.name, legacy.rejected) == ("legacy:ALGO_1", None)


def test_a_refused_heuristic_of_both_providers_leaves_their_reasons(start: Start) -> None:
    core = start(convolution=REFUSED, convolution_bias=REFUSED, bias_rows=engines(2))
    core.results = cudnn_error(2000, "cudnnGet returned 2000", "cudnnGet", "")
    candidates = gather(STRICT_BIASED)
    assert order(candidates) == ["engines/add", "ALGO_0/add", "ALGO_1/add", "engines/fused"]
    assert all(c.rejected for c in candidates)


def test_the_notes_tell_determinism_and_math_type(start: Start) -> None:
    notes = [[], ["TENSOR_CORE"], ["NONDETERMINISTIC"], ["STRICT_NAN_PROP", "TENSOR_CORE"]]
    start(convolution=[FakeEngine(f"eng{i}", each) for i, each in enumerate(notes)])
    candidates = gather(FakeProblem(tf32=True))
    assert [(c.math_type, c.deterministic) for c in candidates] == [
        ("FMA_MATH", True), ("TENSOR_OP_MATH", True), ("FMA_MATH", False), ("TENSOR_OP_MATH", True),
    ]  # fmt: skip
    assert all(c.rejected is None and c.provider == "graph" for c in candidates)
    assert {(c.workspace_bytes, c.time_ms, c.skipped, c.bias) for c in candidates} == {
        (0, None, False, None)
    }


@pytest.mark.parametrize("bias", [False, True])
def test_no_way_to_run_is_named_twice(start: Start, bias: bool) -> None:
    start(
        FakeResult("ALGO_1"),
        FakeResult("ALGO_0", "FMA_MATH"),
        convolution=engines(12),
        convolution_identity=engines(12),
        convolution_bias=engines(12),
        bias_rows=engines(12),
    )
    candidates = gather(FakeProblem(tf32=True, bias=bias))
    ways = [(c.engine, c.bias) for c in candidates]
    assert len(ways) == len(set(ways)) == 26 + 12 * bias
    assert all((c.bias is not None) is bias for c in candidates)


# --- make_plan ----------------------------------------------------------------------------------


PLANS = [
    (Candidate("legacy", "ALGO_1", "FMA_MATH", True, 0), "ALGO_1"),
    (Candidate("legacy", "ALGO_1", "FMA_MATH", True, 0, bias="add"), "ALGO_1"),
    (Candidate("legacy", "ALGO_1", "FMA_MATH", True, 0, bias="eng1"), "ALGO_1 + bias_rows:eng1"),
    (Candidate("graph", "eng5_k2=3", "FMA_MATH", True, 0), "convolution:eng5_k2=3"),
    (Candidate("graph", "eng5_k2=3", "FMA_MATH", True, 0, bias="add"), "convolution:eng5_k2=3"),
    (
        Candidate("graph", "eng5_k2=3", "FMA_MATH", True, 0, bias="eng1"),
        "convolution:eng5_k2=3 + bias_rows:eng1",
    ),
    (
        Candidate("graph", "eng5_k2=3+identity", "FMA_MATH", True, 0),
        "convolution_identity:eng5_k2=3",
    ),
    (
        Candidate("graph", "eng5_k2=3", "FMA_MATH", True, 0, bias="fused"),
        "convolution_bias:eng5_k2=3",
    ),
]


@pytest.mark.parametrize(("candidate", "plan"), PLANS, ids=lambda value: str(value))
def test_a_candidate_becomes_its_plan(start: Start, candidate: Candidate, plan: str) -> None:
    each = [FakeEngine("eng5_k2=3", workspace_bytes=300)]
    start(
        FakeResult("ALGO_1", "FMA_MATH", workspace_bytes=100),
        convolution=each,
        convolution_identity=each,
        convolution_bias=each,
        bias_rows=[FakeEngine("eng1", workspace_bytes=200)],
    )
    made: Any = make_plan(replace(STRICT, bias=candidate.bias is not None), candidate)  # type: ignore[arg-type]
    assert made.name == plan
    assert made.workspace_bytes == (300 if "eng5" in plan else 200 if "eng1" in plan else 100)


def test_an_engine_that_cudnn_does_not_know_has_no_plan(start: Start) -> None:
    start(convolution=engines(1), bias_rows=engines(1))
    for candidate in (
        Candidate("graph", "engines", "DEFAULT_MATH", False, 0, bias="add"),
        Candidate("graph", "eng1", "FMA_MATH", True, 0, bias="eng9"),
    ):
        with pytest.raises(ValueError, match="expected a name such as"):
            make_plan(STRICT_BIASED, candidate)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("direction", ["dgrad", "fprop", "wgrad"])
def test_algo_0_adds_up_in_the_half_type_but_not_in_fprop(direction: str, dtype: str) -> None:
    of: Any = FakeProblem(direction, dtype)
    reason = imprecision(of, "ALGO_0", "TENSOR_OP_MATH")
    assert reason == (None if direction == "fprop" else f"it adds up in {dtype}, not in float32")
