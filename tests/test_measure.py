"""Timing candidates against each other, on a clock that the runs themselves advance."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from dgrad.measure import Contestant, measure
from fake_device import HOST_ROUNDS, ROUNDS, Device, Failure, rounds, time

DEVICE_RUNS = 3 * 10  # of each short one that is timed on the device, at most


def test_times_are_those_of_one_run(device: Device) -> None:
    times = [2.0, 2.2, 0.5, 0.02]
    assert time([device.contestant(str(i), t) for i, t in enumerate(times)]) == times


def test_each_is_prepared_when_its_turn_comes_and_once(device: Device) -> None:
    time([device.contestant("a", 5.0), device.contestant("b", 5.0), device.contestant("c", 50.0)])
    # One run loads kernels, another is timed.
    assert device.events[:9] == [
        "prepare a", "a", "a", "prepare b", "b", "b", "prepare c", "c", "c",
    ]  # fmt: skip
    assert sum(event.startswith("prepare") for event in device.events) == 3


def test_the_first_run_tells_nothing(device: Device) -> None:
    slow_start = device.contestant("a", lambda run: 1000.0 if run == 0 else 5.0)
    assert time([slow_start, device.contestant("b", 6.0)]) == [5.0, 6.0]


def test_one_that_is_not_wanted_is_reached_and_not_timed(device: Device) -> None:
    unwanted = Contestant(lambda: None, lambda built: None)
    assert time([unwanted, device.contestant("b", 2.0)]) == [None, 2.0]
    assert unwanted.reached
    assert unwanted.error is None


def test_one_four_times_slower_is_not_run_again(device: Device) -> None:
    time([device.contestant("a", 10.0), device.contestant("b", 41.0), device.contestant("c", 39.0)])
    assert device.count("b") == 2
    assert device.count("c") == 3  # a round, and then it is too far behind
    assert device.count("a") == 2 + ROUNDS


def test_one_that_a_later_one_beats_by_far_leaves_too(device: Device) -> None:
    contestants = [device.contestant("a", 50.0), device.contestant("b", 10.0)]
    assert time(contestants) == [50.0, 10.0]
    assert device.count("a") == 2


def test_after_each_round_those_leave_that_are_a_quarter_behind(device: Device) -> None:
    factors = {"a": 1.0, "b": 1.24, "c": 1.26, "d": 3.9, "e": 1.0}
    contestants = {name: device.contestant(name, 4.0 * f) for name, f in factors.items()}
    times = time([*contestants.values()])
    assert times == [round(4.0 * factor, 9) for factor in factors.values()]
    assert {name: rounds(each) for name, each in contestants.items()} == {
        "a": ROUNDS, "b": ROUNDS, "c": 1, "d": 1, "e": ROUNDS,
    }  # fmt: skip
    assert {name: device.count(name) - 2 for name in contestants} == {
        "a": ROUNDS, "b": ROUNDS, "c": 1, "d": 1, "e": ROUNDS,
    }  # fmt: skip


def test_one_that_falls_behind_in_a_later_round_leaves_then(device: Device) -> None:
    # One round as fast as the other, then slower: by the median it is behind after the third.
    tiring = device.contestant("a", lambda run: 10.0 if run < 3 else 20.0)
    assert time([tiring, device.contestant("b", 10.0)]) == [20.0, 10.0]
    assert rounds(tiring) == 3


def test_a_single_disturbed_sample_does_not_count(device: Device) -> None:
    disturbed = device.contestant("a", lambda run: 40.0 if run == 5 else 10.0)
    assert time([disturbed, device.contestant("b", 10.5)]) == [10.0, 10.5]
    assert rounds(disturbed) == ROUNDS


@pytest.mark.parametrize("budget_s", [None, 3e-5])
@pytest.mark.parametrize(
    ("first", "count", "slow_ms"), [(0, 1, 0.1), (0, 2, 0.1), (0, 4, 0.025), (1, 8, 0.025)]
)
def test_disturbed_samples_of_a_short_run_do_not_count(
    device: Device, budget_s: float | None, first: int, count: int, slow_ms: float
) -> None:
    # Two runs come before the first sample.
    begin, end = 2 + 50 * first, 2 + 50 * (first + count)
    disturbed = device.contestant("a", lambda run: slow_ms if begin <= run < end else 0.01)
    measure([disturbed, device.contestant("b", 0.0104)], budget_s, (Failure,))
    assert disturbed.time_ms == pytest.approx(0.01)
    assert disturbed.device_ms is not None
    assert rounds(disturbed) == HOST_ROUNDS


def test_the_single_run_before_the_rounds_does_not_count(device: Device) -> None:
    lucky = device.contestant("a", lambda run: 4.0 if run == 1 else 10.0)
    assert time([lucky, device.contestant("b", 10.0)]) == [10.0, 10.0]


@pytest.mark.parametrize(
    ("time_ms", "runs"), [(5.0, 1), (0.9, 1), (0.5, 2), (0.125, 8), (0.021, 24), (0.001, 50)]
)
def test_short_runs_are_timed_back_to_back(device: Device, time_ms: float, runs: int) -> None:
    time([device.contestant("a", time_ms), device.contestant("b", time_ms)])
    pairs = round(1 / (2 * time_ms))
    on_device = 0 if time_ms > 1 else min(DEVICE_RUNS, 3 * 2 * max(1, pairs))
    samples = HOST_ROUNDS if time_ms < 0.1 else ROUNDS
    assert device.count("a") == 2 + samples * runs + on_device
    before = device.events.index("prepare b")
    order = [event for event in device.events[before + 3 :] if event != "hold"]
    changes = sum(one != other for one, other in pairwise(order))
    assert changes <= 2 * (samples + 3) - 1, "the runs of one sample do not lie together"


def test_the_time_of_one_alone_is_a_median_too(device: Device) -> None:
    assert time([device.contestant("a", 1.1)]) == [1.1]
    assert device.count("a") == 2 + ROUNDS
    assert time([]) == []


def test_no_time_is_zero(device: Device) -> None:
    assert time([device.contestant("a", 0.0), device.contestant("b", 0.0)]) == [1e-6, 1e-6]


def test_the_order_changes_and_the_programs_random_numbers_stay(device: Device) -> None:
    random.seed(7)
    expected = random.random()
    random.seed(7)
    time([device.contestant(name, 10.0) for name in "abcdefgh"])
    assert random.random() == expected
    first = device.events.index("prepare h") + 3
    turns = [device.events[first + 8 * i : first + 8 * (i + 1)] for i in range(ROUNDS)]
    assert all(sorted(turn) == [*"abcdefgh"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) == ROUNDS


@pytest.mark.parametrize(
    "when", ["build", "prepare", "first run", "check", "second run", "a round"]
)
def test_one_that_fails_leaves_with_its_error_and_the_others_stay(
    device: Device, when: str
) -> None:
    at = {"first run": 0, "second run": 1, "a round": 4}.get(when)

    def fail(*_: object) -> Any:
        raise Failure(when)

    failing = device.contestant(
        "a",
        lambda run: fail() if run == at else 1.0,
        check=fail if when == "check" else lambda: None,
    )
    if when in ("build", "prepare"):
        setattr(failing, when, fail)
    others = [device.contestant("b", 1.0), device.contestant("c", 1.1)]
    assert time([failing, *others]) == [None, 1.0, 1.1]
    assert failing.reached
    assert isinstance(failing.error, Failure)
    assert str(failing.error) == when
    assert failing.error.__traceback__ is None, "it would hold the workspace"
    assert [rounds(each) for each in others] == [ROUNDS, ROUNDS]
    assert device.count("a") == (
        at + 1 if at is not None else {"build": 0, "prepare": 0, "check": 1}[when]
    )


def test_what_is_no_failure_of_a_candidate_is_passed_on(device: Device) -> None:
    def broken() -> Any:
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        time([device.contestant("a", 1.0), Contestant(broken, lambda built: None)])


def test_the_check_comes_once_after_the_first_run(device: Device) -> None:
    def check(name: str) -> Callable[[], None]:
        return lambda: device.events.append(f"check {name}")

    time([device.contestant(name, 10.0, check=check(name)) for name in "ab"])
    assert device.events[:8] == [
        "prepare a", "a", "check a", "a", "prepare b", "b", "check b", "b",
    ]  # fmt: skip
    assert device.count("check a") == device.count("check b") == 1


def test_late_ones_join_the_best_when_these_have_their_times(device: Device) -> None:
    first = [device.contestant("a", 10.0), device.contestant("b", 15.0)]
    known: list[float | None] = []
    joined = device.contestant("c", 9.0)

    def late() -> list[Contestant]:
        known.extend(each.time_ms for each in first)
        return [joined]

    measure(first, None, (Failure,), late)
    assert known == [10.0, 15.0]
    assert joined.reached
    assert joined.time_ms == pytest.approx(9.0)
    assert rounds(joined) == ROUNDS
    after = device.events[device.events.index("prepare c") :]
    assert after.count("a") == ROUNDS, "they were not timed together"
    assert after.count("b") == 0


def test_the_first_look_at_slow_ones_is_repeated(device: Device) -> None:
    disturbed = device.contestant("a", lambda run: 5.0 if run == 1 else 1.0)
    assert time([disturbed, device.contestant("b", 1.0)]) == [1.0, 1.0]
    assert rounds(disturbed) == ROUNDS


@pytest.mark.parametrize("late", [False, True])
def test_and_again_where_the_host_was_what_took_long(device: Device, late: bool) -> None:
    def slow(run: int) -> float:
        return 50.0 if 1 <= run <= 3 else 1.0

    disturbed = device.contestant("a", slow, host_ms=lambda run: 0.9 * slow(run))
    slower = device.contestant("b", lambda run: 9.0 if run == 1 else 8.9, host_ms=0.1)
    contestants = [slower, device.contestant("c", 1.0), disturbed]
    measure(contestants[: 2 if late else 3], None, (Failure,), lambda: contestants[2:] * late)
    assert disturbed.time_ms == pytest.approx(1.0)
    assert len(disturbed.samples_ms) > 1
    assert device.count("b") == 3, "it is slow by itself"
