"""What is said of candidates that do not run: of one the reason, and of all an error that says how
to make the same call again; and of a capture that cuDNN cannot work in."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from . import _reproduction
from .exceptions import (
    CudnnError,
    NotSupportedError,
    OutOfMemoryError,
    TorchOutOfMemoryError,
    first_line,
    reason_of,
)
from .planner import objection
from .selection import Candidate, format_bytes, reasons_table

if TYPE_CHECKING:
    from ._core import Problem
    from ._knowledge import Knowledge
    from .config import Policy

_ALLOCATION_FAILED = (4003, 4004)  # CUDNN_STATUS_INTERNAL_ERROR_HOST / DEVICE_ALLOCATION_FAILED


def lacks_memory(error: Exception) -> bool:
    """Whether memory is what lacked, PyTorch's or cuDNN's own."""
    of_cudnn = isinstance(error, CudnnError) and error.status in _ALLOCATION_FAILED
    return of_cudnn or isinstance(error, TorchOutOfMemoryError)


def reason(candidate: Candidate, error: Exception) -> tuple[str, bool]:
    """Why a candidate does not run, in one line, and whether memory is what lacked."""
    text = reason_of(error)
    out_of_memory = lacks_memory(error)
    if out_of_memory:
        size = format_bytes(candidate.workspace_bytes)
        text = f"out of memory: no room for its workspace of {size}: {first_line(error)}"
    return text, out_of_memory


def nothing_usable(knowledge: Knowledge, policy: Policy) -> NotSupportedError:
    """The error for a problem of which no candidate can run; memory that lacked is forgotten."""
    problem = knowledge.problem
    reasons = [
        (candidate, objection(candidate, problem.direction, policy) or "not tried")
        for candidate in knowledge.candidates
    ]
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
    message = f"dgrad {what} {problem}\n{reasons_table(reasons)}\n{_again(problem, policy)}"
    return OutOfMemoryError(message) if out_of_memory else NotSupportedError(message)


def failed(error: CudnnError, problem: Problem, policy: Policy) -> RuntimeError:
    """What to raise for an error of cuDNN's that is no candidate's: it does not start, mostly."""
    text = str(error)
    if torch.cuda.is_current_stream_capturing():
        text += (
            "; while a CUDA graph is captured, when cuDNN cannot start on a thread: call "
            "dgrad.warm_up(model, *inputs) on this thread before the capture"
        )
    elif lacks_memory(error):  # for cuDNN's own state
        return OutOfMemoryError(
            f"dgrad is out of memory for {problem}: {error}\n{_again(problem, policy)}"
        )
    text += f"\n{_again(problem, policy)}"
    return type(error)(text, error.status, error.call, error.detail)


def _again(problem: Problem, policy: Policy) -> str:
    flags = {
        name: value
        for name, value in (
            ("allow_tf32", problem.tf32 if problem.dtype == "float32" else None),
            ("deterministic", policy.deterministic),
            ("workspace_limit", policy.workspace_limit),
            (
                "algorithm",
                {d: n[0] if len(n) == 1 else list(n) for d, n in policy.algorithm} or None,
            ),
            ("fallback", "error"),
        )
        if value is not None
    }
    return f"To reproduce:\n\n{_reproduction.of_problem(problem, flags)}\n"
