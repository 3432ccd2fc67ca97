"""Timing candidates against each other, on a clock that the runs themselves advance."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgrad import measure as measuring
from dgrad.measure import Contestant, measure

ROUNDS = 5
DEVICE_RUNS = 3 * 10  # of each short one that is timed on the device, at most


class Failure(Exception):
    pass


class Device:
    """A GPU on which each run takes what it is told to, and nothing else takes time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms = 0.0
        self.held = False  # then the host does not limit
        self.cold = False  # nothing of a run's tensors is in the cache
        self.memory = True
        self.events: list[str] = []
        cuda = SimpleNamespace(Event=lambda enable_timing: FakeEvent(self), _sleep=self.hold)
        fake = SimpleNamespace(cuda=cuda, empty=self.empty, uint8=None)
        monkeypatch.setattr(measuring, "torch", fake)
        clock = SimpleNamespace(perf_counter=lambda: self.now_ms / 1e3)
        monkeypatch.setattr(measuring, "time", clock)
        monkeypatch.setattr(measuring, "_AHEAD", 1)

    def hold(self, cycles: int) -> None:
        self.held = True
        self.events.append("hold")

    def empty(self, size: int, dtype: object, device: str) -> Any:
        if not self.memory:
            raise Failure("no memory")
        return SimpleNamespace(zero_=self.flush)

    def flush(self) -> None:
        assert self.held
        self.now_ms += 0.07
        self.cold = True

    def contestant(
        self,
        name: str,
        time_ms: float | Callable[[int], float],
        *,
        device_ms: float | None = None,
        cold_ms: float = 0.0,
        check: Callable[[], None] = lambda: None,
    ) -> Contestant:
        """One whose runs take so many milliseconds; a function is given the number of the run.

        On the device alone they take ``device_ms``, or the same; ``cold_ms`` more out of its cache.
        """
        runs = 0

        def run() -> None:
            nonlocal runs
            self.events.append(name)
            if self.held and device_ms is not None:
                self.now_ms += device_ms
            else:
                self.now_ms += time_ms(runs) if callable(time_ms) else time_ms
            self.now_ms += cold_ms if self.cold else 0.0
            self.cold = False
            runs += 1

        def prepare(built: object) -> Callable[[], None]:
            assert built == f"plan of {name}"
            self.events.append(f"prepare {name}")
            return run

        return Contestant(lambda: f"plan of {name}", prepare, check)

    def count(self, name: str) -> int:
        return self.events.count(name)


class FakeEvent:
    def __init__(self, device: Device) -> None:
        self._device = device
        self._at_ms = 0.0

    def record(self) -> None:
        self._at_ms = self._device.now_ms

    def synchronize(self) -> None:
        self._device.held = False

    def elapsed_time(self, end: FakeEvent) -> float:
        return end._at_ms - self._at_ms


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


def time(contestants: Sequence[Contestant], budget_s: float | None = None) -> list[float | None]:
    measure([*contestants], budget_s, (Failure,))
    return [c if c is None else round(c, 9) for c in (each.time_ms for each in contestants)]


def rounds(contestant: Contestant) -> int:
    """How many rounds it took part in, where it was timed."""
    return len(contestant.samples_ms)


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


def test_a_budget_that_ends_in_the_rounds_keeps_what_was_sampled(device: Device) -> None:
    contestants = [device.contestant("a", 10.0), device.contestant("b", 11.0)]
    assert time(contestants, budget_s=0.085) == [10.0, 11.0]
    assert [rounds(each) for each in contestants] == [3, 3]


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
@pytest.mark.parametrize("sample", [0, 1])
def test_a_disturbed_sample_of_a_short_run_does_not_count(
    device: Device, budget_s: float | None, sample: int
) -> None:
    # Of 50 runs back to back after the first two; without budget there are two such samples.
    first, last = 2 + 50 * sample, 52 + 50 * sample
    disturbed = device.contestant("a", lambda run: 0.025 if first <= run < last else 0.01)
    contestants = [disturbed, device.contestant("b", 0.0104)]
    for each in contestants:
        each.run = None
    measure(contestants, budget_s, (Failure,))
    assert disturbed.time_ms == pytest.approx(0.01)
    assert disturbed.device_ms is not None


def test_the_single_run_before_the_rounds_does_not_count(device: Device) -> None:
    lucky = device.contestant("a", lambda run: 4.0 if run == 1 else 10.0)
    assert time([lucky, device.contestant("b", 10.0)]) == [10.0, 10.0]


@pytest.mark.parametrize(
    ("time_ms", "runs"), [(5.0, 1), (0.9, 1), (0.5, 2), (0.125, 8), (0.021, 48), (0.001, 50)]
)
def test_short_runs_are_timed_back_to_back(device: Device, time_ms: float, runs: int) -> None:
    time([device.contestant("a", time_ms), device.contestant("b", time_ms)])
    pairs = round(1 / (2 * time_ms))
    on_device = 0 if time_ms > 1 else min(DEVICE_RUNS, 3 * 2 * max(1, pairs))
    assert device.count("a") == 2 + ROUNDS * runs + on_device
    before = device.events.index("prepare b")
    order = [event for event in device.events[before + 3 :] if event != "hold"]
    changes = sum(one != other for one, other in pairwise(order))
    assert changes <= 2 * (ROUNDS + 3) - 1, "the runs of one sample do not lie together"


def test_one_alone_is_run_twice(device: Device) -> None:
    assert time([device.contestant("a", 1.1)]) == [1.1]
    assert device.count("a") == 2
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


def test_where_the_host_may_limit_the_close_ones_are_timed_on_the_device(device: Device) -> None:
    a = device.contestant("a", 0.03, device_ms=0.020)
    b = device.contestant("b", 0.044, device_ms=0.010)
    c = device.contestant("c", 0.046, device_ms=0.001)
    assert time([a, b, c]) == [0.03, 0.044, 0.046]
    assert [each.device_ms for each in (a, b, c)] == [
        pytest.approx(0.02),
        pytest.approx(0.01),
        None,
    ]
    assert device.count("hold") == 3 + 1, "a is slower than b by more than a quarter"


def test_what_one_alone_takes_on_the_device_is_known_too(device: Device) -> None:
    alone = device.contestant("a", 0.03, device_ms=0.02)
    assert time([alone]) == [0.03]
    assert alone.device_ms == pytest.approx(0.02)


def test_half_of_the_runs_on_the_device_find_nothing_in_its_cache(device: Device) -> None:
    contestant = device.contestant("a", 0.03, device_ms=0.02, cold_ms=0.008)
    assert time([contestant]) == [0.03]
    assert contestant.device_ms == pytest.approx(0.024)


def test_without_memory_to_empty_the_cache_with_it_stays_as_it_is(device: Device) -> None:
    device.memory = False
    contestant = device.contestant("a", 0.03, device_ms=0.02, cold_ms=0.008)
    assert time([contestant]) == [0.03]
    assert contestant.device_ms == pytest.approx(0.02)
    assert contestant.error is None


def test_where_the_cache_may_help_those_not_far_behind_are_timed_out_of_it(device: Device) -> None:
    a = device.contestant("a", 0.20, cold_ms=0.08)
    b = device.contestant("b", 0.21, cold_ms=0.02)
    c = device.contestant("c", 0.26)
    assert time([a, b, c]) == [0.20, 0.21, 0.26]
    assert [each.device_ms for each in (a, b, c)] == [
        pytest.approx(0.24),
        pytest.approx(0.22),
        None,
    ]


def test_long_runs_are_not_timed_on_the_device_alone(device: Device) -> None:
    contestants = [device.contestant("a", 1.1), device.contestant("b", 1.1)]
    assert time(contestants) == [1.1, 1.1]
    assert [each.device_ms for each in contestants] == [None, None]
    assert device.count("hold") == 0


def test_one_that_fails_on_the_device_leaves(device: Device) -> None:
    def fail_when_held(run: int) -> float:
        if device.held:
            raise Failure("held")
        return 0.03

    failing = device.contestant("a", fail_when_held)
    other = device.contestant("b", 0.03)
    assert time([failing, other]) == [None, 0.03]
    assert failing.device_ms is None
    assert str(failing.error) == "held"
    assert other.device_ms == pytest.approx(0.03)


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


def test_the_first_look_at_slow_ones_is_repeated(device: Device) -> None:
    disturbed = device.contestant("a", lambda run: 5.0 if run == 1 else 1.0)
    assert time([disturbed, device.contestant("b", 1.0)]) == [1.0, 1.0]
    assert rounds(disturbed) == ROUNDS


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
    times=st.lists(st.floats(0.01, 100), min_size=1, max_size=12),
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
        assert rounds(each) <= ROUNDS
    reached = [each.reached for each in contestants]
    assert reached == sorted(reached, reverse=True), "the promising ones come first"
    if budget_s is None:
        assert all(reached)
        fastest = min(contestants, key=lambda each: each.time_ms or 0.0)
        within = [t for t in times if t <= 4 * min(times)]
        assert rounds(fastest) == (ROUNDS if len(within) > 1 else 1)
