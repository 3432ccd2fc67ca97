"""What is known of each problem in this process: candidates, their times, what has run.

Note [Doubt]
An entry of the store may be well formed and still withhold what can run, by mistake or on purpose:
it can leave candidates out, call them not deterministic, or give reasons against them, also for
the same problem in the other precision. So where none may run of what the store has told of, or
one that a flag names is missing, cuDNN is asked for the candidates as if nothing were stored, once
for each problem. Known times stay. What cuDNN does not name does not run any more, and the store
is not read again for this problem. Once something has run thanks to that, the entry is replaced,
with a warning.
"""

from __future__ import annotations

import marshal
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from . import store
from ._cache import BoundedCache
from ._candidates import gather, other_precision
from ._check import WRONG
from ._stored import UNNAMED
from .config import Policy
from .selection import Candidate

if TYPE_CHECKING:
    from ._core import Problem, UseCount

_FIELDS = [field.name for field in fields(Candidate)]


_numbers = count()
_counting = threading.RLock()  # a signal handler may come in between


class Use:
    """What was chosen for a problem under one policy, and how often it ran: by Python and by
    native code."""

    __slots__ = ("chosen", "native", "number", "policy", "runs", "source")

    def __init__(self, policy: Policy, chosen: int, source: str) -> None:
        self.policy = policy
        self.chosen = chosen  # its index
        self.source = source
        self.number = next(_numbers)  # in order of first use, of all problems
        self.runs = 0
        self.native: UseCount | None = None

    def native_count(self, make: Callable[[], UseCount]) -> UseCount:
        """The one count of native runs, for whichever thread asks first and all others."""
        with _counting:
            if self.native is None:
                self.native = make()
            return self.native

    @property
    def native_runs(self) -> int:
        return 0 if self.native is None else self.native.count

    @property
    def count(self) -> int:
        return self.runs + self.native_runs


class Knowledge:
    """What is known of one problem, shared by all threads.

    There can be a hundred candidates, and they are looked at when something is chosen and not
    again: between such times they are packed, so that a problem costs few bytes.
    """

    __slots__ = (
        "_candidates",
        "_lock",
        "_now",
        "_packed",
        "believed",
        "doubted",
        "measuring",
        "problem",
        "source",
        "uses",
    )

    def __init__(self, problem: Problem, candidates: list[Candidate], source: str) -> None:
        self.problem = problem
        self.source = source  # of the times: "stored" or "measured"
        self.believed = source == "stored"  # whether something of it was read from the store
        self.doubted: str | None = None  # the entry in spite of which cuDNN was asked: Note [Doubt]
        # All choices, in order of first use: another thread may go on with one that has been
        # replaced. They are few, as a candidate that fails is not chosen again.
        self.uses: list[Use] = []
        self._now: dict[Policy, Use] = {}  # those in force
        self.measuring = threading.Lock()  # so that one thread measures
        self._candidates: list[Candidate] | None = candidates
        self._packed = b""  # the same in few bytes, or empty where they have changed
        self._lock = threading.RLock()  # a signal handler may come in between

    @property
    def candidates(self) -> list[Candidate]:
        """All candidates, now; to change one, call :meth:`update`."""
        with self._lock:
            return list(self._unpacked())

    def _unpacked(self) -> list[Candidate]:
        if self._candidates is None:
            self._candidates = unpack(self._packed)
        return self._candidates

    def _replace(self, candidates: list[Candidate]) -> None:
        self._candidates, self._packed = candidates, b""

    def pack(self) -> None:
        """Keep the candidates in few bytes until they are next looked at."""
        with self._lock:
            if self._candidates is not None:
                self._packed = self._packed or pack(self._candidates)
                self._candidates = None

    def update(self, index: int, **changes: Any) -> Candidate:
        """Put changes into one candidate; other threads may change it at the same time."""
        with self._lock:
            candidates = self._unpacked()
            candidate = replace(candidates[index], **changes)
            candidates[index] = candidate
            self._replace(candidates)
            return candidate

    def reject(self, index: int, text: str, out_of_memory: bool) -> Candidate:
        """Note why a candidate does not run, unless another thread has found why; a lack of memory
        may pass, and any other reason counts more."""
        with self._lock:
            candidates = self._unpacked()
            known = candidates[index]
            if known.rejected is None or (known.out_of_memory and not out_of_memory):
                candidates[index] = replace(known, rejected=text, out_of_memory=out_of_memory)
                self._replace(candidates)
            return candidates[index]

    def add(self, candidate: Candidate) -> int:
        """Append a candidate; its index."""
        with self._lock:
            candidates = self._unpacked()
            candidates.append(candidate)
            self._replace(candidates)
            return len(candidates) - 1

    def refresh(self) -> None:
        """Take over what has become known elsewhere; each index stays as it is."""
        stored = store.read(self.problem) if self.doubted is None else None
        if stored:
            self._take(stored)
        self._borrow()

    def lacks(self, names: Sequence[str]) -> bool:
        """Whether one of these candidates or providers is not among the candidates."""
        known = {name for c in self.candidates for name in (c.name, c.provider)}
        return not known.issuperset(names)

    def ask_again(self) -> bool:
        """Ask cuDNN for the candidates if the store has told of them: see Note [Doubt].

        Returns whether that was done, now or just before by another thread.
        """
        with self.measuring:
            if self.believed and self.doubted is None:
                named = gather(self.problem)
                with self._lock:
                    self._replace(_named(self._unpacked(), named))
                self.doubted = store.entry_of(self.problem)
            return self.doubted is not None

    def _take(self, stored: list[Candidate]) -> None:
        """Take over what another process has stored."""
        known = _telling(stored)
        with self._lock:
            candidates = self._unpacked()
            found = [_merged(c, known.pop((c.engine, c.bias), c)) for c in candidates]
            found += known.values()
            if found != candidates:
                self._replace(found)
                self.source, self.believed = "stored", True

    def _borrow(self) -> None:
        """Take over what is known of the same float32 problem in the other precision: times, and
        where tf32 is allowed there, also what did not run."""
        lender = _other_precision(self.problem)
        if lender is None:
            return
        known = _telling(lender.candidates)
        lender.pack()
        fails_too = not self.problem.tf32 and self.doubted is None
        with self._lock:
            candidates = self._unpacked()
            found = [_taught(c, known.get((c.engine, c.bias), c), fails_too) for c in candidates]
            if not any(c.time_ms for c in found):  # the budget was spent on others: these are due
                found = [
                    replace(f, skipped=c.skipped) for f, c in zip(found, candidates, strict=True)
                ]
            if not any(c.time_ms for c in candidates):
                self.source = lender.source
            self.believed = self.believed or lender.believed
            self._replace(found)

    def has_run(self, policy: Policy, chosen: int, source: str) -> tuple[Use, bool]:
        """Note what runs under a policy; the note that counts it, and whether that is new."""
        with self._lock:
            use = self._now.get(policy)
            if use is not None and use.chosen == chosen:
                return use, False
            wanted = policy, chosen, source
            before = (u for u in self.uses if (u.policy, u.chosen, u.source) == wanted)
            use = next(before, None)
            if use is None:
                use = Use(policy, chosen, source)
                self.uses.append(use)
            self._now[policy] = use
            return use, True

    def forget(self, policy: Policy | None = None, chosen: int | None = None) -> None:
        """What ran under a policy, or what chose a candidate, is in force no longer."""
        with self._lock:
            self._now = {p: u for p, u in self._now.items() if p != policy and u.chosen != chosen}


def pack(candidates: list[Candidate]) -> bytes:
    """Candidates in few bytes, for :func:`unpack` in the same process: by columns, as what is of
    one kind compresses best together."""
    columns = [[getattr(each, name) for each in candidates] for name in _FIELDS]
    return zlib.compress(marshal.dumps(columns), 9)


def unpack(data: bytes) -> list[Candidate]:
    return [Candidate(*row) for row in zip(*marshal.loads(zlib.decompress(data)), strict=True)]


def _telling(candidates: list[Candidate]) -> dict[object, Candidate]:
    """Those of which something is known, by what they run."""
    return {
        (c.engine, c.bias): c
        for c in candidates
        if c.time_ms is not None or c.skipped or c.rejected is not None
    }


def _merged(ours: Candidate, stored: Candidate) -> Candidate:
    """What is known of a candidate here and in the store."""
    if ours.rejected is not None or (stored.skipped and ours.time_ms is not None):
        return ours
    return stored


def _named(known: list[Candidate], named: list[Candidate]) -> list[Candidate]:
    """What cuDNN names, with the times that are known; each index stays as it is."""
    new = {(c.engine, c.bias): c for c in named}
    engines, passes = {c.engine for c in named}, {c.bias for c in named}
    found = []
    for candidate in known:
        asked = new.pop((candidate.engine, candidate.bias), None)
        if asked is not None:
            candidate = _asked(candidate, asked)
        elif candidate.engine not in engines or candidate.bias not in passes:
            candidate = replace(candidate, rejected=UNNAMED, out_of_memory=False)
        found.append(candidate)
    return [*found, *new.values()]


def _asked(known: Candidate, asked: Candidate) -> Candidate:
    """What cuDNN says of a candidate, with its times. It does not say that a result is wrong."""
    if known.out_of_memory or (known.rejected or "").startswith(WRONG):
        return known
    times = {name: getattr(known, name) for name in ("time_ms", "device_ms", "skipped")}
    return replace(asked, **times)


def _taught(candidate: Candidate, same: Candidate, fails_too: bool) -> Candidate:
    """A candidate with what is known of the same one in the other precision."""
    if candidate.rejected is not None or candidate.time_ms is not None:
        return candidate
    if same.rejected is None:
        size = candidate.workspace_bytes
        if candidate.provider == "graph":  # known once a plan is made
            size = size or same.workspace_bytes
        return replace(
            candidate,
            workspace_bytes=size,
            time_ms=same.time_ms,
            device_ms=same.device_ms,
            skipped=same.skipped,
        )
    lasting = fails_too and not same.may_pass
    return replace(candidate, rejected=same.rejected) if lasting else candidate


_known: BoundedCache[Problem, Knowledge] = BoundedCache(max_size=16384)


def knowledge_of(problem: Problem) -> Knowledge:
    """The one Knowledge of a problem: known, stored, or made from cuDNN's answers."""
    knowledge = _known.get(problem)
    if knowledge is None:
        # Two threads may both look; what the first one puts is what both use.
        stored = store.read(problem)
        found = Knowledge(problem, stored, "stored") if stored else _gathered(problem)
        knowledge = _known.put_new(problem, found)
    return knowledge


def _gathered(problem: Problem) -> Knowledge:
    """New candidates, with what is known of them in the other precision."""
    knowledge = Knowledge(problem, gather(problem), "measured")
    knowledge._borrow()
    return knowledge


def _other_precision(problem: Problem) -> Knowledge | None:
    """What is known or stored of the same float32 problem in the other precision."""
    if problem.dtype != "float32":
        return None
    other = other_precision(problem)
    knowledge = _known.get(other)
    if knowledge is None:
        stored = store.read(other)
        knowledge = Knowledge(other, stored, "stored") if stored is not None else None
    return knowledge


def everything() -> list[Knowledge]:
    """What is known of every problem."""
    return _known.values()


def forget_all() -> None:
    """Forget every problem; the store stays."""
    _known.clear()
