"""A claim on a file, so that one process at a time does what others can then read.

Note [Claim]
Ranks that share a store meet the same problems at the same time. Who has the claim of a problem
measures it, the others wait and then read what was stored. A claim only saves time: where it
cannot be had, or another process removed its file, a problem is measured twice and nothing else
is lost.

It is a lock of the kernel's on an open file, which ends with the process that has it. The file is
removed while it is still locked, so that nothing is left behind; who then locks the removed file
sees that it is no longer the one at the path, and tries again.

The wait has an end, because the one that measures may wait for the one that waits: it waits for
its stream, in which there may be a collective operation that the other rank has not yet begun.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# Measuring takes `measure_budget`, 0.3 s, and building plans besides; with "exhaustive" it takes
# some seconds. Who waits longer than that most likely waits for one that waits for it.
WAIT_S = 10.0
_LEAST_PAUSE_S = 0.001
_MOST_PAUSE_S = 0.05

_in_vain: set[Path] = set()  # folders where this process has waited to the end: once is enough


@contextmanager
def claimed(file: Path) -> Iterator[None]:
    """Have the claim of a file in the block, or none if there is none to be had in time."""
    descriptor = _wait(file)
    try:
        yield
    finally:
        if descriptor is not None:
            with suppress(OSError):
                if _is_at(file, descriptor):
                    file.unlink()
            os.close(descriptor)


def _wait(file: Path) -> int | None:
    """An open file that is locked, or None: it was waited for in vain, or there are no locks."""
    end = time.monotonic() + (0.0 if file.parent in _in_vain else WAIT_S)
    pause_s = _LEAST_PAUSE_S
    while True:
        try:
            descriptor = _lock(file)
        except OSError:  # some file systems have no locks; others cannot be written
            return None
        if descriptor is not None:
            return descriptor
        left_s = end - time.monotonic()
        if left_s <= 0:
            _in_vain.add(file.parent)
            return None
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, _MOST_PAUSE_S)


def _lock(file: Path) -> int | None:
    """The file, open and locked, or None while another has it. OSError if it cannot be locked."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(file, descriptor):
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _is_at(file: Path, descriptor: int) -> bool:
    """Whether an open file is still the one that is found at its path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(file))
    except FileNotFoundError:
        return False
