"""What ran, for those who ask while it runs: selections, and reasons why PyTorch ran instead.

Note [Whose]
A block that watches is told of what its own thread runs, of what the threads run that this one
starts meanwhile, and of what autograd's threads run for the backward passes of these: of nothing
that other threads of the program do at the same time. PyTorch hands its thread-local objects on to
autograd's threads. Threads that are started get them from ``Thread.start``, which is another one
while somebody watches: Python tells no thread who started it.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch._C._autograd import _profiler_enabled as profiling

from .selection import Selection

Event = Selection | str

__all__ = ["Event", "note", "profiling", "watched", "watchers", "watching"]

# Older ones drop a reference to what they hold that they never took (2.11 does, 2.13 does not).
_TAKES_A_REFERENCE = torch.__version__ < "2.13"
_KEY = "dgrad.watchers"  # of what a thread holds: the watchers that are told what it runs

_lock = threading.Lock()
_start = threading.Thread.start
_replaced = False  # whether it is called by _start_watched now

# How to tell each; empty but while someone watches, so that a call pays nothing.
watchers: dict[object, Callable[[Event], None]] = {}


def note(event: Event) -> None:
    """Tell those who watch this thread: see Note [Whose]."""
    for watcher in _held():
        tell = watchers.get(watcher)
        if tell is not None:
            tell(event)


def watched() -> bool:
    """Whether someone watches this thread."""
    return any(watcher in watchers for watcher in _held())


@contextmanager
def watching(tell: Callable[[Event], None] | None = None) -> Iterator[list[Event]]:
    """The events of the block, in order of time; each is given to ``tell`` too, as it comes."""
    events: list[Event] = []

    def add(event: Event) -> None:
        events.append(event)
        if tell is not None:
            tell(event)

    watcher, before = object(), _held()
    _enter(watcher, add)
    _hold((*before, watcher))
    try:
        yield events
    finally:
        _hold(before)
        _leave(watcher)


def _held() -> tuple[object, ...]:
    held: tuple[object, ...] = ()
    if torch._C._is_key_in_tls(_KEY):
        held = torch._C._get_obj_in_tls(_KEY)
    return held


def _hold(held: tuple[object, ...]) -> None:
    if _TAKES_A_REFERENCE:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(held))
    torch._C._stash_obj_in_tls(_KEY, held)


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
        del watchers[watcher]
        # Another may have put its own around it: then it stays, and does nothing.
        if not watchers and threading.Thread.start is _start_watched:
            threading.Thread.start = _start  # type: ignore[method-assign]
            _replaced = False


def _start_watched(self: threading.Thread) -> None:
    held, run = _held(), self.run

    def run_watched() -> None:
        _hold(held)
        run()

    if held:
        self.run = run_watched  # type: ignore[method-assign]
    _start(self)
