"""Flags: what dgrad is told to do, by PyTorch's switches unless its own say otherwise."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, NamedTuple

import torch

_DIRECTIONS = ("dgrad", "fprop", "wgrad")
_UNITS = {"": 1, "B": 1} | {
    f"{letter}{middle}B": base**power
    for power, letter in enumerate("KMGT", start=1)
    for middle, base in (("i", 1024), ("", 1000))
}


@dataclass(frozen=True, slots=True)
class Flags:
    """The flags of :func:`flags`; None follows PyTorch."""

    deterministic: bool | None = None
    allow_tf32: bool | None = None
    workspace_limit: int | None = None
    algorithm: tuple[tuple[str, str], ...] = ()
    fallback: str = "pytorch"


class Policy(NamedTuple):
    """The flags that bear on a choice, with PyTorch's switches read."""

    deterministic: bool
    workspace_limit: int | None
    algorithm: tuple[tuple[str, str], ...]
    fallback: str


_flags = Flags()


def current() -> Flags:
    """The flags in force."""
    return _flags


def set_flags(**changes: Any) -> None:
    """Set flags for the whole process; see :func:`flags` for their names and values."""
    global _flags
    _flags = _changed(changes)


@contextmanager
def flags(**changes: Any) -> Iterator[None]:
    """Set flags inside a ``with`` block, for the whole process as PyTorch's own switches do.

    A backward pass reads the flags while it runs, not those of its forward pass.

    Args:
        deterministic (bool or None): only deterministic candidates. None (default) follows
            ``torch.backends.cudnn.deterministic`` and ``torch.use_deterministic_algorithms``.
        allow_tf32 (bool or None): let float32 run in tf32. None (default) follows
            ``torch.backends.cudnn.conv.fp32_precision`` (``allow_tf32`` before PyTorch 2.9).
        workspace_limit (int, str or None): most scratch memory a candidate may take, in bytes
            or as text such as "256MiB". None (default): no limit.
        algorithm (str, dict or None): the only algorithm to use, such as "legacy:ALGO_1". Text
            commands the transposed convolution alone; a dict from direction ("dgrad", "fprop",
            "wgrad") to text commands each. None (default): dgrad chooses.
        fallback (str): "pytorch" (default) lets PyTorch run what dgrad cannot; "error" raises
            :class:`dgrad.NotSupportedError` instead.

    Raises:
        TypeError, ValueError: an unknown flag, or a value that a flag does not take.
    """
    global _flags
    before = _flags
    _flags = _changed(changes)
    try:
        yield
    finally:
        _flags = before


def _changed(changes: Mapping[str, Any]) -> Flags:
    known = [field.name for field in fields(Flags)]
    for name in changes:
        if name not in known:
            raise TypeError(f"unknown flag {name!r}, expected one of {', '.join(known)}")
    values = {name: _CHECKS[name](value) for name, value in changes.items()}
    return replace(_flags, **values)


def _tristate(name: str) -> Any:
    def check(value: object) -> bool | None:
        if value is None or isinstance(value, bool):
            return value
        raise TypeError(f"{name} is {value!r}, expected True, False or None")

    return check


def _workspace_limit(value: object) -> int | None:
    if value is None:
        return None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", value)
        if match and match[2] in _UNITS:
            return int(float(match[1]) * _UNITS[match[2]])
    elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ValueError(
        f"workspace_limit is {value!r}, expected a number of bytes of at least 0 "
        'or text such as "256MiB" or "1GB"'
    )


def _algorithm(value: object) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    by_direction = {"dgrad": value} if isinstance(value, str) else value
    if not isinstance(by_direction, Mapping):
        raise TypeError(f"algorithm is {value!r}, expected text, a dict or None")
    for direction, name in by_direction.items():
        if direction not in _DIRECTIONS or not isinstance(name, str) or ":" not in name:
            raise ValueError(
                f"algorithm is {value!r}, expected 'provider:algorithm' such as "
                f"'legacy:ALGO_1', or a dict of these by direction ({', '.join(_DIRECTIONS)})"
            )
    return tuple(sorted(by_direction.items()))


def _fallback(value: object) -> str:
    if value in ("pytorch", "error"):
        return str(value)
    raise ValueError(f"fallback is {value!r}, expected 'pytorch' or 'error'")


_CHECKS: dict[str, Any] = {
    "deterministic": _tristate("deterministic"),
    "allow_tf32": _tristate("allow_tf32"),
    "workspace_limit": _workspace_limit,
    "algorithm": _algorithm,
    "fallback": _fallback,
}


def policy() -> Policy:
    """The flags that bear on a choice, now."""
    flags_now = _flags
    deterministic = flags_now.deterministic
    if deterministic is None:
        deterministic = (
            torch._C._get_cudnn_deterministic() or torch._C._get_deterministic_algorithms()
        )
    return Policy(deterministic, flags_now.workspace_limit, flags_now.algorithm, flags_now.fallback)


@cache
def _tf32_overridden() -> bool:
    # NVIDIA's libraries read it once too; only 0 means anything.
    return os.environ.get("NVIDIA_TF32_OVERRIDE") == "0"


if hasattr(torch._C, "_get_fp32_precision_getter"):

    def _torch_allows_tf32() -> bool:
        # The effective value: the old getter raises once both generations of switches are used.
        return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")
else:

    def _torch_allows_tf32() -> bool:
        return torch._C._get_cudnn_allow_tf32()


def tf32_allowed() -> bool:
    """Whether float32 may run in tf32 now."""
    if _tf32_overridden():
        return False
    own = _flags.allow_tf32
    return _torch_allows_tf32() if own is None else own
