"""How often each selection ran, and what explain tells of it. A fake plays the part of cuDNN."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

import dgrad
from dgrad import _runner, config
from dgrad._knowledge import Knowledge
from dgrad._runner import Runner
from fake_cudnn import HEURISTIC, MIB, REFUSED, FakeProblem, FakeResult, Start, W, X, Y, run


def uses() -> dict[str, int]:
    return {selection.candidate.name: count for selection, count in dgrad.selections()}


def test_each_selection_has_a_count_of_its_own(start: Start) -> None:
    start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    run()
    for _ in range(9):
        run(algorithm="legacy:ALGO_0")
    assert uses() == {"legacy:ALGO_1": 1, "legacy:ALGO_0": 9}
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert uses() == {"legacy:ALGO_1": 2, "legacy:ALGO_0": 9}


def test_what_is_run_to_be_explained_is_told_of_and_not_counted(start: Start) -> None:
    start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    run()
    for rehearse in (dgrad.explain, dgrad.warm_up):
        explanation = rehearse(lambda: (run(), run(algorithm="legacy:ALGO_0")), backward=False)
        assert len(explanation.selections) == 2
        assert uses() == {"legacy:ALGO_1": 1, "legacy:ALGO_0": 0}
    run()
    run(algorithm="legacy:ALGO_0")
    assert uses() == {"legacy:ALGO_1": 2, "legacy:ALGO_0": 1}


def test_each_choice_for_one_problem_is_explained_in_order_of_first_use(start: Start) -> None:
    start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))

    def layers() -> None:
        run(workspace_limit=MIB)
        for _ in range(2):
            run(algorithm="legacy:ALGO_0")
            run()
            run(workspace_limit=MIB)
        run(FakeProblem(groups=2))

    explanation = dgrad.explain(layers)
    assert [s.candidate.algorithm for s in explanation.selections] == [
        "ALGO_1", "ALGO_0", "ALGO_1", "ALGO_1",
    ]  # fmt: skip
    titles = [block.splitlines()[0] for block in str(explanation).split("\n\n")]
    assert titles == [
        f"{FakeProblem()} under algorithm=(), workspace_limit={MIB}",
        f"{FakeProblem()} under algorithm=('legacy:ALGO_0',), workspace_limit=None",
        f"{FakeProblem()} under algorithm=(), workspace_limit=None",
        f"{FakeProblem(groups=2)}",
    ]


def test_what_other_threads_run_while_one_explains_is_counted(start: Start) -> None:
    start(FakeResult("ALGO_1"))
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
        explanation = dgrad.explain(lambda: pool.submit(run).result())
    assert explanation.selections == []
    assert uses() == {"legacy:ALGO_1": 2}


def test_what_native_code_runs_is_counted_for_its_selection(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    native = SimpleNamespace(
        UseCount=lambda: SimpleNamespace(count=0), ReadyCall=lambda **fields: fields
    )
    monkeypatch.setattr(_runner, "_loader", SimpleNamespace(require=lambda: native))
    forced = config.policy(dgrad.Flags(selection="heuristic", algorithm="legacy:ALGO_0"))
    calls: list[Any] = []
    for policy in (HEURISTIC, forced, forced):
        runner = Runner(FakeProblem(), policy)  # type: ignore[arg-type]
        runner.run(X, W, Y)
        calls.append(runner.ready(lambda: X, None))
    for call, count in zip(calls, (3, 20, 100), strict=True):
        call["uses"].count += count
    assert uses() == {"legacy:ALGO_1": 4, "legacy:ALGO_0": 122}


def test_what_takes_the_place_of_a_candidate_is_counted_anew_beside_it(start: Start) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    here, there = Runner(FakeProblem(), HEURISTIC), Runner(FakeProblem(), HEURISTIC)  # type: ignore[arg-type]
    for _ in range(3):
        here.run(X, W, Y)
        there.run(X, W, Y)
    core.failing["ALGO_1"] = REFUSED
    here.run(X, W, Y)
    assert uses() == {"legacy:ALGO_1": 6, "legacy:ALGO_0": 1}
    del core.failing["ALGO_1"]
    there.run(X, W, Y)  # it knows of no failure, and goes on
    assert uses() == {"legacy:ALGO_1": 7, "legacy:ALGO_0": 1}


def test_selections_stand_in_order_of_first_use_for_good(start: Start) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    first, second = FakeProblem(groups=2), FakeProblem()

    def told() -> list[tuple[int, str]]:
        return [(s.problem.groups, s.candidate.algorithm) for s, _ in dgrad.selections()]

    run(first)
    run(second)
    run(first, algorithm="legacy:ALGO_0")
    wanted = [(2, "ALGO_1"), (1, "ALGO_1"), (2, "ALGO_0")]
    assert told() == wanted
    run(second)
    run(first)
    core.failing["ALGO_1"] = REFUSED
    run(first)
    assert told() == [*wanted, (2, "ALGO_0")]


def test_what_is_chosen_again_goes_on_with_its_count() -> None:
    knowledge = Knowledge(FakeProblem(), [], "measured")  # type: ignore[arg-type]
    for chosen in (0, 1, 0, 1, 0):
        use, new = knowledge.has_run(HEURISTIC, chosen, "measured")
        assert new
        use.runs += 1
    assert [(use.chosen, use.count) for use in knowledge.uses] == [(0, 3), (1, 2)]
