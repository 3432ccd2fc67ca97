"""What a CUDA graph gets instead of the chosen candidate, made ready before the capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from . import _kernels, log, store
from ._measuring import FAILURES
from .exceptions import TorchOutOfMemoryError
from .planner import for_graphs, objection

if TYPE_CHECKING:
    from ._core import Plan, Problem
    from ._knowledge import Knowledge
    from .config import Policy
    from .selection import Candidate


class ForGraphs(NamedTuple):
    """A plan that has run, of the candidate at a place, how the bias is added, and its name."""

    place: int
    plan: Plan
    bias: str | None
    label: str


def label_of(problem: Problem, candidate: Candidate) -> str:
    """What the profiler calls it."""
    return f"dgrad::{problem.direction} {candidate}"


def plan_for_graphs(
    knowledge: Knowledge,
    policy: Policy,
    chosen: int,
    known: ForGraphs | None,
    *,
    execute: Callable[[Plan, str | None], None],
    note_workspace: Callable[[int, Plan], None],
    reject: Callable[[int, Exception], None],
) -> ForGraphs | None:
    """What a CUDA graph gets instead of the chosen candidate, None if it gets that one.

    Its plan is made and run once, as a capture is no time for either, unless it is ``known``.
    """
    problem = knowledge.problem
    while True:
        place = for_graphs(knowledge.candidates, problem.direction, policy, chosen)
        if place is None or (known is not None and known.place == place):
            return None if place is None else known
        candidate, restored = knowledge.candidates[place], False
        try:
            plan, restored = _kernels.make_plan(problem, candidate)
            note_workspace(place, plan)
            if objection(knowledge.candidates[place], problem.direction, policy) is not None:
                continue  # the plan knows a larger workspace than the heuristic did
            execute(plan, candidate.bias)
        except TorchOutOfMemoryError as error:  # the chosen one runs, no other thread lacks any
            log.not_for_graphs(label_of(problem, candidate), error)
            return None
        except FAILURES as error:
            if not (restored and _kernels.distrust(problem, candidate, error)):
                reject(place, error)
                if knowledge.believed:  # so that no other process tries it
                    store.write(problem, knowledge.candidates)
            continue
        if not restored:
            _kernels.keep(problem, candidate, plan)
        return ForGraphs(place, plan, candidate.bias, label_of(problem, candidate))
