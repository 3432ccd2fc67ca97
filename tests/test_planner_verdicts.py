"""What is told of a candidate that lost is what made it lose; and ties under an order asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

import dgrad
from dgrad import config
from dgrad._knowledge import Knowledge
from dgrad.planner import preference, selection_of, source_of
from dgrad.selection import ADD, Candidate, Selection
from fake_cudnn import MIB, FakeProblem


def engine(time_ms: float | None, device_ms: float | None = None, **fields: Any) -> Candidate:
    known = Candidate("graph", "eng", "FMA_MATH", True, 0, time_ms=time_ms, device_ms=device_ms)
    return replace(known, **fields)


def legacy(time_ms: float | None, device_ms: float | None = None, **fields: Any) -> Candidate:
    return engine(time_ms, device_ms, provider="legacy", algorithm="ALGO_1", **fields)


def select(*candidates: Candidate, chosen: int | None = None, **flags: Any) -> Selection:
    """The selection of what the planner takes, or of what it is told to have taken."""
    knowledge = Knowledge(FakeProblem(), list(candidates), "measured")  # type: ignore[arg-type]
    policy = config.policy(dgrad.Flags(**{"selection": "measure", **flags}))
    if chosen is None:
        chosen, *_ = preference(list(candidates), "dgrad", policy)
    return selection_of(knowledge, policy, chosen, source_of(knowledge, policy, chosen))


CASES: dict[str, tuple[Selection, str]] = {
    "a later place": (
        select(engine(1.0), legacy(2.0), algorithm=["legacy", "graph"]),
        "50.0 % faster, later in the order asked for",
    ),
    "a later place among names": (
        select(engine(1.0), legacy(2.0), algorithm=["legacy:ALGO_1", "graph:eng"]),
        "50.0 % faster, later in the order asked for",
    ),
    "a later place, not timed": (
        select(engine(None), legacy(2.0), algorithm=["legacy:ALGO_1", "graph:eng"]),
        "later in the order asked for",
    ),
    "what was not known then": (
        select(engine(1.0), engine(2.0, algorithm="first"), selection="heuristic", chosen=1),
        "50.0 % faster, known since",
    ),
    "cuDNN's order, timed": (
        select(legacy(2.0), engine(1.0), selection="heuristic"),
        "50.0 % faster, later in cuDNN's order",
    ),
    "cuDNN's order, the budget of an earlier measuring spent": (
        select(legacy(2.0), engine(None, skipped=True), selection="heuristic"),
        "later in cuDNN's order",
    ),
    "cuDNN's order in one place": (
        select(legacy(None), legacy(None, math_type="FMA"), algorithm="legacy:ALGO_1"),
        "later in cuDNN's order",
    ),
    "one place, timed": (
        select(legacy(1.0), legacy(1.004, workspace_bytes=MIB), algorithm="legacy:ALGO_1"),
        "0.4 % slower",
    ),
    "the budget": (
        select(legacy(1.0), engine(None, skipped=True)),
        "not timed: the budget was spent",
    ),
    "a larger workspace": (
        select(legacy(1.0), engine(0.996, workspace_bytes=MIB)),
        "0.4 % faster, within the noise and with a larger workspace",
    ),
    "not deterministic": (
        select(legacy(1.0), engine(0.996, workspace_bytes=MIB, deterministic=False)),
        "0.4 % faster, within the noise and not deterministic",
    ),
    "nothing tells them apart": (
        select(legacy(1.0), engine(0.996)),
        "0.4 % faster, within the noise",
    ),
    "the host": (
        select(engine(0.0160, 0.0109), engine(0.0218, 0.0101, bias=ADD)),
        "7.3 % faster on the device, 36.3 % slower with the host's share, it costs the host more; "
        "CUDA graphs get it",
    ),
    "the host, far behind": (
        select(engine(0.030, 0.015), engine(0.046, 0.013)),
        "13.3 % faster on the device, 53.3 % slower with the host's share, it costs the host more; "
        "CUDA graphs get it",
    ),
    "the host's share of its kind": (
        select(engine(0.023, 0.0081), legacy(0.0225, 0.0080), engine(0.019, 0.0083), chosen=0),
        "1.2 % faster on the device, 2.2 % faster with the host's share, its kind costs the host "
        "more",
    ),
    "no time on the device": (
        select(engine(0.0300, 0.0100), engine(0.0295), engine(0.0290, 0.0150)),
        "1.7 % faster, not timed on the device",
    ),
    "another measuring": (select(legacy(1.0), engine(0.5), chosen=0), "50.0 % faster, known since"),
}


def test_what_only_graphs_get_is_no_runner_up_and_no_promise() -> None:
    far, limit = engine(0.060, 0.005, workspace_bytes=MIB), 2 * MIB
    near = legacy(0.033, 0.026)
    text = str(select(engine(0.030, 0.020), near, far, workspace_limit=limit))
    assert "next legacy:ALGO_1 (FMA_MATH) 30.0 % slower on the device" in text
    assert "; CUDA graphs get graph:eng" in text
    text = str(select(engine(0.030, 0.020), near, far, workspace_limit=limit // 4))
    assert "CUDA graphs" not in text
    assert "of workspace" not in text, "eager calls would not get it"


@pytest.mark.parametrize("name", CASES)
def test_a_verdict_says_what_decided(name: str) -> None:
    selection, verdict = CASES[name]
    lost = next(i for i in (1, 0) if i != selection.chosen)
    assert selection.verdicts()[lost] == verdict
    assert selection.verdicts()[selection.chosen] == "chosen"


def test_the_log_says_what_made_the_next_one_lose() -> None:
    assert (
        "next graph:eng (FMA_MATH) 50.0 % faster, later in the order asked for, workspace"
        in str(select(legacy(2.0), engine(1.0), algorithm=["legacy", "graph"]))
    )


def test_ties_are_of_candidates_that_are_asked_for_alike() -> None:
    quick, small = legacy(1.0, workspace_bytes=MIB), legacy(1.005, math_type="FMA_MATH")
    faster = engine(0.5)
    for candidates in ([quick, small], [quick, small, faster], [quick, small, engine(1.002)]):
        chosen = select(*candidates, algorithm=["legacy", "graph"]).candidate
        assert chosen == small
    assert select(quick, small, faster, algorithm=["graph", "legacy"]).candidate == faster
    assert select(quick, small, faster).candidate == faster


def test_the_time_on_the_device_decides_among_those_asked_for_first() -> None:
    here, there = legacy(0.030, 0.015), legacy(0.031, 0.013, math_type="FMA_MATH")
    for other in (engine(0.020), engine(0.020, 0.019)):
        assert select(here, there, other, algorithm=["legacy", "graph"]).candidate == there
