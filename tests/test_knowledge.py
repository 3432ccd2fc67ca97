"""What is known of each problem: whole whatever many threads do to it, and small."""

from __future__ import annotations

import gc
import random
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dgrad
from dgrad import _candidates, _knowledge, _loader, _runner, config
from dgrad._knowledge import Knowledge, knowledge_of
from dgrad._runner import Runner
from dgrad._watch import watching
from dgrad.selection import Candidate
from fake_cudnn import (
    FakeCore,
    FakeEngine,
    FakePlan,
    FakeProblem,
    FakeResult,
    Start,
    W,
    X,
    Y,
    starting,
)

POLICY = config.policy(dgrad.Flags(selection="measure"))
CANDIDATES = [
    Candidate("graph", "eng5_k2=3_k24=0", "TENSOR_OP_MATH", True, 512, 0.1 + 0.2, bias="add"),
    Candidate("graph", "eng0+identity", "FMA_MATH", False, 2**40, None, skipped=True),
    Candidate("legacy", "ALGO_1", "FMA_MATH", True, 0, 1e-6, bias="eng1_k24=4"),
    Candidate("legacy", "FFT", "DEFAULT_MATH", True, 1, rejected="größer: ä\n\udcff", bias="fused"),
    Candidate("graph", "engines", "", False, 0, rejected="no room", out_of_memory=True),
]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    yield from starting(monkeypatch)


def known(candidates: list[Candidate]) -> Knowledge:
    return Knowledge(FakeProblem(), candidates, "measured")  # type: ignore[arg-type]


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

    on_threads(
        *(lambda i=i: update(i) for i in range(updaters)),
        *(lambda i=i: add(i) for i in range(adders)),
        pack,
        pack,
        read,
    )
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
    assert [knowledge.has_run(POLICY, 0, "measured") for _ in range(3)] == [True, False, False]
    assert knowledge.has_run(other, 2, "measured")
    assert knowledge.ran == {POLICY: (0, "measured"), other: (2, "measured")}


def test_what_ran_is_forgotten_by_policy_or_by_candidate() -> None:
    knowledge = known([*CANDIDATES])
    policies = [POLICY._replace(measure_budget=float(i)) for i in range(3)]
    for policy, chosen in zip(policies, (0, 2, 0), strict=True):
        knowledge.has_run(policy, chosen, "measured")
    knowledge.forget(chosen=1)
    knowledge.forget(policy=POLICY._replace(measure_budget=9.0))
    assert len(knowledge.ran) == 3
    knowledge.forget(chosen=0)
    assert [*knowledge.ran] == [policies[1]]
    knowledge.forget(policy=policies[1])
    assert knowledge.ran == {}


def test_one_thread_of_many_is_told_that_something_is_new() -> None:
    knowledge = known([*CANDIDATES])
    told: list[bool] = []
    on_threads(*(lambda: told.append(knowledge.has_run(POLICY, 0, "measured")) for _ in range(8)))
    assert sorted(told) == [False] * 7 + [True]


# --- memory -------------------------------------------------------------------------------------

NATIVE_BYTES = 256  # of a problem, which tracemalloc does not see: sizeof is about 230
LIMIT_BYTES = 4096


def problem_number(number: int, **changes: Any) -> Any:
    core, reason = _loader.load()
    if core is None:
        pytest.skip(f"the native module cannot be used: {reason}")
    size = 3 + number
    fields: dict[str, Any] = {
        "direction": "dgrad", "dtype": "float32", "tf32": True, "layout": "nchw",
        "x": (2, 8, 2 * size + 1, 9), "w": (4, 8, 3, 3), "y": (2, 4, size, 4),
        "padding": (0, 0), "stride": (2, 2), "dilation": (1, 1), "groups": 1, "bias": False,
        "alignment": 16, "device": 0,
    }  # fmt: skip
    return core.Problem(**(fields | changes))


class CrowdedCore(FakeCore):
    """60 candidates for each problem: 40 engines, 8 that are compiled, 12 legacy algorithms."""

    LEGACY = ("ALGO_0", "ALGO_1", "FFT", "FFT_TILING", "WINOGRAD", "WINOGRAD_NONFUSED")
    NOTES = ((), ("TENSOR_CORE",), ("TENSOR_CORE", "NONDETERMINISTIC"), ("FFT",))

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)

    def Problem(self, **fields: Any) -> Any:
        return _loader.require().Problem(**fields)

    def graph_heuristic(self, problem: Any, operation: str) -> list[FakeEngine]:
        count = {"convolution": 40, "convolution_identity": 8}[operation]
        number = self.random.randrange
        names = {}
        while len(names) < count:
            knobs = sorted(self.random.sample(range(2, 40), 3))
            name = f"eng{number(80)}" + "".join(f"_k{knob}={number(12)}" for knob in knobs)
            names[name] = FakeEngine(name, self.NOTES[number(4)])
        return [*names.values()]

    def legacy_heuristic(self, problem: Any) -> list[FakeResult]:
        size = self.random.randrange
        return [
            FakeResult(name, math_type, rejected="CUDNN_STATUS_NOT_SUPPORTED" if i == 4 else "")
            for math_type in ("TENSOR_OP_MATH", "FMA_MATH")
            for i, name in enumerate(self.LEGACY)
        ]

    def graph_plan(self, problem: Any, operation: str, engine: str) -> Any:
        return self.plan()

    def legacy_plan(self, problem: Any, algorithm: str, math_type: str) -> Any:
        return self.plan()

    def plan(self) -> Any:
        return FakePlan(self, "", self.random.randrange(1, 2**30))


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each new problem has 60 candidates, and all that may run get times of their own."""
    core = CrowdedCore()
    core.begin(monkeypatch)

    def measure(contestants: list[Any], *_: Any) -> None:
        for contestant in contestants:
            contestant.prepare()
            contestant.reached = True
            contestant.samples_ms = [core.random.uniform(0.01, 10)]
        core.attempts.clear()
        core.ran.clear()

    monkeypatch.setattr(_runner, "measure", measure)
    dgrad.plan_cache.clear()
    yield
    dgrad.plan_cache.clear()


def grown(run: Callable[[int], None], count: int) -> float:
    """By how many bytes of Python's memory each of many runs makes the process larger."""
    run(count)
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for number in range(count):
            run(number)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return (after - before) / count


def run_problem(problem: Any, **flags: Any) -> None:
    # The runner, as a plan in plan_cache, is bounded on its own.
    policy = config.policy(dgrad.Flags(**{"selection": "measure", "deterministic": True} | flags))
    Runner(problem, policy).run(X, W, Y)


def assert_remembered(count: int, candidates: int = 60) -> None:
    found = dgrad.selections()
    assert len(found) == count
    assert {len(selection.candidates) for selection, _ in found} == {candidates}
    timed = [c.time_ms for c in found[-1][0].candidates if c.time_ms is not None]
    assert len(timed) == len(set(timed)) > 20
    sizes = [c.workspace_bytes for c in found[-1][0].candidates if c.workspace_bytes]
    assert len(sizes) == len(set(sizes)) > 20


def test_a_remembered_problem_takes_less_than_4_kib(crowded: None) -> None:
    size = grown(lambda number: run_problem(problem_number(number)), 10_000)
    assert size + NATIVE_BYTES < LIMIT_BYTES
    assert_remembered(10_001)
