"""A bounded cache that forgets what was used least recently."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class BoundedCache(Generic[K, V]):
    """A thread-safe LRU cache of at most ``max_size`` entries, with counts of its use."""

    def __init__(self, max_size: int) -> None:
        self._entries: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.RLock()  # a signal handler may come in between
        self._max_size = max_size
        self._hits = 0
        self.misses = 0

    @property
    def hits(self) -> int:
        """How often an entry was found."""
        return self._hits

    @property
    def size(self) -> int:
        """Number of entries now."""
        return len(self._entries)

    @property
    def max_size(self) -> int:
        """Most entries kept; setting a smaller number forgets the oldest at once."""
        return self._max_size

    @max_size.setter
    def max_size(self, value: int) -> None:
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"max_size is {value!r}, expected an integer of at least 1")
        with self._lock:
            self._max_size = value
            self._trim()

    def get(self, key: K) -> V | None:
        # No lock: each step is atomic, and an entry evicted in between is still valid to use.
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self._hits += 1
        try:  # noqa: SIM105 - contextlib.suppress would cost time on every call
            self._entries.move_to_end(key)
        except KeyError:  # another thread has just evicted it
            pass
        return entry

    def put(self, key: K, value: V) -> None:
        with self._lock:
            self._entries[key] = value
            self._entries.move_to_end(key)
            self._trim()

    def put_new(self, key: K, value: V) -> V:
        """Put an entry unless there is one; the entry that is there then."""
        with self._lock:
            kept = self._entries.setdefault(key, value)
            self._trim()
            return kept

    def values(self) -> list[V]:
        """All entries, in the order in which they came."""
        with self._lock:
            return [value for _, value in self._items()]

    def _items(self) -> list[tuple[K, V]]:
        # Under the lock, and as of a plain dict: its order stays when get() moves an entry.
        return list(dict.items(self._entries))

    def clear(self) -> None:
        """Forget all entries and set the counts to zero."""
        with self._lock:
            self._entries.clear()
            self._hits = self.misses = 0

    def _trim(self) -> None:
        while len(self._entries) > self._max_size:
            self._entries.popitem(last=False)

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} size={self.size} max_size={self.max_size} "
            f"hits={self.hits} misses={self.misses}>"
        )
