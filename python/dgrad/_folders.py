"""Which folders the store has, and whether they are to be trusted."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import _loader, log
from ._files import require_own
from ._stored import FORMAT

if TYPE_CHECKING:
    from ._core import Problem

ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)  # ESTALE: replaced by another NFS client


def path() -> Path | None:
    """The root folder in use, which need not exist, or None if the store is off."""
    wanted = os.environ.get("DGRAD_STORE", "")
    if wanted.strip().lower() == "off":
        return None
    if wanted:
        return Path(os.path.expanduser(wanted))
    for variable, below in (("XDG_CACHE_HOME", ()), ("HOME", (".cache",))):
        folder = os.environ.get(variable, "")
        if os.path.isabs(folder):
            return Path(folder, *below, "dgrad")
    log.warn_once(
        "HOME", "selections are not stored: HOME is not set; DGRAD_STORE can name a folder"
    )
    return None


def folder_name(device: int) -> str:
    """What the times of a device hold for. Its index is no part of it."""
    gpu = torch.cuda.get_device_properties(device)
    name = re.sub(r"[^A-Za-z0-9.-]+", "-", gpu.name)[:100]
    return f"{name}_sm{gpu.major}{gpu.minor}_cudnn-{_loader.cudnn_version()}_v{FORMAT}"


def folder_of(problem: Problem) -> Path | None:
    """The folder that is read for a problem, if it is there and the user's own. Raises nothing."""
    root = path()
    if root is None:
        return None
    folder = root / folder_name(problem.device)
    return folder if trusted(root) and trusted(folder) else None


def trusted(folder: Path) -> bool:
    """Whether a folder is there and is the user's own; one warning if it is not to be used."""
    try:
        return is_there(folder)
    except OSError as error:
        log.warn_once(str(path()), "selections in %r are not used: %s", str(folder), error)
        return False


def is_there(folder: Path) -> bool:
    """Whether there is such a folder; OSError if it is not to be used."""
    try:
        require_own(folder)
    except OSError as error:
        if error.errno not in ABSENT:
            raise
        return False
    return True
