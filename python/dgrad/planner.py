"""From a problem to a selection: the only home of policy.

What is known of a problem is shared by all threads (``_knowledge.py``). A plan belongs to the
thread and device that made it (``_runner.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._cache import BoundedCache
from ._knowledge import Knowledge, everything, forget_all
from ._ready import ready_calls
from .config import Policy
from .measure import CLOSE
from .selection import ADD, FUSED, Candidate, Selection, format_bytes

if TYPE_CHECKING:
    from ._core import ReadyCall, ReadyCalls

_NOISE = 1.01  # times this close are the same time
_HOST_NOISE = 1.03  # the host's share varies more
_WORTH_A_PLAN = 1.02  # so much faster is one that only CUDA graphs get; events hide some of it


class PlanCache(BoundedCache[Any, Any]):
    """Calls by thread, device, sizes, strides and flags: ``dgrad.plan_cache``."""

    def __init__(self, max_size: int) -> None:
        super().__init__(max_size)
        # DLPack's table by which native code reads tensors; None where there is none to use.
        self.exchange: object = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
        # The calls that native code knows whole; None until there is one.
        self.ready: ReadyCalls | None = None
        self._ready_hits = 0  # when native code was last asked what it ran
        self.cleared = 0  # how often: what was begun before is not kept afterwards

    @property
    def hits(self) -> int:
        return self._hits + (0 if self.ready is None else self.ready.hits)

    def keep_ready(
        self,
        a: Tensor,
        b: Tensor,
        bias: Tensor | None,
        state: tuple[object, ...],
        call: ReadyCall,
    ) -> None:
        """Let native code run a call for such tensors while ``state`` is the same."""
        if self.ready is None:
            try:
                self.ready = ready_calls(self.exchange)
            except ValueError:  # of another version of DLPack: Python runs every call
                self.exchange = None
                return
        ready: ReadyCalls = self.ready
        if ready.size >= self.max_size:
            ready.clear()  # all are made again from the entries of this cache
        ready.put(a, b, bias, state, call)

    def _trim(self) -> None:
        if len(self._entries) > self._max_size and self.ready is not None:
            self._note_native_use(self.ready.hits)
            self.ready.clear()
        super()._trim()

    def _note_native_use(self, hits: int) -> None:
        """Count what native code ran as used now: it does so without this cache."""
        if hits != self._ready_hits:
            self._ready_hits = hits
            for key in [key for key, entry in self._items() if entry.ran_natively()]:
                self._entries.move_to_end(key)

    def forget_ready(self) -> None:
        """Let the next call of each problem go through Python, as something of it has changed."""
        if self.ready is not None:
            self.ready.clear()

    def clear(self) -> None:
        """Forget all plans and all that was learned of their problems; the store stays."""
        self.cleared += 1
        super().clear()
        if self.ready is not None:
            self.ready.clear()
            self._hits = -self.ready.hits
        forget_all()


plan_cache = PlanCache(max_size=1024)


def _place(candidate: Candidate, wanted: tuple[str, ...]) -> int | None:
    """Where a candidate stands among what the flag ``algorithm`` asks for."""
    for place, name in enumerate(wanted):
        if name in (candidate.name, candidate.provider):
            return place
    return None


def objection(candidate: Candidate, direction: str, policy: Policy) -> str | None:
    """Why ``candidate`` may not run under ``policy``, or None."""
    if candidate.rejected is not None:
        return candidate.rejected
    wanted = policy.wanted(direction)
    if wanted and _place(candidate, wanted) is None:
        return f"algorithm={' or '.join(map(repr, wanted))} is asked for"
    if "FFT" in candidate.algorithm and candidate.name not in wanted:
        return (
            "it spreads NaN and infinity over the image, which PyTorch's choice does not; "
            f"algorithm={candidate.name!r} lets it run"
        )
    if policy.deterministic and not candidate.deterministic:
        return "it is not deterministic, and deterministic algorithms are asked for"
    limit = policy.workspace_limit
    if limit is not None and candidate.workspace_bytes > limit:
        return (
            f"its workspace of {format_bytes(candidate.workspace_bytes)} is over "
            f"workspace_limit {format_bytes(limit)}"
        )
    return None


def preference(candidates: list[Candidate], direction: str, policy: Policy) -> list[int]:
    """The candidates that may run, best first."""
    wanted = policy.wanted(direction)
    places: dict[int, list[int]] = {}
    for i, candidate in enumerate(candidates):
        if objection(candidate, direction, policy) is None:
            places.setdefault(_place(candidate, wanted) or 0, []).append(i)
    if policy.selection != "heuristic":
        places = {place: _by_time(candidates, usable) for place, usable in places.items()}
    return [i for place in sorted(places) for i in places[place]]


def _by_time(candidates: Sequence[Candidate], usable: Iterable[int]) -> list[int]:
    """Best first: candidates of which none was asked for before another."""
    alike = _alike(candidates, usable)

    def rank(i: int) -> tuple[float, ...]:
        time = candidates[i].time_ms
        if time is None:
            return 2, i
        if i not in alike:
            return 1, time
        return 0, *_tie_rank(candidates, i)

    return sorted(usable, key=rank)


def _alike(candidates: Sequence[Candidate], usable: Iterable[int]) -> list[int]:
    """The fastest, and those that times do not tell from it."""
    fastest = _within(_NOISE, decisive_ms(candidates, usable))
    return _within(_HOST_NOISE, {i: candidates[i].time_ms or 0.0 for i in fastest})


def decisive_ms(candidates: Sequence[Candidate], usable: Iterable[int]) -> dict[int, float]:
    """What decides between candidates: of each that is in question, a time.

    Where times were taken on the device too, these decide between those that are close with the
    host's share: that share varies, and what a CUDA graph replays has none. It is not the same for
    all, though: a legacy call or a bias that PyTorch adds costs the host more. Where that is more
    than the device takes, the geometric mean of both is the time.
    """
    times = {i: t for i in usable if (t := candidates[i].time_ms) is not None}
    close = {i: d for i in _within(CLOSE, times) if (d := candidates[i].device_ms) is not None}
    if not all(i in close for i in _within(1.0, times)):
        return times
    host: dict[object, float] = {}
    for i in close:
        way = _way(candidates[i])
        host[way] = min(times[i], host.get(way, math.inf))
    return {i: math.sqrt(d * max(d, host[_way(candidates[i])])) for i, d in close.items()}


def _way(candidate: Candidate) -> object:
    """What the host does for a candidate: the same work for those of one way."""
    passes = candidate.bias not in (None, FUSED, ADD)
    return candidate.provider, candidate.bias == ADD, passes


def _within(factor: float, times: dict[int, float]) -> list[int]:
    limit = factor * min(times.values(), default=0.0)
    return [i for i, time in times.items() if time <= limit]


def untimed(candidates: list[Candidate], direction: str, policy: Policy) -> list[int]:
    """The candidates to time before ``policy`` can choose."""
    if policy.selection == "heuristic" or policy.forces(direction):
        return []
    usable = preference(candidates, direction, policy)
    if len(usable) < 2:
        return []
    again = policy.selection == "exhaustive"
    return sorted(
        i for i in usable if candidates[i].time_ms is None and (again or not candidates[i].skipped)
    )


def for_graphs(
    candidates: Sequence[Candidate], direction: str, policy: Policy, chosen: int
) -> int | None:
    """What a CUDA graph gets instead of the chosen one: what is faster on the device, whatever the
    host takes for it. None where nothing is."""
    winner, wanted = candidates[chosen], policy.wanted(direction)
    if policy.selection == "heuristic" or policy.forces(direction) or winner.device_ms is None:
        return None
    times = {
        i: c.device_ms
        for i, c in enumerate(candidates)
        if c.time_ms is not None
        and c.device_ms is not None
        and c.device_ms * _WORTH_A_PLAN < winner.device_ms
        and _place(c, wanted) == _place(winner, wanted)
        and objection(c, direction, policy) is None
    }
    return min(_within(_NOISE, times), key=partial(_tie_rank, candidates), default=None)


def _tie_rank(candidates: Sequence[Candidate], i: int) -> tuple[float, ...]:
    """Between equals the deterministic one and then the smaller workspace wins."""
    return not candidates[i].deterministic, candidates[i].workspace_bytes, i


def selection_of(knowledge: Knowledge, policy: Policy, chosen: int, source: str) -> Selection:
    candidates = tuple(knowledge.candidates)
    direction = knowledge.problem.direction
    return Selection(
        problem=knowledge.problem,
        candidates=candidates,
        chosen=chosen,
        objections=tuple(objection(c, direction, policy) for c in candidates),
        source=source,
        policy=policy,
        behind=_behind(candidates, direction, policy, chosen, source),
        captured=for_graphs(candidates, direction, policy, chosen),
    )


def _behind(
    candidates: Sequence[Candidate], direction: str, policy: Policy, chosen: int, source: str
) -> tuple[str | None, ...]:
    """Why each candidate that may run stands behind the chosen one."""
    wanted, winner = policy.wanted(direction), candidates[chosen]
    places = {
        i: _place(c, wanted) or 0
        for i, c in enumerate(candidates)
        if i == chosen or objection(c, direction, policy) is None
    }
    rivals = [i for i, place in places.items() if place == places[chosen]]
    by_order = "heuristic" in (policy.selection, source) or winner.time_ms is None
    ranked = rivals if by_order else _by_time(candidates, rivals)
    alike = _alike(candidates, rivals)

    def why(i: int) -> str:
        candidate = candidates[i]
        if places[i] > places[chosen]:
            return "later in the order asked for"
        if i not in ranked or ranked.index(i) < ranked.index(chosen):
            return "known since"
        if candidate.skipped and policy.selection != "heuristic":
            return "not timed: the budget was spent"
        if by_order:
            return "later in cuDNN's order"
        if candidate.time_ms is None:
            return "not timed"
        if i in alike:
            return f"within the noise{_tie(candidate, winner)}"
        if candidate.device_ms is None and winner.device_ms is not None:
            return "not timed on the device"
        dearer = candidate.time_ms > (winner.time_ms or 0.0)
        return f"{'it' if dearer else 'its kind'} costs the host more"

    return tuple(why(i) if i in places and i != chosen else None for i, _ in enumerate(candidates))


def _tie(candidate: Candidate, winner: Candidate) -> str:
    if winner.deterministic and not candidate.deterministic:
        return " and not deterministic"
    return " and with a larger workspace" * (candidate.workspace_bytes > winner.workspace_bytes)


def source_of(knowledge: Knowledge, policy: Policy, chosen: int) -> str:
    """Where a choice comes from, as :class:`Selection` has it."""
    if policy.forces(knowledge.problem.direction):
        return "forced"
    if policy.selection == "heuristic" or knowledge.candidates[chosen].time_ms is None:
        return "heuristic"
    return knowledge.source


def selections() -> list[tuple[Selection, int]]:
    """All selections of this process in order of first use, each with how often it has run, also
    those that another has replaced. Of problems the last 16384 that were looked up are kept.

    What :func:`dgrad.explain` and :func:`dgrad.warm_up` run does not count: 0 is what nothing else
    has run yet.
    """
    found = []
    for knowledge in everything():
        for use in list(knowledge.uses):
            selection = selection_of(knowledge, use.policy, use.chosen, use.source)
            found.append((use.number, selection, use.count))
        knowledge.pack()
    found.sort(key=itemgetter(0))
    return [(selection, count) for _, selection, count in found]
