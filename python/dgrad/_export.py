"""One file with the entries of many problems: how the store moves to another machine."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._stored import FOLDER, FORMAT, canonical, encode, to_json, validated
from .selection import Candidate

if TYPE_CHECKING:
    from ._core import Problem


_MAX_BYTES = 2**28


def exported(entries: Iterable[tuple[str, Problem, list[Candidate]]]) -> tuple[bytes, int]:
    """The content of an export: entries by the names of their folders. And how many these are."""
    folders: dict[str, list[Any]] = {}
    for folder, problem, candidates in entries:
        folders.setdefault(folder, []).append(to_json(problem, candidates))
    text = json.dumps({"format": FORMAT, "folders": folders}) + "\n"
    return text.encode(), sum(map(len, folders.values()))


def entries_of(file: Path) -> Iterator[tuple[str, Problem, list[Candidate]]]:
    """Folder, problem and candidates of each entry of an export; ValueError if one is bad."""
    with open(file, "rb") as stream:  # a pipe, perhaps, or a device that never ends
        data = stream.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{file} is not an export of the store: it has over {_MAX_BYTES} bytes")
    try:
        content = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not an export of the store: {error!s:.200}") from None
    if type(content) is not dict or content.keys() != {"format", "folders"}:
        raise ValueError(f"{file} is not an export of the store")
    if canonical(content["format"]) != str(FORMAT) or type(content["folders"]) is not dict:
        raise ValueError(f"{file} is not an export of format {FORMAT}")
    for folder, entries in content["folders"].items():
        if not FOLDER.fullmatch(folder) or type(entries) is not list:
            raise ValueError(f"{file} has entries of {folder!r:.200}, which is no GPU and cuDNN")
        for number, entry in enumerate(entries):
            try:
                problem, candidates = validated(entry)
                encode(problem, candidates)  # refuses what is too large for an entry
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}: entry {number} of {folder} {error}") from None
            yield folder, problem, candidates


def joined(problem: Problem, stored: list[Candidate], loaded: list[Candidate]) -> bytes:
    """The bytes of two entries of a problem as one."""
    try:
        return encode(problem, _joined(stored, loaded))
    except ValueError:  # too many, or none of them may run: the loaded ones stand for themselves
        return encode(problem, loaded)


def _joined(stored: list[Candidate], loaded: list[Candidate]) -> list[Candidate]:
    """What one of them tells of each candidate, and where both do, the loaded one."""
    known, new = ({(c.engine, c.bias): c for c in each} for each in (stored, loaded))
    order = {**new, **known} if len(new) >= len(known) else {**known, **new}  # cuDNN's
    for which, candidate in new.items():
        tells = candidate.time_ms is not None or candidate.rejected is not None
        order[which] = candidate if tells or which not in known else known[which]
    return [*order.values()]
