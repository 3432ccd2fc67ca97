"""Candidates as few bytes, for the time in which nobody looks at them.

A column for each field compresses better than a record for each candidate. The names of engines
are few words with many numbers between them: these are kept apart, those of one place together.
Of numbers that are much alike the first bytes are the same, and stand together too.
"""

from __future__ import annotations

import marshal
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import fields
from itertools import chain
from typing import Any

from .selection import Candidate

_FIELDS = [field.name for field in fields(Candidate)]
_NUMBERS = {"workspace_bytes": "Q", "time_ms": "d", "device_ms": "d"}  # how struct writes them
_NUMBER = re.compile(r"(?<![0-9])(0|[1-9][0-9]?)(?![0-9])")  # in a name: it fits into a byte


def pack(candidates: Sequence[Candidate]) -> bytes:
    """The candidates in few bytes, for :func:`unpack` in the same process."""
    columns = [_packed(name, [getattr(each, name) for each in candidates]) for name in _FIELDS]
    return zlib.compress(marshal.dumps(columns), 9)


def unpack(data: bytes) -> list[Candidate]:
    """What :func:`pack` was given, to the last bit."""
    packed = zip(_FIELDS, marshal.loads(zlib.decompress(data)), strict=True)
    columns = [_unpacked(name, *parts) for name, parts in packed]
    return [Candidate(*row) for row in zip(*columns, strict=True)]


def _packed(name: str, values: list[Any]) -> tuple[Any, ...]:
    if name == "algorithm":
        return _pack_names(values)
    if name in _NUMBERS:
        return _pack_numbers(_NUMBERS[name], values)
    return _pack_kinds(values)


def _unpacked(name: str, *parts: Any) -> list[Any]:
    if name == "algorithm":
        return _unpack_names(*parts)
    if name in _NUMBERS:
        return _unpack_numbers(_NUMBERS[name], *parts)
    return _unpack_kinds(*parts)


def _planes(code: str, numbers: Sequence[float]) -> bytes:
    """The first bytes of all numbers, then the second ones, and so on."""
    data = struct.pack(f"<{len(numbers)}{code}", *numbers)
    size = struct.calcsize(code)
    return b"".join(data[place::size] for place in range(size))


def _from_planes(code: str, planes: bytes) -> tuple[Any, ...]:
    size = struct.calcsize(code)
    count = len(planes) // size
    data = bytearray(len(planes))
    for place in range(size):
        data[place::size] = planes[place * count : (place + 1) * count]
    return struct.unpack(f"<{count}{code}", data)


def _pack_numbers(code: str, values: list[Any]) -> tuple[bytes, bytes]:
    known = bytes(value is not None for value in values)
    return known, _planes(code, [value for value in values if value is not None])


def _unpack_numbers(code: str, known: bytes, planes: bytes) -> list[Any]:
    numbers = iter(_from_planes(code, planes))
    return [next(numbers) if each else None for each in known]


def _pack_kinds(values: list[Any]) -> tuple[list[Any], bytes]:
    """Each value once, and which of them stands where."""
    places = {value: place for place, value in enumerate(dict.fromkeys(values))}
    return list(places), _planes("H", [places[value] for value in values])


def _unpack_kinds(kinds: list[Any], planes: bytes) -> list[Any]:
    return [kinds[place] for place in _from_planes("H", planes)]


def _pack_names(names: list[str]) -> tuple[list[Any], bytes, bytes]:
    parts = [_NUMBER.split(name) for name in names]  # words and numbers by turns
    patterns, planes = _pack_kinds([tuple(part[::2]) for part in parts])
    rows: dict[Any, list[list[str]]] = {pattern: [] for pattern in patterns}
    for part in parts:
        rows[tuple(part[::2])].append(part[1::2])
    columns = chain.from_iterable(zip(*each, strict=True) for each in rows.values())
    return patterns, planes, bytes(map(int, chain.from_iterable(columns)))


def _unpack_names(patterns: list[Any], planes: bytes, numbers: bytes) -> list[str]:
    places = _from_planes("H", planes)
    names = []  # for each pattern its own, in order
    begin = 0
    for place, pattern in enumerate(patterns):
        count = places.count(place)
        end = begin + count * (len(pattern) - 1)
        text = "%d".join(word.replace("%", "%%") for word in pattern)
        names.append(iter([text % (*numbers[begin + i : end : count],) for i in range(count)]))
        begin = end
    return [next(names[place]) for place in places]
