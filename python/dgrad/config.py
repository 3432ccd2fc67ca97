"""Flags: what dgrad is told to do, by PyTorch's switches unless its own say otherwise."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import torch

PROVIDERS = ("graph", "legacy")
_DIRECTIONS = ("dgrad", "fprop", "wgrad")
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{middle}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for middle, base in (("i", 1024), ("", 1000))
}

Algorithms = tuple[tuple[str, tuple[str, ...]], ...]


@dataclass(frozen=True)
class Flags:
    """What dgrad is told. A flag that is None follows the next wider setting: a layer's
    (``ConvTranspose2d.flags``) follows the process's (:func:`dgrad.flags`), and that PyTorch's
    switches or the default.

    Attributes:
        selection (str): "measure" (default) times the candidates of a new problem within
            ``measure_budget``; "exhaustive" times all; "heuristic" times nothing and takes the
            first usable one in cuDNN's order.
        measure_budget (float): seconds that "measure" may take for a problem, default 0.3. What
            was not reached in that time is timed by "exhaustive" only, also in later processes.
            Strict float32 is measured with tf32 too, which may take as long again.
        algorithm (str, sequence or dict): the only algorithms to use, in order of preference,
            such as "legacy:ALGO_1", or "legacy" or "graph" for any of a provider's. They command
            the transposed convolution alone; a dict from direction ("dgrad", "fprop", "wgrad")
            commands each.
        workspace_limit (int or str): most scratch memory a candidate may take, in bytes or as
            text such as "256MiB". Default: no limit.
        deterministic (bool): only deterministic candidates. Default:
            ``torch.backends.cudnn.deterministic`` or ``torch.use_deterministic_algorithms``.
        allow_tf32 (bool): let float32 run in tf32. Default:
            ``torch.backends.cudnn.conv.fp32_precision`` (``allow_tf32`` before PyTorch 2.9).
        fallback (str): "pytorch" (default) lets PyTorch run what dgrad cannot, unless a flag
            above asks for what PyTorch might not keep to; "error" raises
            :class:`dgrad.NotSupportedError` instead.

    Raises:
        TypeError, ValueError: a value that a flag does not take.
    """

    selection: str | None = None
    measure_budget: float | None = None
    algorithm: Any = field(default=None)  # text, sequence or dict; kept as Algorithms
    workspace_limit: Any = None  # int or text; kept as int
    deterministic: bool | None = None
    allow_tf32: bool | None = None
    fallback: str | None = None

    def __post_init__(self) -> None:
        for name, check in _CHECKS.items():
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, check(name, value))
        # Made here and not when asked for: torch.compile reads it.
        own = self._set()
        if self.algorithm is not None:
            own["algorithm"] = dict(self.algorithm)
        # Quoted, as code that the compiler generates may contain it.
        object.__setattr__(self, "_text", quote(json.dumps(own)))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Flags, **self._set()), ()

    def _set(self) -> dict[str, Any]:
        """The flags that are not None."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    def as_text(self) -> str:
        """What :func:`from_text` makes equal flags of."""
        text: str = self._text  # type: ignore[attr-defined]
        return text


class Policy(NamedTuple):
    """The flags that bear on a choice, with PyTorch's switches read."""

    selection: str
    measure_budget: float
    algorithm: Algorithms
    workspace_limit: int | None
    deterministic: bool
    fallback: str

    def wanted(self, direction: str) -> tuple[str, ...]:
        """The algorithms asked for, in order of preference; empty if dgrad chooses."""
        return dict(self.algorithm).get(direction, ())

    def forces(self, direction: str) -> bool:
        """Whether single algorithms are asked for, so that there is nothing to choose."""
        wanted = self.wanted(direction)
        return bool(wanted) and all(":" in name for name in wanted)


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


_CHECKS: dict[str, Any] = {
    "selection": _one_of("heuristic", "measure", "exhaustive"),
    "measure_budget": _seconds,
    "algorithm": _algorithms,
    "workspace_limit": _bytes,
    "deterministic": _boolean,
    "allow_tf32": _boolean,
    "fallback": _one_of("pytorch", "error"),
}

_flags = Flags()


def current() -> Flags:
    """The process's flags."""
    return _flags


def set_flags(**changes: Any) -> None:
    """Set flags for the whole process; see :class:`dgrad.Flags` for their names and values."""
    global _flags
    _flags = _changed(changes)


@contextmanager
def flags(**changes: Any) -> Iterator[None]:
    """Set flags inside a ``with`` block, for the whole process as PyTorch's own switches do.

    A backward pass reads the process's flags while it runs, not those of its forward pass. See
    :class:`dgrad.Flags` for names, values and errors.
    """
    global _flags
    before = _flags
    _flags = _changed(changes)
    try:
        yield
    finally:
        _flags = before


def _changed(changes: Mapping[str, Any]) -> Flags:
    known = [entry.name for entry in fields(Flags)]
    for name in changes:
        if name not in known:
            raise TypeError(f"unknown flag {name!r}, expected one of {', '.join(known)}")
    return interned(replace(_flags, **changes))


@lru_cache(maxsize=256)
def from_text(text: str) -> Flags | None:
    """The flags that :meth:`Flags.as_text` told of; None of an empty text."""
    return interned(Flags(**json.loads(unquote(text)))) if text else None


@lru_cache(maxsize=256)
def interned(flags: Flags) -> Flags:
    """One object for equal flags, as calls are known by its identity."""
    return flags


def effective(layer: Flags | None = None) -> Flags:
    """The process's flags with a layer's over them."""
    return _flags if layer is None else _over(_flags, layer)


@lru_cache(maxsize=256)
def _over(wider: Flags, own: Flags) -> Flags:
    return replace(wider, **own._set())


def commands(direction: str, layer: Flags | None = None) -> bool:
    """Whether dgrad's own flags ask for what PyTorch's operator might not keep to."""
    now = effective(layer)
    return bool(
        dict(now.algorithm or ()).get(direction)
        or now.deterministic
        or now.allow_tf32 is False
        or now.workspace_limit is not None
    )


def policy(layer: Flags | None = None) -> Policy:
    """The flags that bear on a choice, now."""
    now = _flags if layer is None else effective(layer)
    deterministic = now.deterministic
    if deterministic is None:
        deterministic = (
            torch._C._get_cudnn_deterministic() or torch._C._get_deterministic_algorithms()
        )
    return Policy(
        now.selection or "measure",
        0.3 if now.measure_budget is None else now.measure_budget,
        now.algorithm or (),
        now.workspace_limit,
        deterministic,
        now.fallback or "pytorch",
    )


@cache
def tf32_overridden() -> bool:
    """Whether the environment turns tf32 off in all of NVIDIA's libraries."""
    # NVIDIA's libraries read it once too; only 0 means anything.
    return os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"


if hasattr(torch._C, "_get_fp32_precision_getter"):

    def _torch_allows_tf32() -> bool:
        # The effective value: the old getter raises once both generations of switches are used.
        return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")
else:

    def _torch_allows_tf32() -> bool:
        return torch._C._get_cudnn_allow_tf32()


_tf32_switch: Callable[[], object] = (
    partial(torch._C._get_fp32_precision_getter, "cuda", "conv")
    if hasattr(torch._C, "_get_fp32_precision_getter")
    else torch._C._get_cudnn_allow_tf32
)


_cudnn_enabled = torch._C._get_cudnn_enabled
_cudnn_deterministic = torch._C._get_cudnn_deterministic
_deterministic_algorithms = torch._C._get_deterministic_algorithms


def switches(layer: Flags | None) -> tuple[object, ...]:
    """All outside its arguments that decides what a call runs, as fast as can be.

    Who keeps the tuple must keep ``layer`` and :func:`current` too, which are in it by identity.
    """
    return (
        id(layer),
        id(_flags),
        _tf32_switch(),
        _cudnn_enabled(),
        _cudnn_deterministic(),
        _deterministic_algorithms(),
    )


def tf32_allowed(layer: Flags | None = None) -> bool:
    """Whether float32 may run in tf32 now."""
    if tf32_overridden():
        return False
    own = (_flags if layer is None else effective(layer)).allow_tf32
    return _torch_allows_tf32() if own is None else own
