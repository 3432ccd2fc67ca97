"""The candidates of each problem on disk, with their times, so that each is measured only once.

One small JSON file per problem, and beside it what cuDNN compiled for it (``_kernels.py``), in a
folder named by what makes both worthless: the GPU's name and compute capability, cuDNN's version,
the format's. ``DGRAD_STORE`` names another root folder or is ``off``; the default is ``dgrad`` in
the user's cache folder.

Note [Store]
A file is written under a temporary name and renamed into place, so that readers find all of an
entry or none, whoever is killed, on any number of processes and hosts: entries are read and
written without locks. What is read is data that anybody may have spoiled: what is not exactly as
expected counts as absent, with one warning. Neither reading nor writing raises into a forward
pass. Measuring is claimed by a lock beside the entry, which saves time and protects nothing: see
Note [Claim] in _claim.py.
"""

from __future__ import annotations

import builtins  # `list` is a public name of this module
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import _entries, _folders, log
from ._candidates import other_precision
from ._claim import claimed
from ._export import entries_of, exported, joined
from ._files import make_own, put
from ._folders import path as path  # public here
from ._folders import trusted
from ._stored import UNNAMED, durable, encode, file_name, text_of
from .exceptions import NOT_ASKED
from .selection import Candidate

if TYPE_CHECKING:
    from ._core import Problem

    Candidates = builtins.list[Candidate]

_STALE_S = 3600.0  # one of these that is so old was left by a process that died

_swept: set[Path] = set()  # folders whose stale files this process has removed


def read(problem: Problem) -> Candidates | None:
    """What is stored of a problem for its GPU and this cuDNN, or None. Raises nothing."""
    folder = _folders.folder_of(problem)
    entry = _entries.read(folder / file_name(problem), problem) if folder else None
    return entry[1] if entry else None


def write(problem: Problem, candidates: Sequence[Candidate]) -> None:
    """Remember the candidates of a problem, with times in milliseconds. Raises nothing.

    What may not last, such as a want of memory, is left out: such a candidate counts as not
    reached. Candidates of which none may run are not remembered, nor are those of a moment when
    cuDNN could not name its engines.
    """
    kept = [durable(candidate) for candidate in candidates if candidate.rejected != UNNAMED]
    unasked = any((each.rejected or "").startswith(NOT_ASKED) for each in candidates)
    if path() is None or unasked or all(candidate.rejected is not None for candidate in kept):
        return
    try:
        save(problem, file_name(problem), encode(problem, kept))
    except ValueError as error:
        log.warn_of_first("the selection for %s is not stored: it %s", problem, error)


def save(problem: Problem, name: str, data: bytes) -> bool:
    """Put a file into the folder of a problem; whether it is there. Raises nothing."""
    root = path()
    if root is None:
        return False
    try:
        _save(root / _folders.folder_name(problem.device), name, data)
    except OSError as error:
        log.warn_once(str(root), "selections are not stored in %r: %s", str(root), error)
        return False
    return True


def entry_of(problem: Problem) -> str:
    """The file that tells of a problem: its own, or where there is none the other precision's."""
    folder = (path() or Path()) / _folders.folder_name(problem.device)
    same = [problem, other_precision(problem)] if problem.dtype == "float32" else [problem]
    files = [str(folder / file_name(each)) for each in same]
    return next(filter(os.path.lexists, files), files[0])


def correct(entry: str, problem: Problem, candidates: Sequence[Candidate]) -> None:
    """Write the entry of a problem that an entry withheld candidates of, with one warning."""
    log.warn_of_first("the stored selection %r withheld what can run: it is replaced", entry)
    write(problem, candidates)


@contextmanager
def claim(problem: Problem) -> Iterator[None]:
    """Let one process at a time measure a problem; the others wait here, but not for long.

    Read the store inside: another may have measured meanwhile. Raises nothing. Where the store is
    off or cannot be written nobody waits.
    """
    lock = None
    root = path()
    if root is not None:
        folder = root / _folders.folder_name(problem.device)
        with suppress(OSError):  # writing will warn of it
            make_own(folder)
            lock = folder / f".{file_name(problem)}.lock"
    with nullcontext() if lock is None else claimed(lock):
        yield


def list() -> builtins.list[dict[str, Any]]:
    """All entries, of every GPU and cuDNN, by folder.

    Each is a dict of the ``problem`` as text, the ``best`` candidate as text and its ``time_ms``
    in milliseconds (None where nothing was timed; no flag is looked at), ``folder`` and ``file``.

    Raises:
        OSError: a folder cannot be read. RuntimeError: there is no cuDNN here.
    """
    found = []
    for file, problem, candidates in _entries.entries_of(_entries.folders_of(path())):
        timed = [(c.time_ms, str(c)) for c in candidates if c.time_ms and c.rejected is None]
        time_ms, best = min(timed, default=(None, None))
        entry = {"problem": text_of(problem), "best": best, "time_ms": time_ms}
        found.append(entry | {"folder": file.parent.name, "file": str(file)})
    return found


def spoiled() -> dict[str, str]:
    """The files that :func:`list` leaves out, of every GPU and cuDNN, and what is wrong with each.

    Raises:
        OSError: a folder cannot be read. RuntimeError: there is no cuDNN here.
    """
    found = {}
    for file in _entries.files_of(_entries.folders_of(path())):
        try:
            _entries.checked(file)
        except ValueError as error:
            found[str(file)] = f"it {error}"
    return found


def export(file: str | os.PathLike[str]) -> int:
    """Write all entries, of every GPU and cuDNN, to one JSON file; the number of entries.

    What cannot be used is left out: see :func:`spoiled`.

    The file is replaced whole or stays as it was; a pipe or a device is written to.

    Raises:
        OSError: the file cannot be written. RuntimeError: the store is off, or no cuDNN is here.
    """
    entries = _entries.entries_of(_entries.folders_of(_require_path()))
    data, count = exported((entry.parent.name, p, candidates) for entry, p, candidates in entries)
    target = Path(file)
    if target.exists() and not target.is_file():
        target.write_bytes(data)
        return count
    target = Path(os.path.realpath(target))  # where it is a link, that stays
    try:
        put(target.with_name(f".{secrets.token_hex(8)}.tmp"), target, data, 0o666)
    except OSError as error:  # of the temporary file, which nobody has heard of
        raise type(error)(error.errno, error.strerror, os.fspath(file)) from None
    return count


def load(file: str | os.PathLike[str]) -> int:
    """Add all entries of an exported file to the store; the number of entries.

    An entry joins a stored one of the same problem, GPU and cuDNN: what only one of them tells of a
    candidate stays, its time or why it cannot run, and where both do, the loaded one counts, as
    entries have no date. Entries of another GPU or cuDNN are kept for export and never used here.
    A process that knows a problem already keeps what it knows until ``dgrad.plan_cache.clear()``.

    Raises:
        ValueError: the file is no export, or an entry of it is not valid; nothing is added.
        OSError: the file cannot be read, or the store cannot be written.
        RuntimeError: the store is off, or there is no cuDNN here.
    """
    root = _require_path()
    checked: dict[tuple[Path, str], bytes] = {}
    for name, problem, candidates in entries_of(Path(file)):
        entry = root / name, file_name(problem)
        if entry in checked:
            raise ValueError(f"{os.fspath(file)} has two entries of {text_of(problem)}")
        stored = _entries.read(Path(*entry), problem) if trusted(entry[0]) else None
        checked[entry] = joined(problem, stored[1] if stored else [], candidates)
    for (folder, name), data in checked.items():
        _save(folder, name, data)
    return len(checked)


def forget(matching: str | None = None) -> int:
    """Remove entries of every GPU and cuDNN, and what cuDNN compiled for their problems; the number
    of entries removed.

    A process that knows a problem already keeps what it knows until ``dgrad.plan_cache.clear()``.

    Args:
        matching: words of the problem's text as :func:`list` gives it, such as "float16", "dgrad"
            or "stride=2,2 dilation=1,1": whole ones, so that "float16" leaves bfloat16. With None
            everything goes, also what cannot be read.

    Raises:
        OSError: some files cannot be removed; it names all of them, and the others are gone.
        RuntimeError: there is no cuDNN here.
    """
    removed, errors = 0, []
    for folder in _entries.folders_of(path()):  # which stay: others may be about to write there
        try:
            if matching is None:
                files = _entries.everything(folder)
            else:
                files = _entries.matching(folder, matching)
        except OSError as error:
            errors.append(error)
            continue
        for file in files:
            try:
                file.unlink(missing_ok=True)
                removed += file.suffix == ".json"
            except OSError as error:
                errors.append(error)
    if errors:
        told = "; ".join(map(str, errors))
        raise OSError(f"removed {removed} entries, with {len(errors)} errors: {told}")
    return removed


def _require_path() -> Path:
    root = path()
    if root is None:
        raise RuntimeError("the store is off: DGRAD_STORE can name a folder")
    return root


def _save(folder: Path, name: str, data: bytes) -> None:
    """Put a file into place. Raises OSError, and leaves nothing then."""
    make_own(folder)
    put(folder / f".{name}.{secrets.token_hex(8)}.tmp", folder / name, data, 0o600)
    if folder not in _swept:
        _swept.add(folder)
        with suppress(OSError):
            _sweep(folder)


def _sweep(folder: Path) -> None:
    """Remove what processes left that died while writing or measuring."""
    for name in filter(_entries.PASSING.fullmatch, os.listdir(folder)):
        with suppress(OSError):  # another process may be about it too
            if time.time() - os.lstat(folder / name).st_mtime > _STALE_S:
                (folder / name).unlink()
