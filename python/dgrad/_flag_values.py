"""The values that flags take: each is checked, and brought into the one form that is kept."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

PROVIDERS = ("graph", "legacy")
_DIRECTIONS = ("dgrad", "fprop", "wgrad")
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{middle}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for middle, base in (("i", 1024), ("", 1000))
}

Algorithms = tuple[tuple[str, tuple[str, ...]], ...]


def _one_of(*known: str) -> Any:
    def check(name: str, value: object) -> str:
        if value in known:
            return str(value)
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(repr, known))}")

    return check


def _boolean(name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise TypeError(f"{name} is {value!r}, expected True, False or None")


def _seconds(name: str, value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf:
        return float(value)
    raise ValueError(f"{name} is {value!r}, expected a number of seconds of at least 0")


def _bytes(name: str, value: object) -> int:
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        count = float(match[1]) * _UNITS[match[2]] if match and match[2] in _UNITS else math.inf
        if count < math.inf:
            return int(count)
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(
        f"{name} is {value!r}, expected a number of bytes of at least 0 "
        'or text such as "256MiB" or "1GB"'
    )


def _algorithms(name: str, value: Any) -> Algorithms:
    if isinstance(value, tuple) and all(isinstance(item, tuple) for item in value):
        value = dict(value)  # already in the kept form
    by_direction = value if isinstance(value, Mapping) else {"dgrad": value}
    checked = {}
    for direction, wanted in by_direction.items():
        names = (wanted,) if isinstance(wanted, str) else wanted
        if (
            direction not in _DIRECTIONS
            or not isinstance(names, (tuple, list))
            or not all(
                isinstance(item, str) and (":" in item or item in PROVIDERS) for item in names
            )
        ):
            raise ValueError(
                f"{name} is {value!r}, expected 'provider:algorithm' such as 'legacy:ALGO_1', a "
                f"provider ({' or '.join(PROVIDERS)}), a list of these, or a dict of them by "
                f"direction ({', '.join(_DIRECTIONS)})"
            )
        checked[direction] = tuple(names)
    return tuple(sorted(checked.items()))


CHECKS: dict[str, Any] = {
    "selection": _one_of("heuristic", "measure", "exhaustive"),
    "measure_budget": _seconds,
    "algorithm": _algorithms,
    "workspace_limit": _bytes,
    "deterministic": _boolean,
    "allow_tf32": _boolean,
    "fallback": _one_of("pytorch", "error"),
}
