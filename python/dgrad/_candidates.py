"""Where candidates come from: cuDNN's legacy algorithms, as records and as plans."""

from __future__ import annotations

from sys import intern
from typing import TYPE_CHECKING

from . import _loader
from .exceptions import CudnnBadParameterError, CudnnNotSupportedError
from .selection import Candidate, problem_dict

if TYPE_CHECKING:
    from ._core import Plan, Problem

_HALF_TYPES = ("float16", "bfloat16")


def gather(problem: Problem) -> list[Candidate]:
    """All candidates of a problem in cuDNN's order. Needs the device.

    Where float32 may run in tf32, those of strict float32 follow: they may run too, and once
    timed they need no timing when tf32 is forbidden.
    """
    candidates = _asked(problem)
    if problem.tf32:
        known = {(c.algorithm, c.math_type) for c in candidates}
        strict = _asked(other_precision(problem))
        candidates += [c for c in strict if (c.algorithm, c.math_type) not in known]
    return candidates


def other_precision(problem: Problem) -> Problem:
    """The same float32 problem with tf32 forbidden if it is allowed, allowed if forbidden."""
    fields = problem_dict(problem) | {"tf32": not problem.tf32}
    other: Problem = _loader.require().Problem(**fields)
    return other


def _asked(problem: Problem) -> list[Candidate]:
    core = _loader.require()
    try:
        results = core.legacy_heuristic(problem)
    except (CudnnBadParameterError, CudnnNotSupportedError) as error:  # others may pass
        return [
            Candidate("legacy", name, "DEFAULT_MATH", False, 0, rejected=str(error))
            for name in core.legacy_algorithms(problem.direction)
        ]
    # Interned: thousands of problems share these few names.
    return [
        Candidate(
            "legacy",
            intern(result.algorithm),
            intern(result.math_type),
            result.deterministic,
            result.workspace_bytes,
            rejected=intern(f"cuDNN's heuristic says {result.rejected}")
            if result.rejected
            else imprecision(problem, result.algorithm, result.math_type),
        )
        for result in results
    ]


def imprecision(problem: Problem, algorithm: str, math_type: str) -> str | None:
    """Why a legacy algorithm is less right than the problem asks, or None.

    Note [Imprecise algorithms]
    Results are to be right within the rounding of the dtype, and NaN is to stay NaN. Measured on
    an H200 with cuDNN 9.19 against float64, errors as relative norms:
    WINOGRAD_NONFUSED gives finite numbers where an input is NaN (all dtypes, 3x3 kernels), and
    with 5x5 kernels errs by 5e-4 to 1e-3 whatever the math type, where the other algorithms err
    by 2e-7 (strict float32), 3e-4 (tf32) and 2e-4 (float16).
    ALGO_0 of dgrad and wgrad adds up in half types with atomics: up to 8e-3 (bfloat16) and 1e-3
    (float16), more with larger kernels, where the others err by 1.7e-3 and 2e-4.
    """
    if algorithm == "WINOGRAD_NONFUSED":
        return "it gives finite numbers where an input is NaN"
    if problem.dtype in _HALF_TYPES and algorithm == "ALGO_0" and problem.direction != "fprop":
        return f"it adds up in {problem.dtype}, not in float32"
    if problem.dtype == "float32":
        if math_type == "TENSOR_OP_MATH_ALLOW_CONVERSION":
            return "it may round float32 to half precision"
        if not problem.tf32 and math_type != "FMA_MATH":
            return "it may round float32 to tf32, and allow_tf32 is off"
    return None


def make_plan(problem: Problem, candidate: Candidate) -> Plan:
    """The plan of a candidate; CudnnError where it is not supported. Needs the device."""
    plan: Plan = _loader.require().legacy_plan(problem, candidate.algorithm, candidate.math_type)
    return plan
