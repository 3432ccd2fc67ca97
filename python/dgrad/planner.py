"""From a problem to a selection to a plan that runs: the only home of policy.

What is known of a problem is shared by all threads (``_knowledge.py``). A plan belongs to the
thread and device that made it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from . import log, store
from ._cache import BoundedCache
from ._candidates import make_plan
from ._knowledge import forget_all, knowledge_of
from ._watch import note, watchers
from .config import Policy
from .exceptions import (
    CudnnError,
    CudnnExecutionError,
    CudnnInternalError,
    CudnnNotInitializedError,
    NotSupportedError,
    OutOfMemoryError,
    TorchOutOfMemoryError,
)
from .measure import Contestant, measure
from .selection import Candidate, Selection, format_bytes, reasons_table, reproduction

if TYPE_CHECKING:
    from ._core import Plan, Problem

_NOISE = 1.03  # times this close are the same time
_FAILURES = (CudnnError, TorchOutOfMemoryError)
_PASSING = (CudnnExecutionError, CudnnInternalError)  # may not last: not for the store
_ALLOCATION_FAILED = (4003, 4004)  # CUDNN_STATUS_INTERNAL_ERROR_HOST / DEVICE_ALLOCATION_FAILED


class PlanCache(BoundedCache[Any, Any]):
    """Ready calls by thread, device, sizes, strides and flags: ``dgrad.plan_cache``."""

    def clear(self) -> None:
        """Forget all plans and all that was learned of their problems; the store stays."""
        super().clear()
        forget_all()


plan_cache = PlanCache(max_size=1024)


def _objection(candidate: Candidate, direction: str, policy: Policy) -> str | None:
    """Why ``candidate`` may not run under ``policy``, or None."""
    if candidate.rejected is not None:
        return candidate.rejected
    wanted = policy.wanted(direction)
    if wanted and candidate.name not in wanted:
        return f"algorithm={' or '.join(map(repr, wanted))} is asked for"
    if policy.deterministic and not candidate.deterministic:
        return "it is not deterministic, and deterministic algorithms are asked for"
    limit = policy.workspace_limit
    if limit is not None and candidate.workspace_bytes > limit:
        return (
            f"its workspace of {format_bytes(candidate.workspace_bytes)} is over "
            f"workspace_limit {format_bytes(limit)}"
        )
    return None


def _preference(candidates: list[Candidate], direction: str, policy: Policy) -> list[int]:
    """The candidates that may run, best first."""
    usable = [i for i, c in enumerate(candidates) if _objection(c, direction, policy) is None]
    wanted = policy.wanted(direction)
    if wanted:
        return sorted(usable, key=lambda i: wanted.index(candidates[i].name))
    times = {i: candidates[i].time_ms for i in usable}
    known = {i: time for i, time in times.items() if time is not None}
    if policy.selection == "heuristic" or not known:
        return usable
    best = min(known.values())

    def rank(i: int) -> tuple[float, ...]:
        candidate, time = candidates[i], known.get(i)
        if time is None:
            return 2, i
        if time > best * _NOISE:
            return 1, time
        # Within the noise the deterministic one and then the smaller workspace wins.
        return 0, not candidate.deterministic, candidate.workspace_bytes, i

    return sorted(usable, key=rank)


class Runner:
    """Runs one problem under one policy, on the thread that made it.

    The best usable candidate runs. One that fails, or whose workspace cannot be had, is noted
    with the reason for all threads, and the next one takes its place.
    """

    __slots__ = (
        "_announced",
        "_device",
        "_index",
        "_knowledge",
        "_plan",
        "_policy",
        "_problem",
        "_provisional",
        "_workspace_bytes",
    )

    def __init__(self, problem: Problem, policy: Policy) -> None:
        self._problem = problem
        self._policy = policy
        self._device = torch.device("cuda", problem.device)
        self._plan: Plan | None = None
        self._provisional = False

    def run(self, x: int, w: int, y: int) -> None:
        """Queue the work on the current stream; the problem's device must be current.

        Args:
            x, w, y: device pointers; the result of the direction is overwritten.

        Raises:
            NotSupportedError: no candidate can run; OutOfMemoryError if memory is what lacks.
        """
        while True:
            if self._plan is None or self._provisional:
                self._choose(x, w, y)
            assert self._plan is not None
            try:
                _execute(self._plan, self._workspace_bytes, self._device, x, w, y)
            except _FAILURES as error:
                if isinstance(error, CudnnError) and torch.cuda.is_current_stream_capturing():
                    raise  # of the capture, perhaps, and not of the candidate
                self._reject(self._index, error)
                self._plan = None
                continue
            self._knowledge.uses += 1
            if not self._announced:
                self._announce()
            if watchers:
                note(self.selection())
            return

    def _choose(self, x: int, w: int, y: int) -> None:
        problem, policy = self._problem, self._policy
        self._knowledge = knowledge = knowledge_of(problem)
        missing = self._untimed()
        self._provisional = bool(missing) and torch.cuda.is_current_stream_capturing()
        if self._provisional and self._plan is not None:
            return
        if missing and not self._provisional:
            with knowledge.measuring:
                missing = self._untimed()  # another thread may have been first
                if missing:
                    self._measure(missing, x, w, y)
        for index in _preference(knowledge.candidates, problem.direction, policy):
            try:
                plan = self._make_plan(index)
            except CudnnError as error:
                self._reject(index, error)
                continue
            if _objection(knowledge.candidates[index], problem.direction, policy) is not None:
                continue  # the plan knows a larger workspace than the heuristic did
            self._index, self._plan = index, plan
            self._workspace_bytes = plan.workspace_bytes
            self._announced = policy in knowledge.selections
            if self._provisional:
                log.captured(problem)
            return
        raise self._nothing_usable()

    def _untimed(self) -> list[int]:
        """The candidates to time before this policy can choose."""
        policy, candidates = self._policy, self._knowledge.candidates
        direction = self._problem.direction
        if policy.selection == "heuristic" or policy.wanted(direction):
            return []
        usable = _preference(candidates, direction, policy)
        if len(usable) < 2:
            return []
        again = policy.selection == "exhaustive"
        return sorted(
            i
            for i in usable
            if candidates[i].time_ms is None and (again or not candidates[i].skipped)
        )

    def _make_plan(self, index: int) -> Plan:
        candidate = self._knowledge.candidates[index]
        plan = make_plan(self._problem, candidate)
        if plan.workspace_bytes != candidate.workspace_bytes:  # the heuristic's is an estimate
            self._knowledge.update(index, workspace_bytes=plan.workspace_bytes)
        return plan

    def _measure(self, indices: list[int], x: int, w: int, y: int) -> None:
        """Time candidates on the caller's tensors: the result is overwritten by the run after."""
        problem, policy, knowledge = self._problem, self._policy, self._knowledge
        contestants: dict[int, Contestant] = {}
        for index in indices:
            try:
                plan = self._make_plan(index)
            except CudnnError as error:
                self._reject(index, error)
                continue
            if _objection(knowledge.candidates[index], problem.direction, policy) is None:
                contestants[index] = Contestant(self._timed_run(plan, x, w, y))
        budget_s = policy.measure_budget if policy.selection == "measure" else None
        reserved = torch.cuda.memory_reserved(self._device)
        measure(list(contestants.values()), budget_s, _FAILURES)
        if torch.cuda.memory_reserved(self._device) > reserved:
            # The allocator would keep the workspaces of all that were tried.
            torch.cuda.empty_cache()
        for index, contestant in contestants.items():
            if contestant.error is not None:
                self._reject(index, contestant.error)
            else:
                time_ms = contestant.time_ms
                knowledge.update(index, time_ms=time_ms, skipped=time_ms is None)
        knowledge.source = "measured"
        knowledge.forget(policy=policy)  # what ran in a capture is chosen anew
        errors = [contestant.error for contestant in contestants.values()]
        if not any(isinstance(error, _PASSING) for error in errors):
            store.write(problem, list(knowledge.candidates))

    def _timed_run(self, plan: Plan, x: int, w: int, y: int) -> Any:
        size, device = plan.workspace_bytes, self._device
        return lambda: _execute(plan, size, device, x, w, y)

    def _reject(self, index: int, error: Exception) -> None:
        """Note that a candidate does not run, for all threads."""
        if isinstance(error, CudnnNotInitializedError):
            raise error  # cuDNN does not start: no fault of the candidate
        out_of_memory = isinstance(error, TorchOutOfMemoryError) or (
            isinstance(error, CudnnError) and error.status in _ALLOCATION_FAILED
        )
        candidate = self._knowledge.candidates[index]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if out_of_memory:
            size = format_bytes(candidate.workspace_bytes)
            reason = f"out of memory: no room for its workspace of {size}: {reason}"
        self._knowledge.forget(chosen=index)
        candidate = self._knowledge.update(index, rejected=reason, out_of_memory=out_of_memory)
        log.rejected(self._problem, candidate)

    def selection(self) -> Selection:
        """What this runner has chosen, and why."""
        knowledge, policy = self._knowledge, self._policy
        direction = self._problem.direction
        candidates = tuple(knowledge.candidates)
        source = knowledge.source
        if policy.wanted(direction):
            source = "forced"
        elif policy.selection == "heuristic" or candidates[self._index].time_ms is None:
            source = "heuristic"
        return Selection(
            problem=self._problem,
            candidates=candidates,
            chosen=self._index,
            objections=tuple(_objection(c, direction, policy) for c in candidates),
            source=source,
        )

    def _announce(self) -> None:
        self._announced = True
        selection = self.selection()
        if self._knowledge.ran(self._policy, selection):
            log.selected(selection, self._policy)

    def _nothing_usable(self) -> NotSupportedError:
        problem, policy = self._problem, self._policy
        reasons = [
            (candidate, _objection(candidate, problem.direction, policy) or "not tried")
            for candidate in self._knowledge.candidates
        ]
        flags = {
            name: value
            for name, value in (
                ("allow_tf32", problem.tf32 if problem.dtype == "float32" else None),
                ("deterministic", policy.deterministic or None),
                ("workspace_limit", policy.workspace_limit),
                (
                    "algorithm",
                    {d: n[0] if len(n) == 1 else list(n) for d, n in policy.algorithm} or None,
                ),
                ("fallback", "error"),
            )
            if value is not None
        }
        lacking = [
            index
            for index, (candidate, _) in enumerate(reasons)
            if candidate.out_of_memory
            and _objection(replace(candidate, rejected=None), problem.direction, policy) is None
        ]
        for index in lacking:  # with nothing else to run, memory is worth another look
            self._knowledge.update(index, rejected=None, out_of_memory=False)
        out_of_memory = bool(lacking)
        what = "is out of memory for" if out_of_memory else "has no usable candidate for"
        message = (
            f"dgrad {what} {problem}\n{reasons_table(reasons)}\n"
            f"To reproduce:\n\n{reproduction(problem, flags)}\n"
        )
        return OutOfMemoryError(message) if out_of_memory else NotSupportedError(message)


def _execute(plan: Plan, size: int, device: torch.device, x: int, w: int, y: int) -> None:
    # A storage and not a tensor, which deterministic algorithms would fill at each call.
    workspace = torch.UntypedStorage(size, device=device) if size else None
    plan.execute(
        x,
        w,
        y,
        workspace.data_ptr() if workspace is not None else 0,
        torch._C._cuda_getCurrentRawStream(device.index),
    )
