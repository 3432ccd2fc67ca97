"""From a problem to a selection to a plan that runs: the only home of policy.

What is known of a problem (its candidates, and which of them turned out not to run) is shared by
all threads. A plan belongs to the thread and device that made it.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from . import log
from ._cache import BoundedCache
from ._candidates import gather, make_plan
from .config import Policy
from .exceptions import CudnnError, NotSupportedError, OutOfMemoryError, TorchOutOfMemoryError
from .selection import Candidate, Selection, format_bytes, reasons_table, reproduction

if TYPE_CHECKING:
    from ._core import Plan, Problem


class _Knowledge:
    """The candidates of one problem in cuDNN's order, and the policies already announced."""

    __slots__ = ("announced", "candidates")

    def __init__(self, candidates: list[Candidate]) -> None:
        self.candidates = candidates
        self.announced: set[Policy] = set()


class PlanCache(BoundedCache[Any, Any]):
    """Ready calls by thread, device, sizes, strides and flags: ``dgrad.plan_cache``."""

    def clear(self) -> None:
        """Forget all plans, and which candidates were found not to run."""
        super().clear()
        _known.clear()


_known: BoundedCache[Problem, _Knowledge] = BoundedCache(max_size=4096)
_lock = threading.Lock()
plan_cache = PlanCache(max_size=1024)


def _objection(candidate: Candidate, direction: str, policy: Policy) -> str | None:
    """Why ``candidate`` may not run under ``policy``, or None."""
    if candidate.rejected is not None:
        return candidate.rejected
    wanted = dict(policy.algorithm).get(direction)
    if wanted is not None and candidate.name != wanted:
        return f"algorithm={wanted!r} is asked for"
    if policy.deterministic and not candidate.deterministic:
        return "it is not deterministic, and deterministic algorithms are asked for"
    limit = policy.workspace_limit
    if limit is not None and candidate.workspace_bytes > limit:
        return (
            f"its workspace of {format_bytes(candidate.workspace_bytes)} is over "
            f"workspace_limit {format_bytes(limit)}"
        )
    return None


def _knowledge(problem: Problem) -> _Knowledge:
    with _lock:
        knowledge = _known.get(problem)
        if knowledge is None:
            knowledge = _Knowledge(gather(problem))
            _known.put(problem, knowledge)
        return knowledge


class Runner:
    """Runs one problem under one policy, on the thread that made it.

    The first usable candidate in cuDNN's order runs. One that fails, or whose workspace cannot
    be had, is noted with the reason for all threads, and the next one takes its place.
    """

    __slots__ = (
        "_announced",
        "_device",
        "_index",
        "_knowledge",
        "_plan",
        "_policy",
        "_problem",
        "_workspace_bytes",
    )

    def __init__(self, problem: Problem, policy: Policy) -> None:
        self._problem = problem
        self._policy = policy
        self._device = problem.device
        self._plan: Plan | None = None

    def run(self, x: int, w: int, y: int) -> None:
        """Queue the work on the current stream; the problem's device must be current.

        Args:
            x, w, y: device pointers; the result of the direction is overwritten.

        Raises:
            NotSupportedError: no candidate can run; OutOfMemoryError if memory is what lacks.
        """
        while True:
            if self._plan is None:
                self._choose()
            assert self._plan is not None
            size = self._workspace_bytes
            try:
                workspace = (
                    torch.empty(size, dtype=torch.uint8, device=f"cuda:{self._device}")
                    if size
                    else None
                )
                self._plan.execute(
                    x,
                    w,
                    y,
                    workspace.data_ptr() if workspace is not None else 0,
                    torch._C._cuda_getCurrentRawStream(self._device),
                )
            except (CudnnError, TorchOutOfMemoryError) as error:
                self._reject(error)
                continue
            if not self._announced:
                self._announce()
            return

    def _choose(self) -> None:
        problem, policy = self._problem, self._policy
        self._knowledge = knowledge = _knowledge(problem)
        for index, candidate in enumerate(knowledge.candidates):
            if _objection(candidate, problem.direction, policy) is not None:
                continue
            self._index = index
            try:
                plan = make_plan(problem, candidate)
            except CudnnError as error:
                self._reject(error)
                continue
            # The heuristic's number is an estimate.
            if plan.workspace_bytes != candidate.workspace_bytes:
                candidate = replace(candidate, workspace_bytes=plan.workspace_bytes)
                knowledge.candidates[index] = candidate
                if _objection(candidate, problem.direction, policy) is not None:
                    continue
            self._plan = plan
            self._workspace_bytes = plan.workspace_bytes
            self._announced = policy in knowledge.announced
            return
        raise self._nothing_usable()

    def _reject(self, error: Exception) -> None:
        """Note that the current candidate does not run, for all threads."""
        out_of_memory = isinstance(error, TorchOutOfMemoryError)
        candidate = self._knowledge.candidates[self._index]
        reason = str(error).strip().splitlines()[0]
        if out_of_memory:
            size = format_bytes(candidate.workspace_bytes)
            reason = f"out of memory: no room for its workspace of {size}: {reason}"
        candidate = replace(candidate, rejected=reason, out_of_memory=out_of_memory)
        self._knowledge.candidates[self._index] = candidate
        self._plan = None
        log.rejected(self._problem, candidate)

    def _announce(self) -> None:
        knowledge, policy = self._knowledge, self._policy
        self._announced = True
        with _lock:
            if policy in knowledge.announced:
                return
            knowledge.announced.add(policy)
        direction = self._problem.direction
        candidates = tuple(knowledge.candidates)
        log.selected(
            Selection(
                problem=self._problem,
                chosen=candidates[self._index],
                candidates=candidates,
                objections=tuple(_objection(c, direction, policy) for c in candidates),
                source="forced" if direction in dict(policy.algorithm) else "heuristic",
            )
        )

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
                ("algorithm", dict(policy.algorithm) or None),
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
            self._knowledge.candidates[index] = replace(
                reasons[index][0], rejected=None, out_of_memory=False
            )
        out_of_memory = bool(lacking)
        what = "is out of memory for" if out_of_memory else "has no usable candidate for"
        message = (
            f"dgrad {what} {problem}\n{reasons_table(reasons)}\n"
            f"To reproduce:\n\n{reproduction(problem, flags)}\n"
        )
        return OutOfMemoryError(message) if out_of_memory else NotSupportedError(message)
