"""Which pair of a convolution and a pass for the bias is tried beside those that are timed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgrad._candidates import with_best_pass
from dgrad.selection import Candidate


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


def test_where_pytorchs_addition_was_never_timed_there_may_be_nothing_to_pair() -> None:
    passes = [timed("eng1", "eng50", 2.0), timed("eng1", "eng51", 1.0)]
    assert with_best_pass([timed("eng1", "add", None, skipped=True), *passes]) is None


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
