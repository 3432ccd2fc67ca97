"""Claims: of several processes one at a time is inside, and what a claim leaves in the store.

All of it runs on the CPU: processes are forked, and the GPU is pretended.
"""

from __future__ import annotations

import fcntl
import os
import signal
import stat
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

import dgrad
from claims import LONG_S, MARKS, SHORT_S, Child, held_elsewhere, hold, locks, waited_s
from dgrad import _claim, store
from fake_cudnn import real_problem

pytestmark = MARKS


# --- one at a time ------------------------------------------------------------------------------


def count_alone(inside: Path) -> None:
    with store.claim(real_problem()):
        mine = os.open(inside, os.O_CREAT | os.O_EXCL)  # FileExistsError if another is inside
        time.sleep(0.002)
        os.close(mine)
        inside.unlink()


def test_of_many_processes_one_at_a_time_is_inside(folder: Path, tmp_path: Path) -> None:
    def work(say: Callable[[str], None]) -> None:
        os.close(opened)
        os.read(gate, 1)  # until all are there
        for _ in range(20):
            count_alone(tmp_path / "inside")

    gate, opened = os.pipe()
    children = [Child(work) for _ in range(6)]
    os.close(gate)
    os.close(opened)
    assert [child.wait() for child in children] == [0] * 6
    assert [*folder.iterdir()] == []


def test_of_many_threads_one_at_a_time_is_inside(folder: Path, tmp_path: Path) -> None:
    """Threads of one process may measure for two GPUs of one name."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                count_alone(tmp_path / "inside")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert locks(folder) == []


def test_the_next_one_gets_in_when_the_first_is_done(tmp_path: Path) -> None:
    def work(say: Callable[[str], None]) -> None:
        with store.claim(real_problem()):
            say("held")
            while not (tmp_path / "enough").exists():
                time.sleep(0.001)
            say("done")

    child = Child(work)
    assert child.hear() == "held"
    entered = threading.Event()

    def enter() -> None:
        with store.claim(real_problem()):
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    assert not entered.wait(0.1)
    (tmp_path / "enough").touch()
    assert child.hear() == "done"
    thread.join(LONG_S / 2)
    assert entered.is_set()
    assert child.wait() == 0


def test_the_device_is_no_part_of_a_claim_and_all_else_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_claim, "WAIT_S", SHORT_S)
    with held_elsewhere():
        assert waited_s(real_problem(4)) < SHORT_S
        assert waited_s(real_problem(tf32=False)) < SHORT_S
        assert waited_s(real_problem(device=1)) >= SHORT_S


def test_a_killed_process_has_no_claim_any_more(folder: Path) -> None:
    with held_elsewhere():
        pass
    assert len(locks(folder)) == 1  # what it left
    assert waited_s() < SHORT_S
    assert locks(folder) == []


def test_one_that_waits_gets_in_when_the_other_is_killed() -> None:
    with held_elsewhere() as child:
        threading.Timer(0.1, os.kill, (child.id, signal.SIGKILL)).start()
        assert 0.05 < waited_s() < LONG_S / 2


def test_a_file_that_was_removed_before_it_was_locked_is_no_claim(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_claim, "WAIT_S", SHORT_S)
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        locks(folder)[0].unlink()  # by the one that had it, and the next one has come
        others.enter_context(held_elsewhere())
        real(descriptor, operation)

    with ExitStack() as others:
        monkeypatch.setattr(fcntl, "flock", flock)
        assert waited_s() >= SHORT_S


def test_an_error_inside_is_passed_on_and_ends_the_claim(folder: Path) -> None:
    for error in (ValueError, OSError, KeyboardInterrupt):
        with pytest.raises(error), store.claim(real_problem()):
            raise error
        assert locks(folder) == []
        assert waited_s() < SHORT_S


# --- what lies in the store ---------------------------------------------------------------------


def test_a_claim_is_the_users_alone_and_no_entry(folder: Path) -> None:
    before = os.umask(0)
    try:
        with store.claim(real_problem()):
            (lock,) = folder.iterdir()
            assert stat.S_IMODE(lock.stat().st_mode) == 0o600
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            assert store.list() == []
    finally:
        os.umask(before)
    assert [*folder.iterdir()] == []


def test_a_link_in_place_of_a_claim_is_not_followed(folder: Path, tmp_path: Path) -> None:
    with store.claim(real_problem()):
        (lock,) = locks(folder)
    lock.symlink_to(tmp_path / "aim")
    assert waited_s() < SHORT_S
    assert not (tmp_path / "aim").exists()
    assert lock.is_symlink()


def test_forgetting_removes_claims_and_counts_none(folder: Path) -> None:
    with held_elsewhere():
        pass
    store.write(real_problem(), [dgrad.Candidate("legacy", "ALGO_1", "FMA_MATH", True, 0, 1.0)])
    assert len([*folder.iterdir()]) == 2
    assert store.forget() == 1
    assert [*folder.iterdir()] == []


def test_a_claim_that_was_forgotten_leaves_the_next_ones_alone(folder: Path) -> None:
    with store.claim(real_problem()):
        store.forget()
        child = Child(hold)
        assert child.hear() == "held"
    assert len(locks(folder)) == 1
    child.kill()


def test_what_a_killed_process_left_is_later_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size in (4, 5):
        with held_elsewhere(real_problem(size)):
            pass
    old, young = locks(folder)
    an_hour_ago = time.time() - 3700
    os.utime(old, (an_hour_ago, an_hour_ago))
    monkeypatch.setattr(store, "_swept", set())
    store.write(real_problem(), [dgrad.Candidate("legacy", "ALGO_1", "FMA_MATH", True, 0, 1.0)])
    assert locks(folder) == [young]
