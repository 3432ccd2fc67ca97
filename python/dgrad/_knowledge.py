"""What is known of each problem in this process: candidates, their times, what has run."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import store
from ._cache import BoundedCache
from ._candidates import gather, other_precision
from .config import Policy
from .selection import Candidate, Selection

if TYPE_CHECKING:
    from ._core import Problem


class Knowledge:
    """What is known of one problem, shared by all threads."""

    __slots__ = ("_lock", "candidates", "measuring", "selections", "source", "uses")

    def __init__(self, candidates: list[Candidate], source: str) -> None:
        self.candidates = candidates
        self.source = source  # of the times: "stored" or "measured"
        self.selections: dict[Policy, Selection] = {}  # those that have run
        self.uses = 0
        self.measuring = threading.Lock()  # so that one thread measures
        self._lock = threading.Lock()

    def update(self, index: int, **changes: Any) -> Candidate:
        """Put changes into one candidate; other threads may change it at the same time."""
        with self._lock:
            candidate = replace(self.candidates[index], **changes)
            self.candidates[index] = candidate
            return candidate

    def ran(self, policy: Policy, selection: Selection) -> bool:
        """Note what runs under a policy; whether that is new."""
        with self._lock:
            return self.selections.setdefault(policy, selection) is selection

    def forget(self, policy: Policy | None = None, chosen: int | None = None) -> None:
        """Forget what ran under a policy, or what chose a candidate."""
        with self._lock:
            self.selections = {
                p: s for p, s in self.selections.items() if p != policy and s.chosen != chosen
            }


_known: BoundedCache[Problem, Knowledge] = BoundedCache(max_size=16384)


def knowledge_of(problem: Problem) -> Knowledge:
    """The one Knowledge of a problem: known, stored, or made from cuDNN's answers."""
    knowledge = _known.get(problem)
    if knowledge is None:
        # Two threads may both look; what the first one puts is what both use.
        stored = store.read(problem)
        found = Knowledge(stored, "stored") if stored else _borrowed(problem, gather(problem))
        knowledge = _known.put_new(problem, found)
    return knowledge


def _borrowed(problem: Problem, candidates: list[Candidate]) -> Knowledge:
    """New candidates, with the times that the same float32 problem has in the other precision."""
    source, times = "measured", {}
    if problem.dtype == "float32":
        other = other_precision(problem)
        known = _known.get(other)
        if known is None:
            stored = store.read(other)
            known = Knowledge(stored, "stored") if stored is not None else None
        if known is not None:
            source = known.source
            times = {(c.algorithm, c.math_type): c.time_ms for c in known.candidates}
    return Knowledge(
        [
            c if c.rejected else replace(c, time_ms=times.get((c.algorithm, c.math_type)))
            for c in candidates
        ],
        source,
    )


def forget_all() -> None:
    """Forget every problem; the store stays."""
    _known.clear()


def selections() -> list[tuple[Selection, int]]:
    """All selections of this process that have run, each with how often its problem was run."""
    return [
        (selection, knowledge.uses)
        for knowledge in _known.values()
        for selection in list(knowledge.selections.values())
    ]
