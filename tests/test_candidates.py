"""Which candidates there are, in which order, and what is made of one: with a fake of cuDNN."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dgrad
from dgrad import _candidates
from dgrad._candidates import Blocked, gather, make_plan, pass_operation, with_best_pass
from dgrad.exceptions import cudnn_error
from dgrad.selection import Candidate
from fake_cudnn import REFUSED, FakeEngine, FakeProblem, FakeResult, Start

STRICT = FakeProblem(tf32=False)  # asks cuDNN's legacy heuristic once
BIASED = replace(STRICT, bias=True)


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
    assert order(gather(BIASED)) == [
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
    assert order(gather(BIASED)) == [
        "eng1/add", "eng2/add", "ALGO_1/eng50", "ALGO_1/add", "ALGO_1/eng51",
    ]  # fmt: skip


def test_where_nothing_may_run_no_pass_is_tried(start: Start) -> None:
    start(convolution=[FakeEngine("eng1", ["FFT"])], bias_rows=engines(2, first=50))
    assert order(gather(BIASED)) == ["eng1/add"]


def test_without_an_engine_for_the_bias_pytorch_adds_it(start: Start) -> None:
    core = start(FakeResult("ALGO_1", "FMA_MATH"), convolution=engines(2))
    assert order(gather(BIASED)) == ["eng1/add", "eng2/add", "ALGO_1/add"]
    core.engines["bias_rows"] = REFUSED
    found = gather(BIASED)
    refused = found.pop(2)
    assert order(found) == ["eng1/add", "eng2/add", "ALGO_1/add"]
    assert all(c.rejected is None for c in found)
    assert refused.rejected == "cudnnFinalize returned 3000: the why"


def test_a_pass_that_is_less_right_is_rejected_with_its_own_reason(start: Start) -> None:
    problem = replace(BIASED, dtype="float16")
    start(
        convolution=engines(1),
        bias_rows=[FakeEngine("eng50", ["REDUCED_PRECISION_REDUCTION"]), FakeEngine("eng51")],
    )
    plain, wrong, right = gather(problem)
    assert order([plain, wrong, right]) == ["eng1/add", "eng1/eng50", "eng1/eng51"]
    assert wrong.rejected == "it adds up in float16, not in float32"
    assert (plain.rejected, right.rejected) == (None, None)


@pytest.mark.parametrize("operation", ["convolution", "convolution_bias", "bias_rows"])
def test_a_cudnn_that_does_not_start_is_not_taken_for_a_refusal(
    start: Start, operation: str
) -> None:
    core = start(FakeResult("ALGO_1", "FMA_MATH"), bias_rows=engines(1))
    core.engines[operation] = cudnn_error(1001, "cudnnCreate returned 1001", "cudnnCreate", "")
    with pytest.raises(dgrad.CudnnNotInitializedError):
        gather(BIASED)


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
    problem = replace(BIASED, **changes)
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
    candidates = gather(BIASED)
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


# --- what an engine says of itself --------------------------------------------------------------

NOTES: list[tuple[str, bool, tuple[str, ...], str | None]] = [
    ("float32", True, ("TENSOR_CORE",), None),
    ("float32", False, ("TENSOR_CORE",), "it may round float32 to tf32, and allow_tf32 is off"),
    ("float32", False, (), None),
    ("float32", False, ("REDUCED_PRECISION_REDUCTION",), None),
    ("float16", False, ("TENSOR_CORE",), None),
    ("bfloat16", False, ("TENSOR_CORE",), None),
    ("float64", False, ("TENSOR_CORE",), None),
    ("float16", False, ("REDUCED_PRECISION_REDUCTION",), "it adds up in float16, not in float32"),
    ("bfloat16", False, ("REDUCED_PRECISION_REDUCTION",), "it adds up in bfloat16, not in float32"),
    ("float64", False, ("REDUCED_PRECISION_REDUCTION",), None),
    ("float16", False, ("NONDETERMINISTIC", "STRICT_NAN_PROP", "NOTE_99"), None),
    *((dtype, False, ("FFT",), "it works by FFT") for dtype in ("float16", "float32", "float64")),
    ("float32", True, ("DOWN_CONVERT_INPUTS",), "it may round its inputs to a shorter type"),
    ("float16", False, ("DOWN_CONVERT_INPUTS",), "it may round its inputs to a shorter type"),
    *(
        ("float32", True, ("TENSOR_CORE", note), "it works by Winograd's method")
        for note in ("WINOGRAD", "WINOGRAD_TILE_4x4", "WINOGRAD_TILE_6x6", "WINOGRAD_TILE_13x13")
    ),
]


@pytest.mark.parametrize(("dtype", "tf32", "notes", "reason"), NOTES)
@pytest.mark.parametrize("operation", ["convolution", "convolution_identity", "convolution_bias"])
def test_an_engine_that_is_less_right_is_rejected_by_its_notes(
    start: Start,
    operation: str,
    dtype: str,
    tf32: bool,
    notes: tuple[str, ...],
    reason: str | None,
) -> None:
    problem = FakeProblem(dtype=dtype, tf32=tf32, bias=operation == "convolution_bias")
    start(**{operation: [FakeEngine("eng5_k2=3", notes)]})
    (candidate,) = gather(problem)
    assert candidate.algorithm.startswith("eng5_k2=3")
    if reason is None:
        assert candidate.rejected is None
        make_plan(problem, candidate)  # type: ignore[arg-type]
        return
    assert candidate.rejected is not None
    assert candidate.rejected.startswith(reason)
    # A record may say otherwise: the plan is what counts.
    with pytest.raises(ValueError, match=f"^{reason}"):
        make_plan(problem, replace(candidate, rejected=None))  # type: ignore[arg-type]


@pytest.mark.parametrize("claimed", ["FMA_MATH", "TENSOR_OP_MATH"])
@pytest.mark.parametrize("operation", ["convolution", "convolution_identity", "convolution_bias"])
def test_a_plan_whose_notes_contradict_the_record_is_refused(
    start: Start, operation: str, claimed: str
) -> None:
    core = start(**{operation: [FakeEngine("eng5", [], true_notes=["TENSOR_CORE"])]})
    bias = "fused" if operation == "convolution_bias" else None
    name = "eng5+identity" if operation == "convolution_identity" else "eng5"
    candidate = Candidate("graph", name, claimed, True, 0, bias=bias)
    with pytest.raises(ValueError, match="it may round float32 to tf32"):
        make_plan(replace(STRICT, bias=bias is not None), candidate)  # type: ignore[arg-type]
    assert core.planned == [(operation, "eng5")]


def test_the_notes_of_the_convolution_count_where_a_pass_follows(start: Start) -> None:
    start(
        convolution=[FakeEngine("eng5", [], true_notes=["TENSOR_CORE"]), FakeEngine("eng6")],
        bias_rows=[FakeEngine("eng1", ["TENSOR_CORE"])],
    )
    wrong = Candidate("graph", "eng5", "FMA_MATH", True, 0, bias="eng1")
    with pytest.raises(ValueError, match="it may round float32 to tf32"):
        make_plan(BIASED, wrong)  # type: ignore[arg-type]
    make_plan(BIASED, replace(wrong, algorithm="eng6"))  # type: ignore[arg-type]


def blocked_problems(row: Blocked) -> Iterator[tuple[FakeProblem, bool]]:
    """All problems that a row of the table may mean, and whether it does."""
    for direction in ("dgrad", "fprop", "wgrad"):
        for dtype in ("float16", "bfloat16", "float32", "float64"):
            for alignment in (1, 2, 4, 8, 16):
                meant = (
                    direction == row.direction
                    and dtype in row.dtypes
                    and alignment <= row.alignment
                )
                problem = FakeProblem(direction, dtype, tf32=False, alignment=alignment)
                yield problem, meant


def test_a_blocked_engine_is_rejected_for_what_the_table_names_alone(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Blocked(
        r"eng7_k0=(?!1_).*", "wgrad", ("float16", "float32"), 8, "it is known to be wrong"
    )
    monkeypatch.setattr(_candidates, "BLOCKED", (row,))
    names = ["eng7_k0=0_k2=1", "eng7_k0=1_k2=1", "eng77_k0=0_k2=1", "eng7", "xeng7_k0=0_k2=1"]
    for problem, meant in blocked_problems(row):
        start(convolution=[FakeEngine(name) for name in names])
        plain = gather(problem)
        reasons = {c.algorithm: c.rejected for c in plain}
        expected = "it is known to be wrong" if meant else None
        assert reasons.pop("eng7_k0=0_k2=1") == expected
        assert set(reasons.values()) == {None}
        if meant:
            with pytest.raises(ValueError, match=r"^it is known to be wrong$"):
                make_plan(problem, replace(plain[0], rejected=None))  # type: ignore[arg-type]


@pytest.mark.parametrize("operation", ["convolution_identity", "convolution_bias"])
def test_a_blocked_engine_is_rejected_in_every_graph(
    start: Start, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    row = Blocked(r"eng7", "dgrad", ("float32",), 16, "it is known to be wrong")
    monkeypatch.setattr(_candidates, "BLOCKED", (row,))
    problem = replace(STRICT, bias=operation == "convolution_bias")
    start(**{operation: [FakeEngine("eng7"), FakeEngine("eng77")]})
    blocked, other = gather(problem)
    assert (blocked.rejected, other.rejected) == ("it is known to be wrong", None)
    with pytest.raises(ValueError, match=r"^it is known to be wrong$"):
        make_plan(problem, replace(blocked, rejected=None))  # type: ignore[arg-type]


@pytest.mark.parametrize("row", _candidates.BLOCKED, ids=lambda row: row.engines)
def test_the_table_of_blocked_engines_says_why(row: Blocked) -> None:
    assert "cuDNN 9." in row.reason
    assert row.direction in ("dgrad", "fprop", "wgrad")
    assert row.alignment in (1, 2, 4, 8, 16)
    assert {*row.dtypes} <= {"float16", "bfloat16", "float32", "float64"}


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
            make_plan(BIASED, candidate)  # type: ignore[arg-type]


# --- with_best_pass -----------------------------------------------------------------------------


def timed(algorithm: str, bias: str | None, time_ms: float | None, **more: Any) -> Candidate:
    return Candidate("graph", algorithm, "FMA_MATH", True, 64, time_ms, bias=bias, **more)


def test_the_fastest_convolution_is_paired_with_the_fastest_pass() -> None:
    candidates = [
        timed("eng1", "add", 3.0),
        timed("eng2", "add", 2.6),
        timed("eng1", "eng50", 2.8),
        timed("eng1", "eng51", 2.5),  # the fastest of all, with the slower convolution
        timed("eng1", "eng52", None, skipped=True),
        timed("eng3", "fused", 0.1),  # is no pass
    ]
    found = with_best_pass(candidates)
    assert found == timed("eng2", "eng51", None)
    candidates.append(replace(found, time_ms=2.1))
    assert with_best_pass(candidates) is None


@pytest.mark.parametrize(
    "candidates",
    [
        [],
        [timed("eng1", "add", None), timed("eng1", "eng50", None)],
        [timed("eng1", None, 1.0), timed("eng2", None, 2.0)],
        [timed("eng1", "fused", 1.0), timed("eng2", "fused", 2.0)],
        [timed("eng1", "add", 1.0), timed("eng2", "add", 2.0), timed("eng1", "eng50", 0.5)],
        [timed("eng1", "add", 2.0), timed("eng2", "add", 1.0), timed("eng1", "eng50", 2.5)],
    ],
)
def test_where_there_is_nothing_new_to_try_nothing_is_named(candidates: list[Candidate]) -> None:
    assert with_best_pass(candidates) is None


def test_what_turned_out_not_to_run_is_not_paired() -> None:
    candidates = [
        timed("eng1", "add", 3.0),
        timed("eng2", "add", 1.0, rejected="it failed later"),
        timed("eng3", "add", 2.0),
        timed("eng1", "eng50", 2.0, rejected="it failed later"),
        timed("eng1", "eng51", 2.5),
    ]
    assert with_best_pass(candidates) == timed("eng3", "eng51", None)


def test_a_pair_that_failed_is_not_named_again() -> None:
    candidates = [
        timed("eng1", "add", 3.0),
        timed("eng2", "add", 2.0),
        timed("eng1", "eng50", 2.5),
        timed("eng2", "eng50", None, rejected="it failed"),
    ]
    assert with_best_pass(candidates) is None


@given(
    engines=st.lists(st.floats(0.5, 9), min_size=1, max_size=6),
    passes=st.lists(st.floats(0.5, 9), min_size=1, max_size=6),
    fused=st.lists(st.floats(0.01, 9), max_size=3),
)
def test_where_times_add_up_the_pair_is_the_fastest_of_all(
    engines: list[float], passes: list[float], fused: list[float]
) -> None:
    ways = ["add", *(f"eng{way + 50}" for way in range(1, len(passes)))]

    def known(engine: int, way: int) -> Candidate:
        return timed(f"eng{engine}", ways[way], engines[engine] + passes[way])

    candidates = [
        *(known(engine, 0) for engine in range(len(engines))),
        *(known(0, way) for way in range(1, len(passes))),
        *(timed(f"eng{i + 90}", "fused", time_ms) for i, time_ms in enumerate(fused)),
    ]
    found = with_best_pass(candidates)
    tried = {(c.algorithm, c.bias): c.time_ms for c in candidates if c.bias != "fused"}
    if found is not None:
        assert (found.algorithm, found.bias) not in tried
        assert found.time_ms is None
        engine, way = int(found.algorithm[3:]), ways.index(str(found.bias))
        tried[found.algorithm, found.bias] = engines[engine] + passes[way]
    best = min(time for time in tried.values() if time is not None)
    assert best == pytest.approx(min(engines) + min(passes))
