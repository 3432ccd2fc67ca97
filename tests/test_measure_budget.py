"""What is built and timed within a budget, and the threads that build."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from time import sleep
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgrad import measure as measuring
from dgrad.measure import Contestant, measure
from fake_device import HOST_ROUNDS, ROUNDS, Device, Failure, rounds, time


def test_when_the_budget_is_spent_no_further_one_is_begun(device: Device) -> None:
    names = "abcd"
    contestants = [device.contestant(name, 10.0) for name in names]
    assert time(contestants, budget_s=0.03) == [10.0, 10.0, None, None]
    assert [each.reached for each in contestants] == [True, True, False, False]
    assert device.count("prepare b") == 1
    assert device.count("prepare c") == device.count("c") == 0


def test_without_a_budget_all_are_reached(device: Device) -> None:
    contestants = [device.contestant(str(i), 1e4) for i in range(50)]
    assert None not in time(contestants)
    assert all(each.reached and rounds(each) == ROUNDS for each in contestants)


def test_a_budget_of_nothing_times_at_most_one(device: Device) -> None:
    contestants = [device.contestant("a", 1.0), device.contestant("b", 1.0)]
    assert time(contestants, budget_s=0.0) == [1.0, None]


def test_a_budget_that_ends_before_the_first_is_built_times_that_one(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_PATIENCE_S", 0.001)
    first, second = device.contestant("a", 10.0), device.contestant("b", 10.0)

    def build() -> str:
        device.now_ms = device.host_now_ms = 1000.0
        sleep(0.1)  # meanwhile the caller looks at the budget
        return "plan of a"

    first.build = build
    assert time([first, second], budget_s=0.3) == [10.0, None]


def test_a_budget_that_ends_in_the_rounds_keeps_what_was_sampled(device: Device) -> None:
    contestants = [device.contestant("a", 10.0), device.contestant("b", 11.0)]
    assert time(contestants, budget_s=0.085) == [10.0, 11.0]
    assert [rounds(each) for each in contestants] == [3, 3]


@pytest.mark.parametrize("broken", ["pool", "thread's build"])
def test_where_no_thread_can_build_the_caller_does(
    device: Device, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    caller = threading.get_ident()

    def elsewhere(real: Callable[[], Any]) -> Callable[[], Any]:
        def build() -> Any:
            if threading.get_ident() != caller:
                raise Failure("no handle on this thread")
            return real()

        return build

    def submit(*_: object) -> Any:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    contestants = [device.contestant("a", 1.0), device.contestant("b", 1.5)]
    if broken == "pool":
        monkeypatch.setattr(measuring.ThreadPoolExecutor, "submit", submit)
    else:
        for contestant in contestants:
            contestant.build = elsewhere(contestant.build)
    assert time(contestants) == [1.0, 1.5]


def test_long_runs_that_were_built_within_the_budget_do_not_spend_more(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_AHEAD", 4)
    contestants = [device.contestant(str(i), 100.0) for i in range(4)]
    assert time(contestants, budget_s=0.15) == [100.0, None, None, None]
    assert [each.reached for each in contestants] == [True, False, False, False]


def test_builds_run_ahead_in_threads_and_stop_with_the_budget(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_AHEAD", 4)
    monkeypatch.setattr(measuring, "_BUILDERS", 2)
    contestants = [device.contestant(str(i), 5.0) for i in range(8)]
    threads: set[str] = set()
    begun = threading.Event()
    spent = threading.Event()

    def long(built: str, is_last: bool) -> Callable[[], str]:
        def build() -> str:
            threads.add(threading.current_thread().name)
            if is_last:
                begun.set()
            assert spent.wait(30)
            return built

        return build

    for number in (3, 4):
        contestants[number].build = long(f"plan of {number}", number == 4)

    def check() -> None:  # both threads have one of the long ones, and the fifth waits for a thread
        assert begun.wait(30)
        threading.Timer(0.2, spent.set).start()

    contestants[2].check = check
    # Two runs of three, and the budget is spent: what is being built is timed, no other is begun.
    assert time(contestants, budget_s=0.025) == [5.0] * 5 + [None] * 3
    assert [each.reached for each in contestants] == [True] * 5 + [False] * 3
    assert threads == {"dgrad-build_0", "dgrad-build_1"}


def test_while_one_is_built_others_are_timed(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "_AHEAD", 4)
    monkeypatch.setattr(measuring, "_BUILDERS", 2)
    timed = threading.Event()

    def compile() -> str:
        assert timed.wait(30), "the others wait for it"
        return "plan of b"

    first, compiled, last = (device.contestant(name, 10.0) for name in "abc")
    compiled.build = compile
    last.check = timed.set
    assert time([first, compiled, last]) == [10.0, 10.0, 10.0]


@settings(deadline=None, max_examples=100)
@given(
    times=st.lists(st.floats(0.01, 0.099) | st.floats(0.101, 100), min_size=1, max_size=12),
    budget_s=st.none() | st.floats(0, 2),
)
def test_whatever_the_times_those_that_are_reached_get_theirs(
    times: list[float], budget_s: float | None
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        device = Device(patch)
        contestants = [device.contestant(str(i), t) for i, t in enumerate(times)]
        measure(contestants, budget_s, (Failure,))
    for each, expected in zip(contestants, times, strict=True):
        assert (each.time_ms is not None) is each.reached
        assert each.time_ms is None or each.time_ms == pytest.approx(expected)
    most = HOST_ROUNDS if min(times) < 0.1 else ROUNDS  # then the host may be what limits
    assert max(map(rounds, contestants)) <= most
    reached = [each.reached for each in contestants]
    assert reached == sorted(reached, reverse=True), "the promising ones come first"
    if budget_s is None:
        assert all(reached)
        fastest = min(contestants, key=lambda each: each.time_ms or 0.0)
        assert rounds(fastest) == most


def test_a_candidate_that_cannot_be_built_keeps_nothing_of_its_callers(device: Device) -> None:
    class Held:
        pass

    def build() -> None:
        raise Failure("cannot be built")

    def call() -> weakref.ref[Held]:
        held = Held()
        failing = Contestant(build, lambda built: None)
        assert time([failing, device.contestant("a", 0.03)]) == [None, 0.03]
        assert str(failing.error) == "cannot be built"
        return weakref.ref(held)

    gc.disable()  # of what refers to itself nothing goes without it
    try:
        assert call()() is None
    finally:
        gc.enable()
