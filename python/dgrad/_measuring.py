"""Measures a problem's candidates on the caller's tensors, and stores what that teaches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from . import store
from ._candidates import with_best_pass
from ._check import Check
from ._knowledge import Knowledge
from .config import Policy
from .exceptions import (
    CudnnError,
    TorchOutOfMemoryError,
)
from .measure import Contestant, measure
from .planner import objection

if TYPE_CHECKING:
    from torch import Tensor

    from ._core import Plan, Problem

    Tensors = tuple[Tensor, Tensor, Tensor, Tensor | None]  # x, w, y, and a bias if there is one

UNPLANNABLE = (CudnnError, ValueError)
FAILURES = (*UNPLANNABLE, TorchOutOfMemoryError)


def timing_policy(policy: Policy) -> Policy:
    """All that determinism decides between is timed at once: switching it measures nothing."""
    return policy._replace(deterministic=False)


class Measuring:
    """One measuring of a problem, by the runner that gives ``make_plan``, ``execute``, ``reject``.

    ``execute`` gets a plan, how the bias is added, and the tensors; the others a candidate's index.
    """

    def __init__(
        self,
        problem: Problem,
        policy: Policy,
        knowledge: Knowledge,
        tensors: Tensors,
        *,
        make_plan: Callable[[int], Plan],
        execute: Callable[..., None],
        reject: Callable[[int, Exception], None],
    ) -> None:
        self._problem = problem
        self._policy = policy
        self._timing = timing_policy(policy)
        self._knowledge = knowledge
        self._tensors = tensors
        self._device = torch.device("cuda", problem.device)
        self._make_plan = make_plan
        self._execute = execute
        self._reject = reject
        self.plans: dict[int, Plan] = {}  # what was timed

    def measure(self, indices: list[int]) -> None:
        """Time candidates on the caller's tensors: the result is overwritten by the run after."""
        problem, policy, knowledge = self._problem, self._policy, self._knowledge
        x, w, y, _ = self._tensors
        result = {"dgrad": x, "fprop": y, "wgrad": w}[problem.direction]
        check = Check(result, problem)
        reserved = torch.cuda.memory_reserved(self._device)
        self._run_earlier(indices[0], check)
        contestants: dict[int, Contestant] = {}

        def enter(index: int) -> Contestant:
            contestants[index] = Contestant(
                partial(self._build, index), partial(self._prepare, index, check), check
            )
            return contestants[index]

        def late() -> list[Contestant]:
            candidates = knowledge.candidates
            for index, contestant in contestants.items():
                candidates[index] = replace(candidates[index], time_ms=contestant.time_ms)
            combined = with_best_pass(candidates) if problem.bias else None
            return [] if combined is None else [enter(knowledge.add(combined))]

        budget_s = policy.measure_budget if policy.selection == "measure" else None
        measure([enter(index) for index in indices], budget_s, FAILURES, late)
        self._learn(contestants)
        if any(contestant.time_ms is not None for contestant in contestants.values()):
            knowledge.source = "measured"
        candidates = knowledge.candidates
        if any(candidate.time_ms is not None for candidate in candidates):
            store.write(problem, candidates)
        check.drop()
        if torch.cuda.memory_reserved(self._device) > reserved:
            # The allocator would keep the workspaces of all that were tried.
            torch.cuda.empty_cache()

    def _run_earlier(self, begin: int, check: Check) -> None:
        """Give the check the first candidate's result, where that one is not timed this time."""
        direction, policy = self._problem.direction, self._timing
        for index, candidate in enumerate(self._knowledge.candidates[:begin]):
            if objection(candidate, direction, policy) is not None:
                continue
            try:
                run = self._prepare(index, check, self._build(index))
                if run is not None:
                    run()
                    check()
                    return
            except FAILURES as error:
                self._reject(index, error)

    def _build(self, index: int) -> Plan:
        """Make a candidate's plan, on whatever thread."""
        with torch.cuda.device(self._device):
            return self._make_plan(index)

    def _prepare(self, index: int, check: Check, plan: Plan) -> Callable[[], None] | None:
        candidate = self._knowledge.candidates[index]
        if objection(candidate, self._problem.direction, self._timing) is not None:
            return None
        check.spoil()
        self.plans[index] = plan
        return partial(self._execute, plan, candidate.bias, *self._tensors)

    def _learn(self, contestants: dict[int, Contestant]) -> None:
        for index, contestant in contestants.items():
            if contestant.error is not None:
                self._reject(index, contestant.error)
            else:
                self._knowledge.update(
                    index,
                    time_ms=contestant.time_ms,
                    device_ms=contestant.device_ms,
                    skipped=not contestant.reached,
                )
