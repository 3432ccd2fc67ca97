"""The logger ``dgrad``: silent until someone listens, or DGRAD_LOG=info|debug is set."""

from __future__ import annotations

import logging
import os
from functools import cache, lru_cache

from ._loader import cudnn_version
from .selection import Candidate, Selection

logger = logging.getLogger("dgrad")
logger.addHandler(logging.NullHandler())

_LEVELS = {"info": logging.INFO, "debug": logging.DEBUG}


@cache
def _configure() -> None:
    # At the first record and not at import, so that a program can still set the variable.
    wanted = os.environ.get("DGRAD_LOG", "").strip().lower()
    if not wanted:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(_LEVELS.get(wanted, logging.INFO))
    if wanted not in _LEVELS:
        logger.warning("DGRAD_LOG is %r, expected info or debug; info is used", wanted)


def selected(selection: Selection) -> None:
    """One INFO line for a new selection, and a DEBUG line for each other candidate."""
    _configure()
    if not logger.isEnabledFor(logging.INFO):
        return
    logger.info("selected %s; cuDNN %s", selection, cudnn_version())
    if logger.isEnabledFor(logging.DEBUG):
        for candidate in selection.candidates:
            logger.debug("candidate %s: %s", candidate, selection.verdict(candidate))


def rejected(problem: object, candidate: Candidate) -> None:
    """One DEBUG line for a candidate that turned out not to run."""
    _configure()
    logger.debug("rejected %s for %s: %s", candidate, problem, candidate.rejected)


@lru_cache(maxsize=1024)  # a reason can be the table of a problem
def fallback(reason: str) -> None:
    """One INFO line, once for each reason: PyTorch's own operator runs."""
    _configure()
    logger.info("PyTorch's own conv_transpose2d runs: %s", reason)
