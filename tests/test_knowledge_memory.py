"""What is known of a problem takes little memory, whatever was done with it."""

from __future__ import annotations

import gc
import random
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import dgrad
from dgrad import _knowledge, _loader, _measuring, config
from dgrad._runner import Runner
from dgrad._watch import watching
from dgrad.selection import Candidate
from fake_cudnn import (
    FakeCore,
    FakeEngine,
    FakePlan,
    FakeResult,
    W,
    X,
    Y,
    real_problem,
)

NATIVE_BYTES = 256  # of a problem, which tracemalloc does not see: sizeof is about 230
LIMIT_BYTES = 4096


def engine_names(count: int) -> list[str]:
    choose = random.Random(0)
    names: set[str] = set()
    while len(names) < count:
        knobs = sorted(choose.sample(range(2, 40), 3))
        values = "".join(f"_k{knob}={choose.randrange(12)}" for knob in knobs)
        names.add(sys.intern(f"eng{choose.randrange(80)}{values}"))
    return sorted(names)


NAMES = engine_names(2000)  # of all that the problems of a program meet


class CrowdedCore(FakeCore):
    """60 candidates for each problem: 40 engines, 8 that are compiled, 12 legacy algorithms."""

    LEGACY = ("ALGO_0", "ALGO_1", "FFT", "FFT_TILING", "WINOGRAD", "WINOGRAD_NONFUSED")
    NOTES = ((), ("TENSOR_CORE",), ("TENSOR_CORE", "NONDETERMINISTIC"), ("FFT",))

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(0)

    def Problem(self, **fields: Any) -> Any:
        return _loader.require().Problem(**fields)

    def graph_heuristic(self, problem: Any, operation: str) -> tuple[list[FakeEngine], list[str]]:
        count = {"convolution": 40, "convolution_identity": 8}[operation]
        chosen = self.random.sample(NAMES, count)
        return [FakeEngine(name, self.random.choice(self.NOTES)) for name in chosen], []

    def legacy_heuristic(self, problem: Any) -> list[FakeResult]:
        return [
            FakeResult(name, math_type, rejected="CUDNN_STATUS_NOT_SUPPORTED" if i == 4 else "")
            for math_type in ("TENSOR_OP_MATH", "FMA_MATH")
            for i, name in enumerate(self.LEGACY)
        ]

    def graph_plan(self, problem: Any, operation: str, engine: str) -> Any:
        return self.legacy_plan(problem, engine, "")

    def legacy_plan(self, problem: Any, algorithm: str, math_type: str) -> Any:
        return FakePlan(self, "", self.random.randrange(1, 2**30))


@pytest.fixture
def crowded(monkeypatch: pytest.MonkeyPatch) -> Iterator[CrowdedCore]:
    """Each new problem has 60 candidates, and all that may run get times of their own."""
    core = CrowdedCore()
    core.begin(monkeypatch)

    def measure(contestants: list[Any], *_: Any) -> None:
        for contestant in contestants:
            contestant.prepare(contestant.build())
            contestant.reached = True
            contestant.samples_ms = [core.random.uniform(0.01, 10)]

    monkeypatch.setattr(_measuring, "measure", measure)
    dgrad.plan_cache.clear()
    yield core
    dgrad.plan_cache.clear()


def grown(run: Callable[[int], None], count: int, unseen: int = 1) -> float:
    """By how many bytes of Python's memory each of many runs makes the process larger.

    So many before are not looked at: being looked at takes five times as long. The rest is looked
    at in two halves: in one of them the interpreter's table of strings may double, by megabytes.
    """
    for number in range(unseen):
        run(count + number)
    gc.collect()
    tracemalloc.start()
    try:
        sizes = [tracemalloc.get_traced_memory()[0]]
        for numbers in (range(count // 2), range(count // 2, count)):
            for number in numbers:
                run(number)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    return min(sizes[1] - sizes[0], sizes[2] - sizes[1]) / (count // 2)


def run_problem(core: FakeCore, problem: Any) -> None:
    # The runner, as a plan in plan_cache, is bounded on its own; so is what the fake notes.
    policy = config.policy(dgrad.Flags(selection="measure", deterministic=True))
    Runner(problem, policy).run(X, W, Y)
    core.attempts.clear()
    core.ran.clear()


def assert_remembered(count: int, candidates: int = 60, runs: int = 1) -> None:
    """So many problems, each with 60 candidates, of which many have numbers of their own."""
    remembered = _knowledge.everything()
    assert len(remembered) == count
    for knowledge in (remembered[0], remembered[count // 2], remembered[-1]):
        assert [use.count for use in knowledge.uses] == [runs]
        assert len(knowledge.candidates) == candidates
        times = [c.time_ms for c in knowledge.candidates if c.time_ms is not None]
        sizes = [c.workspace_bytes for c in knowledge.candidates if c.workspace_bytes]
        assert len(times) == len(set(times)) > 15
        assert len(sizes) == len(set(sizes)) > 15


def test_a_remembered_problem_takes_less_than_4_kib(
    crowded: CrowdedCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = crowded.random

    def read(problem: Any) -> list[Candidate]:
        return [
            Candidate(
                "graph",
                name,
                "TENSOR_OP_MATH",
                choose.random() < 0.7,
                choose.randrange(2**30),
                choose.uniform(0.01, 10),
                rejected="cudnnBackendFinalize returned 3000" if number % 4 == 3 else None,
            )
            for number, name in enumerate(choose.sample(NAMES, 60))
        ]

    monkeypatch.setattr(_knowledge.store, "read", read)
    size = grown(lambda number: run_problem(crowded, real_problem(3 + number)), 1000, unseen=9000)
    assert size + NATIVE_BYTES < LIMIT_BYTES
    assert_remembered(10000)


# As cuDNN 9.19 names its engines on an H200, and with the values that their knobs take there.
KNOBS = {
    "eng76_k2=%d_k13=%d_k18=1_k27=%d_k28=%d": (8, 2, 5, 9),
    "eng73_k2=%d_k13=%d_k18=1_k27=%d_k28=%d": (8, 2, 5, 9),
    "eng68_k2=%d_k13=0_k18=%d_k25=%d_k27=%d_k28=%d": (8, 2, 2, 9, 9),
    "eng67_k2=%d_k13=0_k18=0_k25=%d_k27=%d_k28=%d": (8, 2, 9, 9),
    "eng62_k2=%d_k13=1_k18=0_k25=%d_k27=%d_k28=%d": (6, 2, 3, 5),
    "eng38_k2=%d_k13=%d_k14=%d_k18=%d_k22=%d_k23=%d": (2, 3, 5, 2, 3, 2),
    "eng58_k2=%d_k5=%d_k14=%d": (5, 5, 5),
    "eng25_k2=%d_k3=%d": (9, 2),
    "eng0": (),
}
REASONS = (
    "it may round float32 to tf32, and allow_tf32 is off",
    "it works by Winograd's method, which can lose NaN",
    "cudnnBackendFinalize returned 3007: CUDNN_STATUS_NOT_SUPPORTED_SHARED_MEMORY_INSUFFICIENT",
)


def real_looking(choose: random.Random, count: int) -> list[Candidate]:
    """Engines with knobs, their times as events tell them, and of the fastest the device's."""
    found: dict[str, Candidate] = {}
    while len(found) < count:
        pattern = choose.choice([*KNOBS])
        name = pattern % tuple(choose.randrange(most) for most in KNOBS[pattern])
        name += "+identity" if choose.random() < 0.2 else ""
        fails, runs = choose.random() < 0.2, choose.randrange(1, 10)
        time_ms = torch.tensor(choose.uniform(0.1, 5.0)).item() / runs  # events tell float32
        found[name] = Candidate(
            "graph",
            name,
            choose.choice(["TENSOR_OP_MATH", "FMA_MATH"]),
            choose.random() < 0.7,
            choose.choice([0, 512 * choose.randrange(2**21)]),
            None if fails else time_ms,
            0.9 * time_ms if not fails and time_ms < 0.5 else None,
            rejected=choose.choice(REASONS) if fails else None,
        )
    return [*found.values()]


def test_a_problem_of_128_candidates_takes_less_than_4_kib_too(
    crowded: CrowdedCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = crowded.random
    monkeypatch.setattr(_knowledge.store, "read", lambda problem: real_looking(choose, 128))
    size = grown(lambda number: run_problem(crowded, real_problem(3 + number)), 100)
    assert size + NATIVE_BYTES < LIMIT_BYTES
    assert_remembered(101, candidates=128)


def test_a_problem_that_was_measured_takes_no_more(crowded: CrowdedCore) -> None:
    size = grown(lambda number: run_problem(crowded, real_problem(3 + number)), 200)
    assert size + NATIVE_BYTES < LIMIT_BYTES
    assert_remembered(201)


def test_a_strict_problem_that_was_measured_takes_twice_that(crowded: CrowdedCore) -> None:
    """As it is measured with tf32 too."""

    def run(number: int) -> None:
        run_problem(crowded, real_problem(3 + number, tf32=False))

    assert grown(run, 80) / 2 + NATIVE_BYTES < LIMIT_BYTES
    assert len(_knowledge.everything()) == 162


def test_a_problem_that_was_explained_takes_no_more(crowded: CrowdedCore) -> None:
    def run(number: int) -> None:
        with watching() as events:
            run_problem(crowded, real_problem(3 + number))
        assert len(events) == 1

    assert grown(run, 100) + NATIVE_BYTES < LIMIT_BYTES
    assert_remembered(101, runs=0)


def test_a_problem_that_lent_its_times_takes_no_more(crowded: CrowdedCore) -> None:
    def run(number: int) -> None:
        run_problem(crowded, real_problem(3 + number))
        run_problem(crowded, real_problem(3 + number, tf32=False))

    assert grown(run, 80) / 2 + NATIVE_BYTES < LIMIT_BYTES
    assert len(dgrad.selections()) == 162


def test_a_problem_that_nothing_could_run_takes_no_more(crowded: CrowdedCore) -> None:
    policy = config.policy(dgrad.Flags(workspace_limit=0))

    def run(number: int) -> None:
        with pytest.raises(dgrad.NotSupportedError):
            Runner(real_problem(3 + number), policy).run(X, W, Y)

    assert grown(run, 100) + NATIVE_BYTES < LIMIT_BYTES
