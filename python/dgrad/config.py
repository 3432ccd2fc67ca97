"""Flags: what dgrad is told to do, by PyTorch's switches unless its own say otherwise."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import torch

from ._flag_values import CHECKS, Algorithms
from ._flag_values import PROVIDERS as PROVIDERS
from ._words import shown


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
        fallback (str): "pytorch" (default) lets PyTorch run, by its own switches, what never goes
            to cuDNN (other devices and dtypes, transforms), and what no candidate can run unless a
            flag above asks for what PyTorch might not keep to; "error" raises
            :class:`dgrad.NotSupportedError` instead. For what never goes to cuDNN
            ``torch.compile`` decides it while it compiles.

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
        for name, check in CHECKS.items():
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
        # By place, so a new flag is the last: torch.load(weights_only=True) takes no other call.
        return Flags, tuple(getattr(self, entry.name) for entry in fields(self))

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


@dataclass(slots=True, eq=False)
class _Block:
    """A ``with`` block that is open: the thread that opened it, and what it has set."""

    thread: threading.Thread  # itself, as its number is another's once it has ended
    settings: dict[str, Any]


_base = Flags()  # what set_flags has set
_blocks: list[_Block] = []  # that are open; each lies over those before it
_flags = _base  # all of these together: a call reads nothing else
_lock = threading.RLock()


def current() -> Flags:
    """The process's flags."""
    return _flags


def set_flags(**changes: Any) -> None:
    """Set flags for the whole process; see :class:`dgrad.Flags` for their names and values.

    While a ``with`` block of :func:`flags` is open that this thread opened, they are set until the
    end of the one that it opened last.
    """
    global _base
    settings = _checked(changes)
    thread = threading.current_thread()
    with _lock:
        own = [block for block in _blocks if block.thread is thread]
        if own:
            own[-1].settings.update(settings)
        else:
            _base = replace(_base, **settings)
        _combine()


def flags(**changes: Any) -> AbstractContextManager[None]:
    """Set flags inside a ``with`` block, for the whole process as PyTorch's own switches do.

    Blocks of several threads may overlap: the one that began last wins, and its end takes back
    its own settings only. A backward pass reads the process's flags while it runs, not those of
    its forward pass. See :class:`dgrad.Flags` for names, values and errors.
    """
    return _opened(_checked(changes))  # here, so that an error comes where the flags are written


@contextmanager
def _opened(settings: dict[str, Any]) -> Iterator[None]:
    block = _Block(threading.current_thread(), dict(settings))  # which set_flags may change
    try:
        with _lock:
            _blocks.append(block)
            _combine()
        yield
    finally:
        with _lock:
            if block in _blocks:  # an interrupt may come before
                _blocks.remove(block)
            _combine()


def _checked(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The values as they are kept."""
    known = [entry.name for entry in fields(Flags)]
    for name in changes:
        if name not in known:
            raise TypeError(f"unknown flag {name!r}, expected one of {', '.join(known)}")
    checked = Flags(**changes)
    return {name: getattr(checked, name) for name in changes}


def _combine() -> None:
    global _flags
    now: tuple[object, ...] | None = None
    # The garbage collector may close a block meanwhile, of a generator that nobody goes on with.
    while now != (_base, *_blocks):
        now = (_base, *_blocks)
        settings: dict[str, Any] = {}
        for block in tuple(_blocks):
            settings |= block.settings
        _flags = interned(replace(_base, **settings))


@lru_cache(maxsize=256)
def from_text(text: str) -> Flags | None:
    """The flags that :meth:`Flags.as_text` told of; None of an empty text."""
    if not text:
        return None
    try:
        return interned(Flags(**json.loads(unquote(text))))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"flags is {shown(text)}, expected what dgrad.Flags(...).as_text() gives: {error}"
        ) from error


@lru_cache(maxsize=256)
def interned(flags: Flags) -> Flags:
    """One object for equal flags, as calls are known by its identity.

    Raises TypeError, which :func:`no_flags` puts into words, for what is none.
    """
    if isinstance(flags, Flags):
        return flags
    raise no_flags(flags)


def no_flags(value: object) -> TypeError:
    """The error for what was given in the place of a call's or a layer's own flags."""
    return TypeError(
        f"flags is {shown(value)}, expected None or dgrad.Flags, "
        "such as dgrad.Flags(deterministic=True)"
    )


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


class Deciding(NamedTuple):
    """All but its arguments that a call's preparation depends on, read once."""

    policy: Policy
    tf32: bool  # whether float32 may run in it
    commands: bool  # see :func:`commands`
    cudnn_enabled: bool


def deciding(direction: str, layer: Flags | None = None) -> Deciding:
    """What decides now about a call of a direction."""
    return Deciding(
        policy(layer), tf32_allowed(layer), commands(direction, layer), _cudnn_enabled()
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


# The effective value: the old getter raises once both generations of switches are used.
_tf32_switch: Callable[[], object] = (
    partial(torch._C._get_fp32_precision_getter, "cuda", "conv")
    if hasattr(torch._C, "_get_fp32_precision_getter")
    else torch._C._get_cudnn_allow_tf32
)


_cudnn_enabled = torch._C._get_cudnn_enabled

# PyTorch's, that bear on a choice.
SWITCHES: tuple[Callable[[], object], ...] = (
    _tf32_switch,
    _cudnn_enabled,
    torch._C._get_cudnn_deterministic,
    torch._C._get_deterministic_algorithms,
)


def switches(layer: Flags | None) -> tuple[object, ...]:
    """All outside its arguments that decides what a call runs, as native code has it too.

    Who keeps the tuple must keep ``layer`` and :func:`current` too, which are in it by identity.
    """
    return (id(layer), id(_flags), *(switch() for switch in SWITCHES))


def tf32_allowed(layer: Flags | None = None) -> bool:
    """Whether float32 may run in tf32 now."""
    if tf32_overridden():
        return False
    own = (_flags if layer is None else effective(layer)).allow_tf32
    return _tf32_switch() in (True, "tf32") if own is None else own
