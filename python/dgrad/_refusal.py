"""The error that says why nothing can run a problem, and how to make the same call again."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from .exceptions import NotSupportedError, OutOfMemoryError
from .planner import objection
from .selection import reasons_table, reproduction

if TYPE_CHECKING:
    from ._knowledge import Knowledge
    from .config import Policy


def nothing_usable(knowledge: Knowledge, policy: Policy) -> NotSupportedError:
    """The error for a problem of which no candidate can run; memory that lacked is forgotten."""
    problem = knowledge.problem
    reasons = [
        (candidate, objection(candidate, problem.direction, policy) or "not tried")
        for candidate in knowledge.candidates
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
        and objection(replace(candidate, rejected=None), problem.direction, policy) is None
    ]
    for index in lacking:  # with nothing else to run, memory is worth another look
        knowledge.update(index, rejected=None, out_of_memory=False)
    knowledge.pack()
    out_of_memory = bool(lacking)
    what = "is out of memory for" if out_of_memory else "has no usable candidate for"
    message = (
        f"dgrad {what} {problem}\n{reasons_table(reasons)}\n"
        f"To reproduce:\n\n{reproduction(problem, flags)}\n"
    )
    return OutOfMemoryError(message) if out_of_memory else NotSupportedError(message)
