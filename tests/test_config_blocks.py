"""Flags hold in their block and after set_flags, also where blocks and threads meet."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest

import dgrad
from dgrad import config

pytestmark = pytest.mark.usefixtures("restored_flags")

DEFAULTS = config.Flags()


def test_blocks_nest_and_change_only_what_they_name() -> None:
    with dgrad.flags(deterministic=True, workspace_limit=100):
        with dgrad.flags(workspace_limit="1KiB", fallback="error"):
            assert config.policy() == config.Policy("measure", 0.3, (), 1024, True, "error")
        assert config.policy() == config.Policy("measure", 0.3, (), 100, True, "pytorch")
    assert config.current() == DEFAULTS


def test_an_exception_restores_the_flags_and_goes_on() -> None:
    with pytest.raises(KeyError), dgrad.flags(deterministic=True, fallback="error"):
        raise KeyError
    assert config.current() == DEFAULTS


def test_what_is_set_inside_a_block_holds_until_the_end_of_the_innermost() -> None:
    with dgrad.flags(deterministic=True):
        with dgrad.flags(fallback="error"):
            dgrad.set_flags(workspace_limit=7, fallback="pytorch")
            inside = config.Flags(workspace_limit=7, deterministic=True, fallback="pytorch")
            assert config.current() == inside
        assert config.current() == config.Flags(deterministic=True)


def test_a_block_restores_what_set_flags_changed_inside() -> None:
    dgrad.set_flags(workspace_limit=1)
    with dgrad.flags(deterministic=True):
        dgrad.set_flags(workspace_limit=2)
    assert config.current() == config.Flags(workspace_limit=1)


def test_a_block_that_ends_takes_back_its_own_settings_only() -> None:
    dgrad.set_flags(workspace_limit=1)
    first = dgrad.flags(deterministic=True, fallback="error")
    second = dgrad.flags(selection="heuristic", fallback="pytorch")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    expected = config.Flags(selection="heuristic", workspace_limit=1, fallback="pytorch")
    assert config.current() == expected
    second.__exit__(None, None, None)
    assert config.current() == config.Flags(workspace_limit=1)


def test_blocks_of_two_threads_leave_nothing_behind() -> None:
    inside, outside = threading.Event(), threading.Event()
    found: list[config.Flags] = []

    def other() -> None:
        with dgrad.flags(selection="heuristic"):
            inside.set()
            assert outside.wait(10)
            found.append(config.current())

    thread = threading.Thread(target=other)
    with dgrad.flags(deterministic=True):
        thread.start()
        assert inside.wait(10)
    outside.set()
    thread.join()
    assert found == [config.Flags(selection="heuristic")]
    assert config.current() == DEFAULTS


def test_set_flags_outlives_the_block_of_another_thread() -> None:
    thread = threading.Thread(target=dgrad.set_flags, kwargs={"workspace_limit": 2})
    with dgrad.flags(deterministic=True):
        thread.start()
        thread.join()
        assert config.current() == config.Flags(deterministic=True, workspace_limit=2)
    assert config.current() == config.Flags(workspace_limit=2)


def test_what_a_block_was_given_may_change_afterwards() -> None:
    names = ["legacy:ALGO_1"]
    with dgrad.flags(algorithm=names):
        names.append("no provider")
        with dgrad.flags(deterministic=True):
            assert config.policy().wanted("dgrad") == ("legacy:ALGO_1",)


def test_equal_flags_are_one_object_however_they_came_about() -> None:
    with dgrad.flags(deterministic=True), dgrad.flags(workspace_limit=7):
        first = config.current()
    with dgrad.flags(deterministic=True, workspace_limit="7"):
        assert config.current() is first


def test_the_block_can_decorate_a_function_many_times() -> None:
    @dgrad.flags(deterministic=True)
    def deterministic() -> bool:
        return config.policy().deterministic

    assert deterministic()
    assert deterministic()
    assert config.current() == DEFAULTS


def test_set_flags_holds_until_it_is_changed() -> None:
    dgrad.set_flags(deterministic=True, algorithm="legacy:ALGO_1")
    dgrad.set_flags(allow_tf32=False)
    flags = config.current()
    assert (flags.deterministic, flags.allow_tf32) == (True, False)
    assert flags.algorithm == (("dgrad", ("legacy:ALGO_1",)),)
    dgrad.set_flags(deterministic=None, algorithm=None, allow_tf32=None)
    assert config.current() == DEFAULTS


def test_what_is_set_inside_a_decorated_function_ends_with_the_call() -> None:
    @dgrad.flags(deterministic=True)
    def selection() -> str | None:
        before = config.current().selection
        dgrad.set_flags(selection="heuristic")
        return before

    assert [selection(), selection()] == [None, None]
    assert config.current() == DEFAULTS


def test_a_block_of_a_thread_that_ended_is_no_other_threads() -> None:
    def leave_open() -> None:
        left.append(dgrad.flags(deterministic=True))
        left[0].__enter__()

    left: list[Any] = []
    first = threading.Thread(target=leave_open)
    first.start()
    first.join()
    for _ in range(50):  # of which some have the first one's number
        thread = threading.Thread(target=dgrad.set_flags, kwargs={"workspace_limit": 3})
        thread.start()
        thread.join()
        assert config._base == config.Flags(workspace_limit=3)
        dgrad.set_flags(workspace_limit=None)
    left[0].__exit__(None, None, None)
    assert config.current() == DEFAULTS


def test_a_block_that_the_collector_closes_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def suspended(itself: list[Iterator[None]]) -> Iterator[None]:
        with dgrad.flags(workspace_limit=7):
            yield

    cycle: list[Iterator[None]] = []  # which the collector alone ends
    cycle.append(suspended(cycle))
    next(cycle[0])
    replace = config.replace

    def replace_late(*arguments: Any, **named: Any) -> Any:
        made = replace(*arguments, **named)
        gc.collect()
        return made

    monkeypatch.setattr(config, "replace", replace_late)
    del cycle
    dgrad.set_flags(fallback="error")  # in the block, which ends meanwhile
    assert config._blocks == []
    assert config.current() == DEFAULTS


def test_an_interrupt_while_a_block_begins_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    combine = config._combine

    def interrupted() -> None:
        combine()
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(config, "_combine", interrupted)
    with pytest.raises(KeyboardInterrupt), dgrad.flags(deterministic=True):
        pass
    assert config._blocks == []
    assert config.current() == DEFAULTS
