"""Versions, devices and providers of this machine, as plain data. Nothing here raises."""

from __future__ import annotations

import platform
import re
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

import dgrad
from dgrad import _loader
from dgrad.config import PROVIDERS

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
    available = _quiet(dgrad.is_available) is True
    reason = None if available else _text(dgrad.unavailable_reason) or "the reason is not known"
    return {name: {"usable": available, "reason": reason} for name in PROVIDERS}


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
