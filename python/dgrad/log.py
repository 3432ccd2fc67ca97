"""The logger ``dgrad``, silent until someone listens, and the file of JSON lines.

``DGRAD_LOG=info|debug`` writes records to stderr; ``DGRAD_LOG_FILE`` names a file that gets one
JSON object a line for each new selection (``selection.schema.json`` describes it). It may be a pipe
that is read meanwhile: what this does not take at once is lost, with one warning.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
from collections import OrderedDict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch

from ._loader import cudnn_version
from .exceptions import first_line
from .selection import Candidate, Selection

if TYPE_CHECKING:
    from .config import Policy

logger = logging.getLogger("dgrad")
logger.addHandler(logging.NullHandler())

_warned: dict[str, object] = {}  # what has been warned of
_told: OrderedDict[str, None] = OrderedDict()  # kinds of reasons, the last told of at the end
_telling = threading.RLock()
_MOST_TOLD = 1024
_NUMBER = re.compile(r"(?<!\w)\d[\dx.]*")  # also a shape; no part of a name, as in float16

_cut: set[str] = set()  # pipes of which the last record is there in part

_LEVELS = {"info": logging.INFO, "debug": logging.DEBUG}


class _Stderr(logging.Handler):
    """Writes to what ``sys.stderr`` is by then: while rich shows a progress bar something stands
    in for it, which puts the record above the bar."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except Exception:
            self.handleError(record)


_lock = threading.RLock()
_followed = ""  # DGRAD_LOG as it was at the last record
_handler: logging.Handler | None = None  # what it added to the logger
_levels = (logging.NOTSET, logging.NOTSET)  # of the logger: before it, and what it made of it


def _configure() -> None:
    """Follow DGRAD_LOG, which a program may set, change and unset at any time."""
    global _followed, _handler, _levels
    wanted = os.environ.get("DGRAD_LOG", "").strip().lower()
    if wanted == _followed:
        return
    with _lock:
        if wanted == _followed:  # another thread was first
            return
        if _handler is not None:
            logger.removeHandler(_handler)
            _handler = None
            if logger.level == _levels[1]:  # the program has not set another one since
                logger.setLevel(_levels[0])
        if wanted:
            _handler = _Stderr()
            _handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
            logger.addHandler(_handler)
            _levels = (logger.level, _LEVELS.get(wanted, logging.INFO))
            logger.setLevel(_levels[1])
        _followed = wanted
    if wanted and wanted not in _LEVELS:
        logger.warning("DGRAD_LOG is %r, expected info or debug; info is used", wanted)


def selected(selection: Selection, policy: Policy) -> None:
    """One INFO line for a new selection, a DEBUG line for each candidate, and the JSON line."""
    _configure()
    _write_json(selection, policy)
    if not logger.isEnabledFor(logging.INFO):
        return
    logger.info("selected %s; cuDNN %s", selection, cudnn_version())
    if logger.isEnabledFor(logging.DEBUG):
        for candidate, verdict in zip(selection.candidates, selection.verdicts(), strict=True):
            logger.debug("candidate %s: %s", candidate, verdict)


def record(selection: Selection, policy: Policy) -> dict[str, Any]:
    """The whole record of a selection, as the file of JSON lines has it."""
    return {
        "format": 4,
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "gpu": torch.cuda.get_device_name(selection.problem.device),
        "cudnn": cudnn_version(),
        "flags": {
            "selection": policy.selection,
            "measure_budget": policy.measure_budget,
            "algorithm": {direction: list(names) for direction, names in policy.algorithm},
            "workspace_limit": policy.workspace_limit,
            "deterministic": policy.deterministic,
        },
        **selection.to_dict(),
    }


def _write_json(selection: Selection, policy: Policy) -> None:
    path = os.environ.get("DGRAD_LOG_FILE")
    if not path:
        return
    line = json.dumps(record(selection, policy), separators=(",", ":")) + "\n"
    try:
        _append(path, line.encode())
    except OSError as error:
        warn_once(path, "DGRAD_LOG_FILE %s cannot be written: %s", path, error)


def _append(path: str, line: bytes) -> None:
    # One write to a file opened for appending: lines of several processes do not mix. A pipe that
    # nobody reads, or that is full, says so at once instead of holding up the caller.
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o600)
    left = line
    try:
        size_bytes = os.fstat(descriptor).st_size  # 0 of a pipe
        if _ends_inside_a_line(path, size_bytes) if size_bytes else path in _cut:
            left = line = b"\n" + line
        while left:  # a disk that is almost full takes a part, and then says what is wrong
            left = left[os.write(descriptor, left) :]
    finally:
        os.close(descriptor)
        if len(left) < len(line):
            (_cut.add if left else _cut.discard)(path)


def _ends_inside_a_line(path: str, size_bytes: int) -> bool:
    """Whether a record was cut off there, by this process or another."""
    try:
        with open(path, "rb") as file:
            file.seek(size_bytes - 1)
            return file.read(1) != b"\n"
    except PermissionError:  # it may be written alone
        return path in _cut


def warn_of_first(message: str, *arguments: object) -> None:
    """One WARNING for the first of what there may be thousands of, whatever the arguments."""
    warn_once(message, message + "; this is told of the first one only", *arguments)


def warn_once(about: str, message: str, *arguments: object) -> bool:
    """One WARNING for each thing that a process warns about; whether this was it."""
    mine = object()
    new = _warned.setdefault(about, mine) is mine  # atomic: one thread of several warns
    if new:
        _configure()
        # As text: an exception in a record would keep its frames, and their tensors, alive.
        logger.warning(message, *map(str, arguments))
    return new


def rejected(problem: object, candidate: Candidate) -> None:
    """One DEBUG line for a candidate that turned out not to run."""
    _configure()
    logger.debug("rejected %s for %s: %s", candidate, problem, candidate.rejected)


def not_measured(problem: object, error: Exception) -> None:
    """One DEBUG line for a problem that was to be measured before anybody asks for it."""
    _configure()
    # As text: see warn_once.
    logger.debug("not measured ahead: %s: %s: %s", problem, type(error).__name__, str(error))


def without_gradients(call: str, why: str) -> None:
    """One WARNING for a call whose gradients were asked for, and are not taken."""
    warn_once(
        f"gradients of {call}: {why}",
        "the gradients of %s are not selected: %s, or pass backward=False",
        call,
        why,
    )


def captured(problem: object) -> None:
    """One WARNING for the first problem met while a CUDA graph is captured, an INFO line for each
    other one."""
    message = (
        "nothing can be measured while a CUDA graph is captured: cuDNN's heuristic chooses for "
        "%s; call dgrad.warm_up(model, *inputs) before the capture"
    )
    if not warn_once(message, message + "; INFO lines tell of further ones", problem):
        _configure()
        logger.info(message, problem)


def not_for_graphs(label: str, error: Exception) -> None:
    """One WARNING for candidates that CUDA graphs were to get, and do not."""
    warn_of_first(
        "a CUDA graph gets what eager calls get, and not %s: %s", label, first_line(error)
    )


def fallback(reason: str) -> None:
    """One INFO line for each kind of reason, whatever its numbers: PyTorch's own operator runs."""
    kind = _NUMBER.sub("0", reason.partition("\n")[0])  # the rest is the table of a problem
    with _telling:
        new = kind not in _told
        _told[kind] = None
        _told.move_to_end(kind)
        if len(_told) > _MOST_TOLD:
            _told.popitem(last=False)
    if new:
        _configure()
        logger.info("PyTorch's own conv_transpose2d runs: %s", reason)
