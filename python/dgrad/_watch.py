"""What ran, for those who ask while it runs: selections, and reasons why PyTorch ran instead.

Note [Whose]
A block that watches is told of what its own thread runs, of what the threads run that this one
starts meanwhile, and of the gradients of what these have run: not of what other threads of the
program do at the same time. Threads that are started carry on who watches from ``Thread.start``,
which is another one while somebody watches: Python tells no thread who started it. Autograd has
threads of its own, so a call keeps who watched it for its gradients. What compiled code runs
backward has nothing to keep it in: all who watch are told of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch._C._autograd import _profiler_enabled as profiling

from .selection import Selection

Event = Selection | str
Watchers = tuple[object, ...]

__all__ = [
    "Event",
    "Watchers",
    "before_autograd",
    "is_traced",
    "note",
    "observers",
    "profiling",
    "seen_by",
    "watchers",
    "watching",
]

# Whether a dispatch mode wants to see calls before autograd does: it has a stack of its own.
before_autograd = partial(
    torch._C._dispatch_tls_is_dispatch_key_included, torch._C.DispatchKey.PreDispatch
)


def is_traced() -> bool:
    """Whether a dispatch mode is at work."""
    if torch.compiler.is_dynamo_compiling():
        return False  # PyTorch's compiler, up to 2.11 at least, fails at what follows
    return torch._C._len_torch_dispatch_stack() > 0 or before_autograd()


_CARRIED = "_dgrad_watchers"  # what a thread got from the one that started it

_lock = threading.RLock()  # a signal handler may come in between
_own = threading.local()  # its .held: who watches what a thread runs now
_start = threading.Thread.start
_replaced = False  # whether it is called by _start_watched now

# How to tell each; empty but while someone watches, so that a call pays nothing.
watchers: dict[object, Callable[[Event], None]] = {}


def note(event: Event) -> None:
    """Tell those who watch this thread: see Note [Whose]."""
    for watcher in observers():
        tell = watchers.get(watcher)
        if tell is not None:
            tell(event)


def observers() -> Watchers:
    """Those who watch what this thread runs now."""
    return tuple(watcher for watcher in _held() if watcher in watchers)


@contextmanager
def seen_by(held: Watchers) -> Iterator[None]:
    """Let these watch what this thread runs in the block, beside those who watch it in an outer
    block, and nobody else."""
    before = getattr(_own, "held", None)
    _own.held = tuple(dict.fromkeys((*(before or ()), *held)))
    try:
        yield
    finally:
        _own.held = before


@contextmanager
def watching(tell: Callable[[Event], None] | None = None) -> Iterator[list[Event]]:
    """The events of the block, in order of time; each is given to ``tell`` too, as it comes."""
    events: list[Event] = []

    def add(event: Event) -> None:
        events.append(event)
        if tell is not None:
            tell(event)

    watcher = object()
    try:
        _enter(watcher, add)
        with seen_by((*_held(), watcher)):
            yield events
    finally:
        _leave(watcher)


def _held() -> Watchers:
    held: Watchers | None = getattr(_own, "held", None)
    if held is not None:
        return held
    if torch._C._current_graph_task_id() != -1:  # autograd's thread
        return tuple(watchers)
    carried: Watchers = getattr(threading.current_thread(), _CARRIED, ())
    return carried


def _enter(watcher: object, tell: Callable[[Event], None]) -> None:
    global _start, _replaced
    with _lock:
        watchers[watcher] = tell
        if not _replaced:
            _start, _replaced = threading.Thread.start, True
            threading.Thread.start = _start_watched  # type: ignore[method-assign]


def _leave(watcher: object) -> None:
    global _replaced
    with _lock:
        watchers.pop(watcher, None)
        # Another may have put its own around it: then it stays, and does nothing.
        if not watchers and threading.Thread.start is _start_watched:
            threading.Thread.start = _start  # type: ignore[method-assign]
            _replaced = False


def _start_watched(self: threading.Thread, *arguments: Any) -> None:
    held = observers()
    if held:
        setattr(self, _CARRIED, held)
    _start(self, *arguments)
