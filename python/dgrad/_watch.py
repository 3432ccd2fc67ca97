"""What ran, for those who ask while it runs: selections, and reasons why PyTorch ran instead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch._C._autograd import _profiler_enabled as profiling

from .selection import Selection

Event = Selection | str

__all__ = ["Event", "note", "profiling", "watchers", "watching"]

_lock = threading.Lock()

watchers: list[list[Event]] = []  # empty but while someone watches, so that a call pays nothing


def note(event: Event) -> None:
    """Tell all watchers, whatever their thread: a backward pass runs on PyTorch's own."""
    for events in list(watchers):
        events.append(event)


@contextmanager
def watching() -> Iterator[list[Event]]:
    """The events of the block, in order of time."""
    events: list[Event] = []
    with _lock:
        watchers.append(events)
    try:
        yield events
    finally:
        with _lock:
            watchers[:] = [other for other in watchers if other is not events]
