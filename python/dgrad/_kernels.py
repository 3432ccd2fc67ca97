"""What cuDNN compiled for the plans that were chosen, on disk, so that each is compiled only once.

cuDNN compiles some engines when a plan of them is made, for a tenth of a second to one. Of a chosen
candidate it gives a text from which a plan is made without compiling. That text lies beside the
entry of the store, in a file of its own.

Note [Kernels]
The text holds code for the GPU, which cuDNN does not check. So these files are no part of what the
store exports or loads. They are read only where they are no links and, as both folders, the user's
own, and each has a digest of the text and all that it was made for: what was spoiled or exchanged
is a miss, and cuDNN compiles again.

A file begins with a line that names the version of dgrad, as another one may make another graph,
and one with the problem, for who forgets it. The digest follows, a line with the parts' lengths,
and the parts as they are: to unpack them would cost the first call more than to read them.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import _candidates, _folders, _loader, log, store
from ._files import read_own
from ._stored import file_name, text_of
from .exceptions import CudnnError, CudnnNotInitializedError
from .selection import ADD, Candidate

if TYPE_CHECKING:
    from ._core import Plan, Problem

_MAX_BYTES = 16 << 20
_DIGEST_BYTES = 32
_OF_A_VERSION = re.compile(rb"dgrad \S+ kernels\n|.{32}\x78\x01", re.DOTALL)  # or zlib's, once

_refused: set[Path] = set()  # files that this process could not use, to be replaced


def make_plan(problem: Problem, candidate: Candidate) -> tuple[Plan, bool]:
    """As :func:`dgrad._candidates.make_plan`, without compiling what is kept; whether it was."""
    file = _file(problem, candidate)
    kept = _read(file, problem, candidate) if file else []
    if file and kept:
        try:
            return _candidates.make_plan(problem, candidate, kept), True
        except (CudnnError, ValueError) as error:  # of another driver, perhaps
            if _says_nothing(error):
                raise
            _refuse(file, f"cannot be restored: {error}")
    return _candidates.make_plan(problem, candidate), False


def distrust(problem: Problem, candidate: Candidate, error: Exception) -> bool:
    """Whether a restored plan that failed is to be compiled, as what was kept may be at fault."""
    file = _file(problem, candidate)
    if file is None or not isinstance(error, CudnnError) or _says_nothing(error):
        return False
    _refuse(file, f"did not run: {error}")
    return True


def _says_nothing(error: Exception) -> bool:
    """Of the kernels: cuDNN does not start, or cannot in a capture."""
    not_started = isinstance(error, CudnnNotInitializedError)
    return not_started or torch.cuda.is_current_stream_capturing()


def keep(problem: Problem, candidate: Candidate, plan: Plan) -> None:
    """Keep what cuDNN compiled for a plan that has run, if it did. Raises nothing."""
    name = _name(problem, candidate)
    if name is None or _folders.path() is None:
        return
    file = _file(problem, candidate)
    if file is not None and os.path.lexists(file) and file not in _refused:
        return
    try:
        compiled = plan.compiled
    except CudnnError as error:
        log.warn_once("compiled", "what cuDNN compiles is not kept: %s", error)
        return
    if not any(compiled):
        return
    lengths = " ".join(str(len(part)) for part in compiled)
    body = b"".join([f"{lengths}\n".encode(), *compiled])
    data = _head(problem) + _digest(problem, candidate, body) + body
    if len(data) <= _MAX_BYTES and store.save(problem, name, data) and file is not None:
        _refused.discard(file)


def _name(problem: Problem, candidate: Candidate) -> str | None:
    """The name of a candidate's file; None if it has nothing to compile."""
    if candidate.provider == "legacy" and candidate.bias in (None, ADD):
        return None
    of_candidate = hashlib.sha256(str(candidate).encode()).hexdigest()[:16]
    return f"{file_name(problem).removesuffix('.json')}-{of_candidate}.kernels"


def _file(problem: Problem, candidate: Candidate) -> Path | None:
    """The file, which need not exist; None where there is none to read."""
    name = _name(problem, candidate)
    folder = _folders.folder_of(problem) if name is not None else None
    return folder / name if folder is not None and name is not None else None


def _read(file: Path, problem: Problem, candidate: Candidate) -> list[bytes]:
    """What is kept of a candidate's parts, nothing if that is not to be used."""
    if file in _refused:
        return []
    try:
        data, head = read_own(file, _MAX_BYTES), _head(problem)
        if _OF_A_VERSION.match(data) and not data.startswith(_first_line()):
            _refused.add(file)  # in silence: dgrad was updated
            return []
        begin = len(head) + _DIGEST_BYTES
        body = data[begin:]
        if data[:begin] != head + _digest(problem, candidate, body):
            raise ValueError("is not what was written")
        return _parts(body)
    except FileNotFoundError:
        return []
    except OSError as error:
        _refuse(file, f"cannot be read: {error}")
    except ValueError as error:
        _refuse(file, str(error))
    return []


def _parts(body: bytes) -> list[bytes]:
    """The parts that :func:`keep` has joined; ValueError if it has not."""
    lengths, _, joined = body.partition(b"\n")
    parts, begin = [], 0
    for length in map(int, lengths.split()):
        parts.append(joined[begin : begin + length])
        begin += length
    if begin != len(joined) or not any(parts):
        raise ValueError("is not what dgrad joins")
    return parts


def _refuse(file: Path, reason: str) -> None:
    _refused.add(file)
    log.warn_of_first("the compiled kernels %r are not used: it %s", str(file), reason)


def _first_line() -> bytes:
    return f"dgrad {_loader.require().__version__} kernels\n".encode()


def _head(problem: Problem) -> bytes:
    return _first_line() + f"{text_of(problem)}\n".encode()


def _digest(problem: Problem, candidate: Candidate, body: bytes) -> bytes:
    """It holds for this version of dgrad, which makes the graph, and for this GPU and cuDNN."""
    folder = _folders.folder_name(problem.device)
    digest = hashlib.sha256(_head(problem) + f"{folder}\n{candidate}\n".encode())
    digest.update(body)
    return digest.digest()
