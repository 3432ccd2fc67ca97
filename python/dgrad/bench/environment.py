"""Versions, devices and providers of this machine, as plain data. Nothing here raises."""

from __future__ import annotations

import platform
import re
import subprocess
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

import dgrad
from dgrad import _loader
from dgrad.config import PROVIDERS
from dgrad.exceptions import first_line

_T = TypeVar("_T")


def versions() -> dict[str, str | None]:
    """Versions by name; None where a thing is absent."""
    return {
        "dgrad": dgrad.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "cudnn_compiled": _text(_loader.compiled_cudnn_version),
        "cudnn_loaded": _text(_loader.cudnn_version),
        "cudnn_path": _text(_loader.cudnn_path),
    }


def devices() -> list[dict[str, object]]:
    """The GPUs that PyTorch can use: index, name, compute capability, memory_bytes."""
    found = _quiet(_devices)
    return found if isinstance(found, list) else []


def providers() -> dict[str, dict[str, object]]:
    """For each provider whether it is usable, and if not, why."""
    if _quiet(dgrad.is_available) is True:
        reasons = {name: _quiet(partial(_ask, name)) for name in PROVIDERS}
    else:
        why = _text(dgrad.unavailable_reason) or "the reason is not known"
        reasons = dict.fromkeys(PROVIDERS, RuntimeError(why))
    return {
        name: {"usable": error is None, "reason": None if error is None else first_line(error)}
        for name, error in reasons.items()
    }


def _ask(provider: str) -> None:
    """Let a provider name candidates for a problem of ones; raises what cuDNN says."""
    core, one = _loader.require(), (1, 1, 1, 1)
    problem = core.Problem(
        direction="dgrad", dtype="float32", tf32=False, layout="nchw", x=one, w=one, y=one,
        padding=(0, 0), stride=(1, 1), dilation=(1, 1), groups=1, bias=False, alignment=16,
        device=0,
    )  # fmt: skip
    with torch.cuda.device(0):
        if provider == "legacy":
            core.legacy_heuristic(problem)
        else:
            core.graph_heuristic(problem, "convolution")


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine() or 'unknown'} CPU, {torch.get_num_threads()} threads"


def _quiet(call: Callable[[], _T]) -> _T | Exception:
    """The result or the exception: a broken driver warns or raises, and `info` must tell of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return call()
        except Exception as error:
            return error


def _text(call: Callable[[], str | None]) -> str | None:
    result = _quiet(call)
    return f"not known ({result})" if isinstance(result, Exception) else result


def _devices() -> list[dict[str, object]]:
    if not torch.cuda.is_available():
        return []
    found: list[dict[str, object]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "index": index,
                "name": properties.name,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "memory_bytes": properties.total_memory,
            }
        )
    return found


def _driver() -> str | None:
    """NVIDIA's driver version: of the loaded kernel module, else as nvidia-smi says."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        text = _nvidia_smi()
    match = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return match.group() if match else None


def _nvidia_smi() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
