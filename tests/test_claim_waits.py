"""Claims: no process waits for ever, and none where there can be no claim.

All of it runs on the CPU: processes are forked, and the GPU is pretended.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import dgrad
from claims import LONG_S, MARKS, SHORT_S, USUAL_S, held_elsewhere, locks, waited_s
from dgrad import _claim, config, store
from fake_cudnn import real_problem

pytestmark = MARKS


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


def test_a_claim_whose_file_cannot_be_removed_ends_without_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "unlink", unlink)
    for _ in range(2):
        with store.claim(real_problem()):
            assert waited_s(real_problem(4)) < LONG_S / 2
    assert waited_s() < LONG_S / 2


def test_neither_a_claim_nor_a_wait_leaves_a_file_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_claim, "WAIT_S", SHORT_S)
    with held_elsewhere():
        before = os.listdir("/proc/self/fd")
        waited_s()
        waited_s(real_problem(4))
        assert set(os.listdir("/proc/self/fd")) <= set(before)
