"""Short runs, timed on the device alone and out of its cache."""

from __future__ import annotations

import pytest

from dgrad.exceptions import TorchOutOfMemoryError
from fake_device import HOST_ROUNDS, Device, Failure, time


def test_where_the_host_may_limit_the_close_ones_are_timed_on_the_device(device: Device) -> None:
    a = device.contestant("a", 0.03, device_ms=0.020)
    b = device.contestant("b", 0.044, device_ms=0.010)
    c = device.contestant("c", 0.13, device_ms=0.001)
    assert time([a, b, c]) == [0.03, 0.044, 0.13]
    assert [each.device_ms for each in (a, b, c)] == [
        pytest.approx(0.02),
        pytest.approx(0.01),
        None,
    ]
    assert device.count("hold") == 3 + 2, "a is slower than b by more than a quarter"


def test_then_those_that_the_host_may_have_slowed_are_timed_on_the_device(device: Device) -> None:
    close = [device.contestant(name, 0.03, device_ms=0.020) for name in "ab"]
    far = [
        device.contestant("c", 0.07, device_ms=0.0050),
        device.contestant("d", 0.08, device_ms=0.0180),
        device.contestant("e", 0.09, device_ms=0.0055),
    ]
    assert time([*close, *far]) == [0.03, 0.03, 0.07, 0.08, 0.09]
    assert [len(each.device_samples_ms) for each in close] == [3, 3], "whatever the others take"
    assert [len(each.device_samples_ms) for each in far] == [3, 2, 3]


@pytest.mark.parametrize("sample", range(3))
def test_a_disturbed_sample_on_the_device_does_not_count(device: Device, sample: int) -> None:
    begin = 2 + HOST_ROUNDS * 17 + 10 * sample  # 17 runs make a sample of 0.5 ms
    disturbed = device.contestant(
        "a", 0.03, device_ms=lambda run: 0.09 if begin <= run < begin + 10 else 0.02
    )
    time([disturbed, device.contestant("b", 0.03, device_ms=0.021)])
    assert len(disturbed.device_samples_ms) == 3
    assert max(disturbed.device_samples_ms) == pytest.approx(0.09)
    assert disturbed.device_ms == pytest.approx(0.02)


def test_where_the_budget_is_spent_the_close_ones_alone_are_timed_on_the_device(
    device: Device,
) -> None:
    a, b = device.contestant("a", 0.03), device.contestant("b", 0.07)
    assert time([a, b], budget_s=0.005) == [0.03, 0.07]
    assert (a.device_ms, b.device_ms) == (pytest.approx(0.03), None)
    assert time([a, b], budget_s=1.0) == [0.03, 0.07]
    assert (a.device_ms, b.device_ms) == (pytest.approx(0.03), pytest.approx(0.07))


def test_where_many_kernels_let_the_host_limit_long_runs_the_close_ones_are_timed_too(
    device: Device,
) -> None:
    a = device.contestant("a", 0.60, device_ms=0.50, host_ms=0.59)
    b = device.contestant("b", 0.84, device_ms=0.36, host_ms=0.83)
    c = device.contestant("c", 0.96, host_ms=0.01)
    assert time([a, b, c]) == [0.60, 0.84, 0.96]
    assert [each.device_ms for each in (a, b, c)] == [
        pytest.approx(0.50),
        pytest.approx(0.36),
        None,
    ]
    assert min(device.holds_ms) >= 2 * 0.60, "the host has time to queue both runs"


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


def test_want_of_memory_beside_what_empties_the_cache_is_no_failure(device: Device) -> None:
    asked = 0

    def lack_when_held(run: int) -> float:
        nonlocal asked
        if device.held:
            asked += 1
            raise TorchOutOfMemoryError("CUDA out of memory.")
        return 0.03

    lacking = device.contestant("a", lack_when_held)
    other = device.contestant("b", 0.03)
    assert time([lacking, other]) == [0.03, 0.03]
    assert (lacking.device_ms, lacking.error, asked) == (None, None, 1)
    assert other.device_ms == pytest.approx(0.03)
