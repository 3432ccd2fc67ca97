"""The values that flags take: each is checked, and brought into the one form that is kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

from ._words import shown

PROVIDERS = ("graph", "legacy")
_DIRECTIONS = ("dgrad", "fprop", "wgrad")
_MOST_BYTES = 2**63 - 1
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{middle}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for middle, base in (("i", 1024), ("", 1000))
}

Algorithms = tuple[tuple[str, tuple[str, ...]], ...]


def _one_of(*known: str) -> Any:
    def check(name: str, value: object) -> str:
        if isinstance(value, str) and value in known:
            return str(value)
        raise ValueError(f"{name} is {shown(value)}, expected one of {', '.join(map(repr, known))}")

    return check


def _boolean(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError(f"{name} is {shown(value)}, expected True, False or None")


def _seconds(name: str, value: object) -> float:
    # Of 64 bits: an int beyond has no float, and nobody waits so long.
    number: Any = value
    if isinstance(value, Real) and not isinstance(value, bool) and 0 <= number < 2**63:
        return float(number)
    raise ValueError(f"{name} is {shown(value)}, expected a number of seconds of at least 0")


def _bytes(name: str, value: object) -> int:
    count: float
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d{1,99}(?:\.\d{1,99})?)\s*([A-Za-z]*)\s*", value, re.ASCII)
        if match and match[2] in _UNITS:
            count = int(Fraction(match[1]) * _UNITS[match[2]])
            if count <= _MOST_BYTES:
                return count
    elif isinstance(value, Integral) and not isinstance(value, bool):
        count = int(value)
        if 0 <= count <= _MOST_BYTES:
            return int(value)
    raise ValueError(
        f"{name} is {shown(value)}, expected a number of bytes of at least 0 (of 64 bits) "
        'or text such as "256MiB" or "1GB"'
    )


def _algorithms(name: str, value: Any) -> Algorithms:
    kept = isinstance(value, tuple) and all(
        isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) for item in value
    )
    by_direction = (
        value if isinstance(value, Mapping) else dict(value) if kept else {"dgrad": value}
    )
    checked = {}
    for direction, wanted in by_direction.items():
        names = (wanted,) if isinstance(wanted, str) else wanted
        if (
            direction not in _DIRECTIONS
            or not isinstance(names, (tuple, list))
            or not all(isinstance(item, str) and _is_algorithm(item) for item in names)
        ):
            raise ValueError(
                f"{name} is {shown(value)}, expected 'provider:algorithm' such as 'legacy:ALGO_1', "
                f"a provider ({' or '.join(PROVIDERS)}), a list of these, or a dict of them by "
                f"direction ({', '.join(_DIRECTIONS)})"
            )
        checked[direction] = tuple(names)
    return tuple(sorted(checked.items()))


def _is_algorithm(text: str) -> bool:
    """Whether it names a provider or, as far as can be told before a call, one's algorithm."""
    provider, colon, algorithm = text.partition(":")
    return provider in PROVIDERS and bool(algorithm) is bool(colon)


CHECKS: dict[str, Any] = {
    "selection": _one_of("heuristic", "measure", "exhaustive"),
    "measure_budget": _seconds,
    "algorithm": _algorithms,
    "workspace_limit": _bytes,
    "deterministic": _boolean,
    "allow_tf32": _boolean,
    "fallback": _one_of("pytorch", "error"),
}
