"""What is known of each problem: whole whatever many threads do to it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgrad
from dgrad import _knowledge, config
from dgrad._knowledge import Knowledge, knowledge_of
from dgrad.selection import Candidate
from fake_cudnn import FakeProblem, FakeResult, Start
from known import CANDIDATES, known

POLICY = config.policy(dgrad.Flags(selection="measure"))


# --- packing ------------------------------------------------------------------------------------


def test_packing_loses_nothing() -> None:
    knowledge = known([*CANDIDATES])
    for _ in range(3):
        knowledge.pack()
        knowledge.pack()
        assert knowledge.candidates == CANDIDATES
        assert [type(c.time_ms) for c in knowledge.candidates] == [
            float, type(None), float, type(None), type(None),
        ]  # fmt: skip


@settings(deadline=None)
@given(
    st.lists(
        st.builds(
            Candidate,
            provider=st.sampled_from(["graph", "legacy"]),
            algorithm=st.text(),
            math_type=st.text(),
            deterministic=st.booleans(),
            workspace_bytes=st.integers(0, 2**63),
            time_ms=st.none() | st.floats(allow_nan=False),
            skipped=st.booleans(),
            rejected=st.none() | st.text(),
            out_of_memory=st.booleans(),
            bias=st.none() | st.text(),
        )
    )
)
def test_packing_loses_nothing_of_any_candidates(candidates: list[Candidate]) -> None:
    knowledge = known([*candidates])
    knowledge.pack()
    assert knowledge.candidates == candidates


def test_what_was_only_looked_at_is_not_packed_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[int] = []
    real = _knowledge.pack
    monkeypatch.setattr(_knowledge, "pack", lambda c: packed.append(len(c)) or real(c))
    knowledge = known([*CANDIDATES])
    for _ in range(3):
        knowledge.pack()
        assert knowledge.candidates == CANDIDATES
    assert packed == [5]
    knowledge.add(CANDIDATES[0])
    knowledge.pack()
    knowledge.update(0, time_ms=7.0)
    knowledge.pack()
    assert packed == [5, 6, 6]


def test_what_is_packed_is_changed_and_added_to_as_what_is_not() -> None:
    knowledge = known([*CANDIDATES])
    knowledge.pack()
    changed = knowledge.update(1, time_ms=2.0, skipped=False)
    knowledge.pack()
    assert knowledge.add(replace(CANDIDATES[0], bias="eng7")) == 5
    knowledge.pack()
    assert changed == replace(CANDIDATES[1], time_ms=2.0, skipped=False)
    assert knowledge.candidates == [
        CANDIDATES[0], changed, *CANDIDATES[2:], replace(CANDIDATES[0], bias="eng7"),
    ]  # fmt: skip


def test_the_list_that_is_given_out_is_a_copy() -> None:
    knowledge = known([*CANDIDATES])
    for packed in (False, True):
        if packed:
            knowledge.pack()
        knowledge.candidates.clear()
        assert knowledge.candidates == CANDIDATES


def on_threads(*works: Callable[[], None]) -> None:
    """Run all at once, and raise what one of them raises."""
    errors: list[BaseException] = []
    ready = threading.Barrier(len(works))

    def guarded(work: Callable[[], None]) -> None:
        try:
            ready.wait()
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_no_change_is_lost_where_threads_update_add_read_and_pack_at_once() -> None:
    turns, updaters, adders = 200, 4, 2
    knowledge = known([replace(CANDIDATES[0], algorithm=f"eng{i}") for i in range(updaters)])
    done = threading.Event()
    left = updaters + adders
    lock = threading.Lock()

    def finished() -> None:
        nonlocal left
        with lock:
            left -= 1
            if left == 0:
                done.set()

    def update(mine: int) -> None:
        try:
            for turn in range(turns):
                seen = knowledge.candidates[mine]
                assert seen.workspace_bytes == (turn if turn else 512)
                knowledge.update(mine, workspace_bytes=turn + 1)
                if turn % 7 == 0:
                    knowledge.pack()
        finally:
            finished()

    def add(mine: int) -> None:
        try:
            for turn in range(turns):
                mark = Candidate("legacy", f"added {mine}", "", True, turn)
                index = knowledge.add(mark)
                assert knowledge.candidates[index] == mark
                knowledge.update(index, time_ms=float(turn))
        finally:
            finished()

    def pack() -> None:
        while not done.is_set():
            knowledge.pack()

    def read() -> None:
        while not done.is_set():
            now = knowledge.candidates
            assert [c.algorithm for c in now[:updaters]] == [f"eng{i}" for i in range(updaters)]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads take turns where a lock lets them
    try:
        on_threads(
            *(lambda i=i: update(i) for i in range(updaters)),
            *(lambda i=i: add(i) for i in range(adders)),
            pack,
            pack,
            read,
        )
    finally:
        sys.setswitchinterval(interval)
    knowledge.pack()
    now = knowledge.candidates
    assert [c.workspace_bytes for c in now[:updaters]] == [turns] * updaters
    for mine in range(adders):
        added = [c for c in now if c.algorithm == f"added {mine}"]
        assert [(c.workspace_bytes, c.time_ms) for c in added] == [
            (turn, float(turn)) for turn in range(turns)
        ]
    assert len(now) == updaters + adders * turns


def test_a_problem_is_known_once_whoever_asks_first(start: Start) -> None:
    start(FakeResult("ALGO_1"))
    found: list[Knowledge] = []
    on_threads(*(lambda: found.append(knowledge_of(FakeProblem())) for _ in range(8)))  # type: ignore[arg-type]
    assert len({id(each) for each in found}) == 1


# --- what has run -------------------------------------------------------------------------------


def test_what_runs_is_new_once_for_each_policy() -> None:
    knowledge = known([*CANDIDATES])
    other = POLICY._replace(deterministic=True)
    told = [knowledge.has_run(POLICY, 0, "measured") for _ in range(3)]
    assert [new for _, new in told] == [True, False, False]
    assert len({id(use) for use, _ in told}) == 1
    assert knowledge.has_run(other, 2, "stored")[1]
    uses = [(use.policy, use.chosen, use.source) for use in knowledge.uses]
    assert uses == [(POLICY, 0, "measured"), (other, 2, "stored")]


def test_what_ran_is_forgotten_by_policy_or_by_candidate_and_its_counts_stay() -> None:
    knowledge = known([*CANDIDATES])
    policies = [POLICY._replace(measure_budget=float(i)) for i in range(3)]
    choices = list(zip(policies, (0, 2, 0), strict=True))

    def new() -> list[bool]:
        return [knowledge.has_run(policy, chosen, "measured")[1] for policy, chosen in choices]

    assert new() == [True] * 3
    knowledge.forget(chosen=1)
    knowledge.forget(policy=POLICY._replace(measure_budget=9.0))
    assert new() == [False] * 3
    knowledge.forget(chosen=0)
    assert new() == [True, False, True]
    knowledge.forget(policy=policies[1])
    assert new() == [False, True, False]
    assert [use.policy for use in knowledge.uses] == policies


def test_one_thread_of_many_is_told_that_something_is_new() -> None:
    knowledge = known([*CANDIDATES])
    told: list[bool] = []
    on_threads(
        *(lambda: told.append(knowledge.has_run(POLICY, 0, "measured")[1]) for _ in range(8))
    )
    assert sorted(told) == [False] * 7 + [True]
