"""Claims: of several processes one measures a problem, and none waits for it for ever.

All of it runs on the CPU: processes are forked, and what they would time is pretended.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dgrad
from dgrad import _claim, _loader, config, log, store
from fake_cudnn import (
    real_problem,
)

_CORE, _REASON = _loader.load()
pytestmark = [
    pytest.mark.skipif(_CORE is None, reason=str(_REASON)),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

USUAL_S = _claim.WAIT_S
SHORT_S = 0.2  # a wait that ends; the others are to end before
LONG_S = 60.0


@pytest.fixture(autouse=True)
def folder(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the store that a pretended GPU has."""
    properties = SimpleNamespace(name="NVIDIA Pretended 1", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(_claim, "WAIT_S", LONG_S)
    monkeypatch.setattr(_claim, "_in_vain", set())
    monkeypatch.setattr(log, "_warned", {})
    return own_store / f"NVIDIA-Pretended-1_sm90_cudnn-{_loader.cudnn_version()}_v3"


def locks(folder: Path) -> list[Path]:
    return [*folder.glob(".*.lock")]


class Child:
    """A process that runs ``work`` with a function that says words to this one."""

    def __init__(self, work: Callable[[Callable[[str], None]], object]) -> None:
        self._read, write = os.pipe()

        def say(word: str) -> None:
            os.write(write, word.encode() + b"\n")

        self.id = os.fork()
        if self.id == 0:
            status = 1
            try:
                work(say)
                status = 0
            finally:
                os._exit(status)
        os.close(write)

    def hear(self) -> str:
        """The next word."""
        word = b""
        while not word.endswith(b"\n"):
            more = os.read(self._read, 1)
            assert more, f"the process ended after {word!r}"
            word += more
        return word.decode().strip()

    def kill(self) -> None:
        os.kill(self.id, signal.SIGKILL)
        os.waitpid(self.id, 0)
        os.close(self._read)

    def wait(self) -> int:
        """Its exit code."""
        os.close(self._read)
        return os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1])


def hold(say: Callable[[str], None], of: Any = None) -> None:
    with store.claim(of or real_problem()):
        say("held")
        time.sleep(LONG_S)


@contextmanager
def held_elsewhere(of: Any = None) -> Iterator[Child]:
    """A process that has the claim of a problem, and keeps it."""
    child = Child(lambda say: hold(say, of))
    assert child.hear() == "held"
    try:
        yield child
    finally:
        child.kill()


def waited_s(of: Any = None) -> float:
    """How long it takes to get in."""
    begin = time.monotonic()
    with store.claim(of or real_problem()):
        return time.monotonic() - begin


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


# --- no wait without an end ---------------------------------------------------------------------


def test_a_wait_has_an_end_and_a_process_waits_in_vain_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_claim, "WAIT_S", SHORT_S)
    with held_elsewhere(), held_elsewhere(real_problem(4)):
        assert SHORT_S <= waited_s() < LONG_S / 2
        assert waited_s() < SHORT_S
        assert waited_s(real_problem(4)) < SHORT_S


def test_the_usual_wait_is_longer_than_measuring_and_not_long() -> None:
    policy = config.policy(dgrad.Flags(selection="measure"))
    assert 10 * policy.measure_budget < USUAL_S <= 30


def test_who_did_not_wait_to_the_end_leaves_the_claim_to_its_holder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_claim, "WAIT_S", 0.0)
    with held_elsewhere():
        waited_s()
        assert len(locks(folder)) == 1
        monkeypatch.setattr(_claim, "_in_vain", set())
        monkeypatch.setattr(_claim, "WAIT_S", SHORT_S)
        assert waited_s() >= SHORT_S


def test_a_wait_lets_other_threads_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_claim, "WAIT_S", SHORT_S)
    turns = 0
    with held_elsewhere():
        thread = threading.Thread(target=waited_s)
        thread.start()
        while thread.is_alive():
            turns += 1
            time.sleep(0.001)
        thread.join()
    assert turns > 20


def test_where_the_store_is_off_nobody_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_elsewhere():
        monkeypatch.setenv("DGRAD_STORE", "off")
        assert waited_s() < SHORT_S


@pytest.mark.parametrize(
    "error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ELOOP, errno.ESTALE]
)
def test_where_the_folder_cannot_be_written_nobody_waits(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def failing(path: Any, *arguments: Any) -> int:
        if str(path).endswith(".lock"):
            raise OSError(error, os.strerror(error), str(path))
        return real(path, *arguments)

    with held_elsewhere():
        monkeypatch.setattr(os, "open", failing)
        assert waited_s() < SHORT_S


@pytest.mark.parametrize("path", ["/proc/none", "/dev/null/none", "/" + "x" * 300])
def test_where_no_folder_can_be_nobody_waits(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DGRAD_STORE", path)
    with held_elsewhere():
        assert waited_s() < SHORT_S


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_where_the_file_system_has_no_locks_nobody_waits(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(error, os.strerror(error))

    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(fcntl, "flock", flock)
    for _ in range(3):
        assert waited_s() < SHORT_S
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_folder_of_another_user_holds_no_claim(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(parents=True)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with store.claim(real_problem()):
        assert [*folder.iterdir()] == []


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
