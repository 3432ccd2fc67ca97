"""Which candidates may not run: by what an engine says of itself, or as one known to be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from dgrad import _candidates
from dgrad._candidates import Blocked, gather, make_plan
from dgrad.selection import Candidate
from fake_cudnn import STRICT, STRICT_BIASED, FakeEngine, FakeProblem, FakeResult, Start

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
        bias_rows=[FakeEngine("eng1")],
    )
    wrong = Candidate("graph", "eng5", "FMA_MATH", True, 0, bias="eng1")
    with pytest.raises(ValueError, match="it may round float32 to tf32"):
        make_plan(STRICT_BIASED, wrong)  # type: ignore[arg-type]
    make_plan(STRICT_BIASED, replace(wrong, algorithm="eng6"))  # type: ignore[arg-type]


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


@pytest.mark.parametrize(
    ("layout", "dtype", "y", "alignment", "words"),
    [
        ("nchw", "float16", (1, 8, 2, 4), 16, None),  # 128 bytes
        ("nchw", "float32", (1, 8, 1, 4), 16, None),
        ("nchw", "float32", (1, 8, 1, 4), 8, "it was not tried at addresses"),
        ("nchw", "bfloat16", (3, 8, 2, 5), 16, "its result is wrong in nchw"),
        ("nchw", "float16", (1, 8, 1, 4), 16, "its result is wrong in nchw"),
        ("nchw", "float32", (5, 4, 3, 2), 16, "its result is wrong in nchw"),
        ("nhwc", "float16", (1, 8, 1, 4), 16, None),
    ],
)
def test_engine_70_is_blocked_by_the_bytes_of_y(
    start: Start, layout: str, dtype: str, y: tuple[int, ...], alignment: int, words: str | None
) -> None:
    start(convolution=[FakeEngine("eng70")])
    problem = FakeProblem("wgrad", dtype, tf32=True, alignment=alignment)
    (candidate, *_) = gather(replace(problem, layout=layout, y=y))
    assert (candidate.rejected or "").startswith(words or "")
    assert (candidate.rejected is None) == (words is None)


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


def test_a_stored_pass_behind_a_legacy_call_is_judged_by_its_notes_too(start: Start) -> None:
    notes = ("DOWN_CONVERT_INPUTS",)
    passes = [FakeEngine("eng1", (), true_notes=notes), FakeEngine("eng2")]
    start(FakeResult("ALGO_1", math_type="FMA_MATH"), bias_rows=passes)
    stored = Candidate("legacy", "ALGO_1", "FMA_MATH", True, 0, bias="eng1")
    with pytest.raises(ValueError, match="it may round its inputs to a shorter type"):
        make_plan(STRICT_BIASED, stored)  # type: ignore[arg-type]
    make_plan(STRICT_BIASED, replace(stored, bias="eng2"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("engine", "direction", "is_blocked"),
    [
        ("eng67", "wgrad", True),
        ("eng67_k2=0", "wgrad", True),
        ("eng670", "wgrad", False),
        ("eng67", "dgrad", False),
        ("eng47", "wgrad", True),
        ("eng47_k2=0", "wgrad", True),
        ("eng47_k0=0_k2=0", "wgrad", True),
        ("eng47_k0=1_k2=0", "wgrad", False),
        ("eng47_k0=10_k2=0", "wgrad", True),
        ("eng470_k0=0", "wgrad", False),
    ],
)
def test_no_name_of_a_blocked_engine_gets_by(
    start: Start, engine: str, direction: str, is_blocked: bool
) -> None:
    dtype = "float32" if engine.startswith("eng67") else "float16"
    start(convolution=[FakeEngine(engine)])
    (candidate, *_) = gather(FakeProblem(direction, dtype, tf32=True, alignment=8))
    assert (candidate.rejected is not None) == is_blocked


@pytest.mark.parametrize("row", _candidates.BLOCKED, ids=lambda row: row.engines)
def test_the_table_of_blocked_engines_says_why(row: Blocked) -> None:
    assert "cuDNN 9." in row.reason
    assert row.direction in ("dgrad", "fprop", "wgrad")
    assert row.alignment in (1, 2, 4, 8, 16)
    assert {*row.dtypes} <= {"float16", "bfloat16", "float32", "float64"}
