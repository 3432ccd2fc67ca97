"""Many processes at one store, and those that die."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dgrad import _entries, log, store
from stored import CANDIDATES, HERE, MARKS, fork, make_problem, numbered, wait

pytestmark = MARKS


def test_eight_processes_write_at_once(
    store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    def write(mine: int) -> None:
        os.close(opened)
        os.read(gate, 1)  # until all are there
        for turn in range(25):
            times = [replace(CANDIDATES[0], time_ms=1.0 + mine), *CANDIDATES[1:]]
            store.write(numbered(100), times)
            store.write(numbered(1 + turn % 5), times)
            store.write(numbered(200 + mine), times)
            for each in (numbered(100), numbered(1 + turn % 5)):
                read = store.read(each)
                assert read is not None
                assert read[1:] == CANDIDATES[1:]
        assert not log._warned

    gate, opened = os.pipe()
    children = [fork(lambda mine=mine: write(mine)) for mine in range(8)]
    os.close(gate)
    os.close(opened)
    assert [wait(child) for child in children] == [0] * 8
    assert len(store.list()) == 1 + 5 + 8
    assert all(_entries.FILE.fullmatch(file.name) for file in (store_root / HERE).iterdir())
    assert warnings_of_store() == []


def test_a_folder_that_another_process_makes_first_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: False)
        store.write(make_problem(), CANDIDATES)
    assert store.read(make_problem()) == CANDIDATES


def test_a_killed_writer_leaves_whole_entries_only(
    store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    def write() -> None:
        while True:
            for number in range(1, 6):
                store.write(numbered(number), CANDIDATES)

    store.write(numbered(1), CANDIDATES)
    pause = random.Random(0)
    for _ in range(40):
        child = fork(write)
        time.sleep(pause.uniform(0.001, 0.02))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        found = [store.read(numbered(number)) for number in range(1, 6)]
        assert found[0] == CANDIDATES
        assert all(each in (None, CANDIDATES) for each in found)
    assert len(store.list()) == 5
    assert warnings_of_store() == []


def test_what_a_killed_writer_left_is_ignored_and_later_removed(
    store_root: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        os.replace = die  # type: ignore[assignment]
        store.write(make_problem(), CANDIDATES)

    for _ in range(2):
        assert wait(fork(write)) == -signal.SIGKILL
    old, young = (store_root / HERE).iterdir()
    assert store.read(make_problem()) is None
    assert store.list() == []
    assert warnings_of_store() == []

    an_hour_ago = time.time() - 3700
    unrelated = store_root / HERE / "notes.tmp"
    unrelated.touch()
    for file in (old, unrelated):
        os.utime(file, (an_hour_ago, an_hour_ago))
    store.write(numbered(1), CANDIDATES)
    assert not old.exists()
    assert young.exists()
    assert unrelated.exists()
    assert store.forget() == 1
    assert [*(store_root / HERE).iterdir()] == [unrelated]
