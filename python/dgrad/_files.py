"""Files and folders of the user's own: nobody else can have put them there."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path


def require_own(folder: Path) -> None:
    """PermissionError for another user's folder: who can write it chooses what runs here."""
    owner = os.stat(folder).st_uid
    if owner != os.geteuid():
        raise PermissionError(errno.EPERM, f"The folder belongs to user {owner}", str(folder))


def make_own(folder: Path) -> None:
    """Make a folder and its root where they are missing. OSError if that cannot be."""
    for each in (folder.parent, folder):
        for missing in reversed([p for p in (each, *each.parents) if not p.exists()]):
            with suppress(FileExistsError):  # another process was first
                missing.mkdir(mode=0o700)
        require_own(each)


def read_own(file: Path, most_bytes: int) -> bytes:
    """The first bytes of a file; ValueError if it is not a file of the user's own."""
    # Neither a link nor a pipe that nobody writes to may lead or hold the reader elsewhere.
    descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("is not a regular file")
        if status.st_uid != os.geteuid():
            raise ValueError(f"belongs to user {status.st_uid}")
        return os.read(descriptor, min(status.st_size, most_bytes))
    finally:
        os.close(descriptor)


def put(temporary: Path, file: Path, data: bytes, mode: int) -> None:
    """Write under a temporary name and rename. Raises OSError, and leaves nothing then."""
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with open(descriptor, "wb") as stream:
            stream.write(data)
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
