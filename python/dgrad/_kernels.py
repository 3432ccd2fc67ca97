"""What cuDNN compiled for the plans that were chosen, on disk, so that each is compiled only once.

cuDNN compiles some engines when a plan of them is made, for a tenth of a second to one. Of a chosen
candidate it gives a text from which a plan is made without compiling. That text lies beside the
entry of the store, in a file of its own.

Note [Kernels]
The text holds code for the GPU, which cuDNN does not check. So these files are no part of what the
store exports or loads. They are read only where they and both folders are the user's own and no
link, and each begins with a digest of the problem, the candidate and the text: what was spoiled or
exchanged is a miss, and cuDNN compiles again.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from . import _candidates, log, store
from ._files import read_own
from ._stored import file_name, text_of
from .exceptions import CudnnError
from .selection import Candidate

if TYPE_CHECKING:
    from ._core import Plan, Problem

_MAX_BYTES = 16 << 20
_DIGEST_BYTES = 32

_refused: set[Path] = set()  # files that this process could not use, to be replaced


def make_plan(problem: Problem, candidate: Candidate) -> Plan:
    """As :func:`dgrad._candidates.make_plan`, without compiling what is kept."""
    kept = _read(problem, candidate)
    if kept:
        try:
            return _candidates.make_plan(problem, candidate, kept)
        except CudnnError as error:  # of another driver, perhaps
            file = (store.folder_of(problem) or Path()) / _file_name(problem, candidate)
            _refuse(file, f"cannot be restored: {error}")
    return _candidates.make_plan(problem, candidate)


def keep(problem: Problem, candidate: Candidate, plan: Plan) -> None:
    """Keep what cuDNN compiled for a plan of this candidate, if it did. Raises nothing."""
    name = _file_name(problem, candidate)
    folder = store.folder_of(problem)
    if folder is None or (os.path.lexists(folder / name) and folder / name not in _refused):
        return
    try:
        compiled = plan.compiled
    except CudnnError as error:
        log.warn_once("compiled", "what cuDNN compiles is not kept: %s", error)
        return
    if not any(compiled):
        return
    text = json.dumps([part.decode("latin-1") for part in compiled]).encode()
    packed = zlib.compress(text, 1)  # hundreds of kilobytes else
    if len(packed) + _DIGEST_BYTES <= _MAX_BYTES:
        store.save(problem, name, _digest(problem, candidate, packed) + packed)
        _refused.discard(folder / name)


def _read(problem: Problem, candidate: Candidate) -> list[bytes]:
    """What is kept of a candidate's parts, nothing if that is not to be used."""
    folder = store.folder_of(problem)
    if folder is None or candidate.provider != "graph":
        return []
    file = folder / _file_name(problem, candidate)
    try:
        data = read_own(file, _MAX_BYTES)
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        _refuse(file, str(error))
        return []
    digest, packed = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    if digest != _digest(problem, candidate, packed):
        _refuse(file, "is not what was written")
        return []
    return [part.encode("latin-1") for part in json.loads(zlib.decompress(packed))]


def _refuse(file: Path, reason: str) -> None:
    _refused.add(file)
    log.warn_once(str(file), "the compiled kernels %r are not used: it %s", str(file), reason)


def _file_name(problem: Problem, candidate: Candidate) -> str:
    of_candidate = hashlib.sha256(str(candidate).encode()).hexdigest()[:16]
    return f"{file_name(problem).removesuffix('.json')}-{of_candidate}.kernels"


def _digest(problem: Problem, candidate: Candidate, packed: bytes) -> bytes:
    head = f"{text_of(problem)}\n{candidate}\n".encode()
    return hashlib.sha256(head + packed).digest()
