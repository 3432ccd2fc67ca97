"""Where candidates come from: cuDNN's engines and legacy algorithms, as records and as plans."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from sys import intern
from typing import TYPE_CHECKING, NamedTuple

from . import _loader, log
from .exceptions import (
    NOT_ASKED,
    CudnnError,
    CudnnNotInitializedError,
    reason_of,
)
from .selection import ADD, FUSED, IDENTITY, Candidate, problem_dict

if TYPE_CHECKING:
    from ._core import Plan, Problem

_HALF_TYPES = ("float16", "bfloat16")
_FIRST = 2  # engines that stand before the first pass for the bias
_PROMISING = 8  # so many engines stand before those that must be compiled first
_COMPILED = 2  # so many of these stand before the rest


class Blocked(NamedTuple):
    """Engines that are wrong for some problems, by name."""

    engines: str  # a pattern of whole names
    direction: str
    dtypes: tuple[str, ...]
    alignment: int  # blocked up to this alignment of the addresses, in bytes
    reason: str
    where: Callable[[Problem], bool] = lambda _: True  # of these problems


def _y_ends_between_128_bytes(problem: Problem) -> bool:
    element_bytes = 2 if problem.dtype in _HALF_TYPES else 4
    return problem.layout == "nchw" and prod(problem.y) * element_bytes % 128 != 0


# Found on an H200 by running every candidate against float64: `python tests/record_values.py`.
BLOCKED = (
    Blocked(  # 26 of 27 such problems were wrong, and none of 302 others
        r"eng70",
        "wgrad",
        (*_HALF_TYPES, "float32"),
        16,
        "its result is wrong in nchw where y takes no multiple of 128 bytes (cuDNN 9.19: relative "
        "errors of 1.4, NaN)",
        _y_ends_between_128_bytes,
    ),
    Blocked(
        r"eng70",
        "wgrad",
        (*_HALF_TYPES, "float32"),
        8,
        "it was not tried at addresses of less than 16 bytes' alignment (cuDNN 9.19)",
    ),
    Blocked(
        r"eng67(_.*)?",
        "wgrad",
        ("float32",),
        8,
        "it faults at addresses of less than 16 bytes' alignment (cuDNN 9.19)",
    ),
    Blocked(
        r"eng47(?!_k0=1_)(_.*)?",
        "wgrad",
        _HALF_TYPES,
        16,
        "it adds up parts in the half type (cuDNN 9.19: errors of 2.2e-3 to 6.2e-3 in bfloat16, "
        "where the others err by 1.7e-3)",
    ),
)


def gather(problem: Problem) -> list[Candidate]:
    """All candidates of a problem, the promising ones first. Needs the device.

    cuDNN's order of engines comes first, which is also PyTorch's. Engines that cuDNN compiles at
    run time (a tenth of a second each, up to one) stand behind the first of these, and the
    legacy algorithms, most of which run the same engines, come last. PyTorch adds a bias, except
    in candidates of their own: see :func:`with_best_pass`.
    """
    plain = _engines(problem, "convolution") + _legacy(problem)
    compiled, passes = [], []
    if problem.bias:
        plain = [replace(c, bias=ADD) for c in plain]
        compiled = [replace(c, bias=FUSED) for c in _engines(problem, "convolution_bias")]
        first = next((c for c in plain if c.rejected is None), None)
        if first is not None:
            passes = [
                replace(first, bias=intern(c.algorithm), rejected=c.rejected)
                for c in _engines(problem, pass_operation(problem))
            ]
    elif problem.direction == "dgrad":
        # For the other directions these are wrong at some sizes (cuDNN 9.19: relative error 1.1
        # in wgrad, elements left unwritten in fprop).
        compiled = [
            replace(c, algorithm=intern(c.algorithm + IDENTITY))
            for c in _engines(problem, "convolution_identity")
        ]
    return [
        *plain[:_FIRST],
        *passes[:1],
        *plain[_FIRST:_PROMISING],
        *compiled[:_COMPILED],
        *plain[_PROMISING:],
        *passes[1:],
        *compiled[_COMPILED:],
    ]


def with_best_pass(candidates: Sequence[Candidate]) -> Candidate | None:
    """The fastest convolution followed by the fastest pass for the bias, if it is yet untried.

    One convolution was timed with every pass, and every convolution with one.
    """
    able = [c for c in candidates if c.rejected is None and c.bias not in (None, FUSED)]
    timed = [c for c in able if c.time_ms is not None]
    by_engine: dict[tuple[str, str, str], list[Candidate]] = {}
    for candidate in timed:
        by_engine.setdefault(candidate.engine, []).append(candidate)
    if not timed:
        return None
    best = _fastest([c for c in timed if c.bias == ADD] or timed)
    bias = _fastest(max(by_engine.values(), key=len)).bias
    known = {(c.engine, c.bias) for c in candidates}
    wanted = replace(best, bias=bias, time_ms=None, device_ms=None, skipped=False)
    return None if (wanted.engine, bias) in known else wanted


def _fastest(timed: Sequence[Candidate]) -> Candidate:
    return min(timed, key=lambda c: c.time_ms or 0.0)


def other_precision(problem: Problem) -> Problem:
    """The same float32 problem with tf32 forbidden if it is allowed, allowed if forbidden."""
    fields = problem_dict(problem) | {"tf32": not problem.tf32}
    other: Problem = _loader.require().Problem(**fields)
    return other


def _engines(problem: Problem, operation: str) -> list[Candidate]:
    """The engines that cuDNN's heuristics name for a graph, as candidates without a bias."""
    try:
        engines, refused = _loader.require().graph_heuristic(problem, operation)
    except CudnnNotInitializedError:
        raise
    except CudnnError as error:  # the legacy algorithms may run
        return [_no_engines(reason_of(error, NOT_ASKED))]
    for mode in refused:  # whose engines the candidates lack
        reason, *_ = mode.splitlines()
        log.rejected(problem, _no_engines(f"{operation}, {reason}"))
    return [
        Candidate(
            "graph",
            intern(engine.name),
            _math_type(engine.notes),
            "NONDETERMINISTIC" not in engine.notes,
            0,  # known once a plan is made
            rejected=_objection_to_engine(problem, engine.name, engine.notes),
        )
        for engine in engines
    ]


def _no_engines(reason: str) -> Candidate:
    return Candidate("graph", "engines", "DEFAULT_MATH", False, 0, rejected=reason)


def _math_type(notes: Sequence[str]) -> str:
    return "TENSOR_OP_MATH" if "TENSOR_CORE" in notes else "FMA_MATH"


def _objection_to_engine(problem: Problem, engine: str, notes: Sequence[str]) -> str | None:
    """Why an engine is less right than the problem asks, or None. See Note [Imprecise]."""
    if "DOWN_CONVERT_INPUTS" in notes:
        return "it may round its inputs to a shorter type"
    if "FFT" in notes:
        return "it works by FFT, which spreads NaN and infinity over the image"
    if any(note.startswith("WINOGRAD") for note in notes):
        return "it works by Winograd's method, which can lose NaN"
    if problem.dtype in _HALF_TYPES and "REDUCED_PRECISION_REDUCTION" in notes:
        return f"it adds up in {problem.dtype}, not in float32"
    if problem.dtype == "float32" and not problem.tf32 and "TENSOR_CORE" in notes:
        return "it may round float32 to tf32, and allow_tf32 is off"
    for blocked in BLOCKED:
        if (
            problem.direction == blocked.direction
            and problem.dtype in blocked.dtypes
            and problem.alignment <= blocked.alignment
            and re.fullmatch(blocked.engines, engine)
            and blocked.where(problem)
        ):
            return blocked.reason
    return None


def pass_operation(problem: Problem) -> str:
    """How a cuDNN graph of its own sees the addition of the bias; see Operation in src/graph."""
    rows = problem.layout == "nchw" or problem.x[1] == 1
    return "bias_rows" if rows else "bias"


def _legacy(problem: Problem) -> list[Candidate]:
    """The legacy algorithms in cuDNN's order.

    Where float32 may run in tf32, those of strict float32 follow: they may run too, and once
    timed they need no timing when tf32 is forbidden.
    """
    candidates = _asked(problem)
    if problem.tf32:
        known = {c.engine for c in candidates}
        candidates += [c for c in _asked(other_precision(problem)) if c.engine not in known]
    return candidates


def _asked(problem: Problem) -> list[Candidate]:
    core = _loader.require()
    try:
        results = core.legacy_heuristic(problem)
    except CudnnNotInitializedError:
        raise
    except CudnnError as error:  # the graphs' engines may run
        return [
            Candidate(
                "legacy", name, "DEFAULT_MATH", False, 0, rejected=reason_of(error, NOT_ASKED)
            )
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

    Note [Imprecise]
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


def make_plan(problem: Problem, candidate: Candidate, compiled: Sequence[bytes] = ()) -> Plan:
    """The plan of a candidate that may run; CudnnError or ValueError if there is none.

    It adds the bias unless that is left to PyTorch (``candidate.bias`` is "add"). Needs the
    device. ``compiled`` is the same of an earlier plan of the candidate.
    """
    plan = plan_of(problem, candidate, compiled)
    if candidate.provider == "graph" or candidate.bias not in (None, FUSED, ADD):
        # The record may come from a file; what runs is what the engine says of itself.
        engine = candidate.algorithm.partition(IDENTITY)[0]
        notes = plan.notes
        objection = _objection_to_engine(problem, engine, notes)
        if candidate.deterministic and "NONDETERMINISTIC" in notes:
            objection = "it is not deterministic, and its record says that it is"
        if objection is not None:
            raise ValueError(objection)
    return plan


def plan_of(problem: Problem, candidate: Candidate, compiled: Sequence[bytes] = ()) -> Plan:
    """The plan of a candidate, however right it is; errors as :func:`make_plan`."""
    core = _loader.require()
    first, second, *_ = (*compiled, b"", b"")
    plan: Plan
    if candidate.provider == "legacy":
        plan = core.legacy_plan(problem, candidate.algorithm, candidate.math_type)
    else:
        engine, identity, _ = candidate.algorithm.partition(IDENTITY)
        operation = "convolution_identity" if identity else "convolution"
        if candidate.bias == FUSED:
            operation = "convolution_bias"
        plan = _built(problem, operation, engine, first)
    if candidate.bias not in (None, FUSED, ADD):
        addition = _built(problem, pass_operation(problem), candidate.bias, second)
        plan = core.sequence(plan, addition)
    return plan


def _built(problem: Problem, operation: str, engine: str, compiled: bytes) -> Plan:
    core = _loader.require()
    plan: Plan = (
        core.restored_plan(problem.device, compiled)
        if compiled
        else core.graph_plan(problem, operation, engine)
    )
    return plan
