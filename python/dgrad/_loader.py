"""Finds libcudnn.so.9 and loads the native module on it, or says why not.

PyTorch comes first: if its build brings cuDNN, the library is mapped already and the native
module binds to that one. Without it the nvidia-cudnn wheel is looked for, then the system.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

MINIMUM_CUDNN = 90100  # what PyTorch 2.4 brings
_SONAME = "libcudnn.so.9"
_GRAPH = (
    "libcudnn_graph.so.9"  # which cuDNN looks for itself, and ends the process if there is none
)
_MAPPED = r"(/\S.*/libcudnn\.so\.\d\S*?)(?: \(deleted\))?$"


def _mapped_libraries() -> list[str]:
    """Paths of the libcudnn.so.<major> files that this process has mapped."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace")
    except OSError:
        return []
    return sorted(set(re.findall(_MAPPED, maps, flags=re.MULTILINE)))


def _wheel_library() -> Path | None:
    try:
        spec = importlib.util.find_spec("nvidia.cudnn")
    except ModuleNotFoundError:
        return None
    for folder in (spec.submodule_search_locations or []) if spec else []:
        library = Path(folder) / "lib" / _SONAME
        if library.is_file():
            return library
    return None


def format_version(version: int) -> str:
    """cuDNN's version number as text: 91900 is "9.19.0", and 8907, from before 9, "8.9.7"."""
    major, rest = divmod(version, 10000 if version >= 10000 else 1000)
    return f"{major}.{rest // 100}.{rest % 100}"


@cache
def _imported() -> tuple[ModuleType | None, str | None]:
    """The native module, whatever the version of its cuDNN, or None and the reason."""
    if torch.version.hip is not None:
        return None, "PyTorch is built for ROCm, and dgrad calls NVIDIA's cuDNN"
    mapped = _mapped_libraries()
    others = [path for path in mapped if not Path(path).name.startswith(_SONAME)]
    if others:
        return None, f"this process has loaded {others[0]}, and dgrad needs cuDNN 9 ({_SONAME})"
    wheel = _wheel_library()
    if not mapped and wheel is not None:
        try:
            ctypes.CDLL(str(wheel))
        except OSError as error:
            return None, f"{wheel} could not be loaded: {error}"
    try:
        core = importlib.import_module("dgrad._core")
    except ModuleNotFoundError:
        return None, "the native module dgrad._core is not built; install with `pip install .`"
    except ImportError as error:
        if f"{_SONAME}: cannot open shared object file" not in str(error):
            return None, f"the native module could not be loaded: {error}"
        return None, (
            f"{_SONAME} was not found: this build of PyTorch brings none, there is no wheel "
            "nvidia-cudnn-cu12 or nvidia-cudnn-cu13, and the system's loader knows none; "
            "`pip install nvidia-cudnn-cu13` or a CUDA build of PyTorch brings it"
        )
    beside = [Path(path).parent / _GRAPH for path in _mapped_libraries()]
    graph = next((str(path) for path in beside if path.is_file()), _GRAPH)
    try:
        ctypes.CDLL(graph)
    except OSError as error:
        return None, f"{cudnn_path()} could not be used, as a part of cuDNN is missing: {error}"
    return core, None


@cache
def load() -> tuple[ModuleType | None, str | None]:
    """The native module and None, or None and the reason why it cannot be used."""
    core, reason = _imported()
    if core is None:
        return None, reason
    version = core.cudnn_version()
    if version // 10000 != 9 or version < MINIMUM_CUDNN:
        return None, (
            f"cuDNN {format_version(version)} is loaded from {cudnn_path()}, and dgrad needs "
            f"{format_version(MINIMUM_CUDNN)} or a later 9.x"
        )
    return core, None


def require() -> ModuleType:
    """The native module; RuntimeError with the reason where it cannot be used."""
    core, reason = load()
    if core is None:
        raise RuntimeError(f"cuDNN is not usable: {reason}")
    return core


def unavailable_reason() -> str | None:
    """Why dgrad cannot run on a GPU here, in words, or None if it can."""
    _, reason = load()
    if reason is not None:
        return reason
    if not torch.backends.cuda.is_built():
        return "this build of PyTorch has no CUDA"
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return None


def is_available() -> bool:
    """Whether dgrad can run on a GPU here; see :func:`unavailable_reason` for why not."""
    return unavailable_reason() is None


# torch.compile asks both while it traces.
unavailable_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]
is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def cudnn_path() -> str | None:
    """The file that cuDNN was loaded from, or None."""
    return next(iter(_mapped_libraries()), None)


def cudnn_version() -> str | None:
    """The version of the cuDNN that the native module is bound to, usable or not, or None."""
    core, _ = _imported()
    return format_version(core.cudnn_version()) if core else None


def compiled_cudnn_version() -> str | None:
    """The version of the cuDNN headers that the native module was built with, or None."""
    core, _ = _imported()
    return format_version(core.compiled_cudnn_version) if core else None
