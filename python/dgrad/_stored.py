"""The content of a stored entry: its fields, and what of it is believed.

An entry is data that anybody may have spoiled. It is taken only if it is exactly what this
version would have written; every other is refused with a ValueError that completes "entry ...".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import _loader
from ._candidates import imprecision
from .config import PROVIDERS
from .selection import ADD, FUSED, IDENTITY, PROBLEM_FIELDS, Candidate, problem_dict

if TYPE_CHECKING:
    from ._core import Problem

FORMAT = 3  # another one where a stored candidate gets another meaning, or may run after all
FOLDER = re.compile(rf"[A-Za-z0-9.-]{{1,100}}_sm[0-9]{{2,4}}_cudnn-[0-9.]{{5,20}}_v{FORMAT}")
MAX_BYTES = 64 * 1024
_MAX_BRACKETS = 4096  # bounds the nesting, and with it the stack that the JSON parser takes
_MAX_CANDIDATES = 256
_MAX_TEXT = 300
_ENGINE = re.compile(r"eng[0-9]{1,9}(_k[0-9]{1,9}=-?[0-9]{1,9}){0,64}")
_ATOMIC = {("dgrad", "ALGO_0"), ("wgrad", "ALGO_0"), ("wgrad", "ALGO_3")}  # add up in any order
UNNAMED = "cuDNN does not name it"  # the reason against what only a spoiled entry has
MATH_TYPES = ("DEFAULT_MATH", "TENSOR_OP_MATH", "TENSOR_OP_MATH_ALLOW_CONVERSION", "FMA_MATH")


def _is_time(value: object) -> bool:
    return type(value) is float and 0 < value < 1e7


def _is_reason(value: object) -> bool:
    return type(value) is str and 0 < len(value) <= _MAX_TEXT and value.isprintable()


_CHECKS: dict[str, Any] = {  # by field of a stored candidate; type() as True is an int too
    "provider": lambda value: value in PROVIDERS,
    "algorithm": lambda value: type(value) is str,
    "math_type": lambda value: value in MATH_TYPES,
    "deterministic": lambda value: type(value) is bool,
    "workspace_bytes": lambda value: type(value) is int and 0 <= value <= 2**60,
    "time_ms": lambda value: value is None or _is_time(value),
    "device_ms": lambda value: value is None or _is_time(value),
    "skipped": lambda value: type(value) is bool,
    "rejected": lambda value: value is None or _is_reason(value),
    "bias": lambda value: value is None or type(value) is str,
}


def file_name(problem: Problem) -> str:
    return hashlib.sha256(canonical(_fields(problem)).encode()).hexdigest()[:32] + ".json"


def _fields(problem: Problem) -> dict[str, Any]:
    return {name: value for name, value in problem_dict(problem).items() if name != "device"}


def text_of(problem: Problem) -> str:
    return str(problem).rpartition(" device=")[0]


def canonical(value: object) -> str:
    """One text per JSON value; it tells true from 1 and 1.0, which == does not."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def durable(candidate: Candidate) -> Candidate:
    """The candidate without what holds only for the moment, and with text fit for the store."""
    if candidate.may_pass:
        untimed = replace(candidate, time_ms=None, device_ms=None, skipped=True)
        return replace(untimed, rejected=None, out_of_memory=False)
    if not _is_time(candidate.time_ms):  # a clock can say anything
        candidate = replace(candidate, time_ms=None)
    if not _is_time(candidate.device_ms):
        candidate = replace(candidate, device_ms=None)
    if candidate.rejected is None:
        return candidate
    text = "".join(c if c.isprintable() else " " for c in candidate.rejected[:_MAX_TEXT])
    return replace(candidate, rejected=text or "no reason given")


def to_json(problem: Problem, candidates: Sequence[Candidate]) -> dict[str, Any]:
    stored = [{name: getattr(candidate, name) for name in _CHECKS} for candidate in candidates]
    return {"problem": _fields(problem), "candidates": stored}


def encode(problem: Problem, candidates: Sequence[Candidate]) -> bytes:
    """The bytes of an entry; ValueError if they could not be read again."""
    entry = to_json(problem, candidates)
    validated(entry, problem)
    data = json.dumps(entry, ensure_ascii=False).encode()
    _check_size(data)
    return data


def decode(data: bytes) -> Any:
    _check_size(data)
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None


def _check_size(data: bytes) -> None:
    if len(data) > MAX_BYTES or data.count(b"[") + data.count(b"{") > _MAX_BRACKETS:
        raise ValueError(f"has more than {MAX_BYTES} bytes or {_MAX_BRACKETS} brackets")


def validated(entry: Any, problem: Problem | None = None) -> tuple[Problem, list[Candidate]]:
    """The content of an entry, of ``problem`` if one is given; ValueError says what is wrong."""
    if type(entry) is not dict or entry.keys() != {"problem", "candidates"}:
        raise ValueError("does not have the fields problem and candidates")
    if problem is None:
        problem = _problem(entry["problem"])
    if canonical(entry["problem"]) != canonical(_fields(problem)):
        raise ValueError("is for another problem")
    stored = entry["candidates"]
    if type(stored) is not list or not 0 < len(stored) <= _MAX_CANDIDATES:
        raise ValueError(f"does not have a list of 1 to {_MAX_CANDIDATES} candidates")
    known = _loader.require().legacy_algorithms(problem.direction)
    candidates = [_candidate(each, problem, known) for each in stored]
    if len({(c.engine, c.bias) for c in candidates}) < len(candidates):
        raise ValueError("has a candidate twice")
    if all(candidate.rejected is not None for candidate in candidates):
        raise ValueError("has no candidate that may run")
    return problem, candidates


def _problem(fields: Any) -> Problem:
    if type(fields) is not dict or fields.keys() != {*PROBLEM_FIELDS} - {"device"}:
        raise ValueError("does not have the fields of a problem")
    try:
        problem: Problem = _loader.require().Problem(**fields, device=0)
    except (TypeError, ValueError) as error:
        raise ValueError(f"has no valid problem: {error!s:.200}") from None
    return problem


def _candidate(data: Any, problem: Problem, known: Sequence[str]) -> Candidate:
    if type(data) is not dict or data.keys() != _CHECKS.keys():
        raise ValueError(f"has a candidate without exactly the fields {', '.join(_CHECKS)}")
    for name, holds in _CHECKS.items():
        if not holds(data[name]):
            raise ValueError(f"has a candidate whose {name} is {data[name]!r:.80}")
    candidate = Candidate(**data)
    algorithm, bias = candidate.algorithm, candidate.bias
    if candidate.provider == "legacy":
        may_be, objection = algorithm in known, imprecision(problem, algorithm, data["math_type"])
    else:  # the engine itself is asked when a plan is made of it
        engine, identity, end = algorithm.partition(IDENTITY)
        refused = engine == "engines" and candidate.rejected is not None  # all of a graph's
        may_be = end == "" and (refused or _ENGINE.fullmatch(engine) is not None)
        may_be = may_be and (not identity or problem.direction == "dgrad")  # as in gather
        strict = problem.dtype == "float32" and not problem.tf32
        tf32 = strict and candidate.math_type != "FMA_MATH"
        objection = "it may round float32 to tf32" if tf32 else None
    if not may_be:
        raise ValueError(f"has a candidate whose algorithm is {algorithm!r:.80}")
    if (bias is None) is problem.bias or not (
        bias in (None, ADD)
        or (bias == FUSED and candidate.provider == "graph")
        or (bias == "engines" and candidate.rejected is not None)
        or _ENGINE.fullmatch(str(bias))
    ):
        raise ValueError(f"has a candidate whose bias is {bias!r:.80}")
    atomic = (problem.direction, algorithm) in _ATOMIC and candidate.provider == "legacy"
    if candidate.deterministic and atomic:
        raise ValueError(f"calls {candidate} deterministic, which it is not")
    if candidate.rejected is None and objection is not None:
        raise ValueError(f"lets {candidate} run, but {objection}")  # never by way of a file
    return candidate
