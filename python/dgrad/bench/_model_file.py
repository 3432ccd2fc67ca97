"""The file that `compare` and `tune` take: a Model and its inputs, as KernelBench writes them."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import stat
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from dgrad.exceptions import TorchOutOfMemoryError

_NAMES = ("Model", "get_inputs", "get_init_inputs")


class WorkerError(Exception):
    """What to tell the user; `fault` is "file" (the compared file's) or "run" (anything else).

    Of a file it is one line, however many its own error has.
    """

    def __init__(self, message: str, fault: str = "file") -> None:
        super().__init__(" ".join(message.split()) if fault == "file" else message)
        self.fault = fault


def unreadable(file: str) -> str | None:
    """Why FILE is no file to read, in words, or None."""
    try:
        mode = os.stat(file).st_mode
    except FileNotFoundError:
        return "no such file"
    except OSError as error:
        return str(error.strerror)  # such as "File name too long"
    if stat.S_ISREG(mode):
        return None
    return "is a folder" if stat.S_ISDIR(mode) else "is no regular file"


def load(file: str | None) -> ModuleType:
    """Import FILE as a script would be: its folder first on the path."""
    if file is None:
        return importlib.import_module("dgrad.bench.default_model")
    path = Path(file).resolve()
    name = f"_dgrad_compared_{path.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(path))  # any suffix
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.parent))
    with theirs("the file cannot be imported", module):
        loader.exec_module(module)
    missing = [wanted for wanted in _NAMES if not callable(getattr(module, wanted, None))]
    if missing:
        raise WorkerError(f"the file lacks {', '.join(missing)}: expected {', '.join(_NAMES)}")
    return module


@contextmanager
def theirs(failed: str, module: ModuleType) -> Iterator[None]:
    """Here code of the compared file runs; whatever it raises is told as its failure."""
    try:
        yield
    except (KeyboardInterrupt, TorchOutOfMemoryError):  # the user's, and the machine's
        raise
    except BaseException as error:  # sys.exit() too
        raise WorkerError(failed + words_of(error, module)) from error


def words_of(error: BaseException, module: ModuleType) -> str:
    """Where in the compared file, and what."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == module.__file__]
    place = f" at line {lines[-1]}" if lines else ""
    try:
        text = str(error)
    except Exception:  # of the file's own kind of error
        text = ""
    return f"{place}: {type(error).__name__}{text and ': '}{text}"
