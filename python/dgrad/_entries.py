"""The files in the store's folders: which there are, and what is read from them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import log
from ._files import read_own
from ._folders import ABSENT, is_there
from ._stored import FOLDER, MAX_BYTES, decode, file_name, text_of, validated
from .selection import Candidate

if TYPE_CHECKING:
    from ._core import Problem

    Entry = tuple[Problem, list[Candidate]]

FILE = re.compile(r"[0-9a-f]{32}\.json")
KERNELS = re.compile(r"[0-9a-f]{32}-[0-9a-f]{16}\.kernels")  # see _kernels.py
PASSING = re.compile(  # not for long there
    rf"\.({FILE.pattern}|{KERNELS.pattern})\.([0-9a-f]{{16}}\.tmp|lock)"
)


def folders_of(root: Path | None) -> list[Path]:
    """The folders of all GPUs and cuDNNs; OSError if one is not the user's own, or unreadable."""
    names = sorted(os.listdir(root)) if root and is_there(root) else []
    found = [Path(root or "", name) for name in names if FOLDER.fullmatch(name)]
    return [folder for folder in found if is_there(folder)]


def files_of(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        for name in filter(FILE.fullmatch, sorted(os.listdir(folder))):
            yield folder / name


def entries_of(folders: Iterable[Path]) -> Iterator[tuple[Path, Problem, list[Candidate]]]:
    for file in files_of(folders):
        entry = read(file)
        if entry is not None:
            yield file, *entry


def read(file: Path, problem: Problem | None = None) -> Entry | None:
    """The content of a file, or None: with a warning of the first, unless there is no file."""
    try:
        return checked(file, problem)
    except ValueError as error:
        log.warn_of_first("the stored selection %r is not used: it %s", str(file), error)
    return None


def checked(file: Path, problem: Problem | None = None) -> Entry | None:
    """The content of a file, None if there is none; ValueError if it is not to be used."""
    try:
        found = validated(decode(read_own(file, MAX_BYTES + 1)), problem)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise ValueError(f"cannot be read: {error}") from None
    except RecursionError as error:
        raise ValueError(str(error)) from None
    if file.name != file_name(found[0]):
        raise ValueError("is for another problem")
    return found


def matching(folder: Path, words: str) -> list[Path]:
    """The files of all problems in whose text there are these words, as a whole."""
    pattern = re.compile(rf"(?<![^\s/+]){re.escape(words)}(?![^\s/+])")
    texts = ((file, text_of(problem)) for file, problem, _ in entries_of([folder]))
    entries = [file for file, text in texts if pattern.search(text)]
    stems = {file.stem for file in entries}
    kernels = (folder / name for name in os.listdir(folder) if KERNELS.fullmatch(name))
    of_them = [k for k in kernels if k.stem[:32] in stems or pattern.search(_text_in(k))]
    return entries + of_them


def _text_in(kernels: Path) -> str:
    """The text of the problem in a file of kernels, if there is one: see Note [Kernels]."""
    try:
        _, text, _ = read_own(kernels, 4096).split(b"\n", 2)
    except (OSError, ValueError):
        return ""
    return text.decode(errors="replace")


def everything(folder: Path) -> list[Path]:
    """All files that are the store's, also what cannot be read."""
    ours = (FILE, KERNELS, PASSING)
    names = os.listdir(folder)
    return [folder / name for name in names if any(each.fullmatch(name) for each in ours)]
