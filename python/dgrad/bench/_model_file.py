"""The file that `compare` and `tune` take: a Model and its inputs, as KernelBench writes them."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType

_NAMES = ("Model", "get_inputs", "get_init_inputs")


class WorkerError(Exception):
    """What to tell the user; `fault` is "file" (the compared file's) or "run" (anything else)."""

    def __init__(self, message: str, fault: str = "file") -> None:
        super().__init__(message)
        self.fault = fault


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
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise WorkerError(f"the file cannot be imported{words_of(error, module)}") from error
    missing = [wanted for wanted in _NAMES if not callable(getattr(module, wanted, None))]
    if missing:
        raise WorkerError(f"the file lacks {', '.join(missing)}: expected {', '.join(_NAMES)}")
    return module


def words_of(error: BaseException, module: ModuleType) -> str:
    """Where in the compared file, and what."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == module.__file__]
    place = f" at line {lines[-1]}" if lines else ""
    return f"{place}: {type(error).__name__}: {error}"
