"""Entries of a store for its tests, what spoils them, and a file system that fails.

Problems are plain data and the name of the GPU is made up, so that all of it runs on the CPU.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dgrad import Candidate, _folders, _loader, _stored, store
from fake_cudnn import real_problem

_CORE, _REASON = _loader.load()
MARKS = [
    pytest.mark.skipif(_CORE is None, reason=str(_REASON)),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.usefixtures("store_root"),
]

HERE = "NVIDIA-H200_sm90_cudnn-9.12.0_v3"
OTHER_GPU = "NVIDIA-L4_sm89_cudnn-9.12.0_v3"
OTHER_CUDNN = "NVIDIA-H200_sm90_cudnn-9.19.0_v3"
folder_name_of_device = _folders.folder_name


def make_problem(**changes: Any) -> Any:
    return real_problem(**{"x": (2, 8, 17, 17), "y": (2, 4, 8, 8), **changes})


def numbered(number: int) -> Any:
    """One of many different problems."""
    return make_problem(x=(number, 8, 17, 17), y=(number, 4, 8, 8))


CANDIDATES = [
    Candidate("legacy", "ALGO_1", "TENSOR_OP_MATH", True, 4096, time_ms=0.021, device_ms=0.01),
    Candidate("legacy", "ALGO_0", "DEFAULT_MATH", False, 0, time_ms=0.5),
    Candidate("legacy", "FFT", "FMA_MATH", True, 2**31, skipped=True),
    Candidate("legacy", "WINOGRAD", "DEFAULT_MATH", True, 0, rejected="cuDNN's heuristic says no"),
    Candidate("graph", "eng5_k2=3_k24=0", "TENSOR_OP_MATH", True, 512, time_ms=0.7),
    Candidate("graph", "eng0+identity", "FMA_MATH", False, 0, time_ms=0.8),
    Candidate("graph", "engines+identity", "DEFAULT_MATH", False, 0, rejected="no such graph"),
]
_ENGINE = Candidate("graph", "eng5_k2=3_k24=0", "TENSOR_OP_MATH", True, 512, 0.7, bias="eng1_k24=4")
WITH_BIAS = [
    _ENGINE,
    replace(_ENGINE, time_ms=0.6, bias="fused"),
    replace(_ENGINE, time_ms=None, skipped=True, bias="add"),
    replace(CANDIDATES[0], time_ms=1.0, bias="eng1_k24=4"),
    replace(CANDIDATES[0], time_ms=0.9, bias="add"),
    replace(CANDIDATES[6], algorithm="engines", bias="fused"),
]
FIRST = ("candidates", 0)  # where it is in an entry


def written(root: Path, problem: Any = None) -> Path:
    """Store an entry and give its file."""
    problem = problem or make_problem()
    store.write(problem, WITH_BIAS if problem.bias else CANDIDATES)
    return root / HERE / _stored.file_name(problem)


def spoiled(root: Path, content: bytes) -> Path:
    file = written(root)
    file.write_bytes(content)
    return file


def content_of(file: Path) -> Any:
    content: Any = json.loads(file.read_text())
    return content


def fork(work: Callable[[], object]) -> int:
    """Run ``work`` in a child process and give its process id; it exits with 0 if all went well."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def assert_is_a_miss_with_one_warning(
    warnings_of_store: Callable[[], list[str]], problem: Any = None
) -> str:
    problem = problem or make_problem()
    assert store.read(problem) is None
    assert store.read(problem) is None
    (text,) = warnings_of_store()
    assert len(text) < 1000
    assert text.isprintable()
    return text


def set_in(*keys: Any, to: Any) -> Callable[[Any], Any]:
    def change(entry: Any) -> Any:
        inner = entry
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        return entry

    return change


def without(*keys: Any) -> Callable[[Any], Any]:
    def change(entry: Any) -> Any:
        inner = entry
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return entry

    return change


def refuse(
    monkeypatch: pytest.MonkeyPatch, call: str, error: int, when: Callable[[Any], bool]
) -> None:
    """Let a call of ``os`` fail for some paths, as a file system would."""
    real = getattr(os, call)

    def failing(path: Any, *arguments: Any, **options: Any) -> Any:
        if when(path):
            raise OSError(error, os.strerror(error), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, call, failing)


def a_link(file: Path) -> None:
    copy = file.with_name("elsewhere")
    os.replace(file, copy)
    file.symlink_to(copy)


def a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
