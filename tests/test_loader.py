"""Which libcudnn.so.9 is loaded where there are several: real ones, each time in a new process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from dgrad import _loader

WHEEL = _loader._wheel_library()
pytestmark = [
    pytest.mark.skipif(torch.backends.cuda.is_built(), reason="PyTorch brings a cuDNN of its own"),
    pytest.mark.skipif(WHEEL is None, reason="the wheel nvidia-cudnn is not installed"),
    pytest.mark.skipif(find_spec("dgrad._core") is None, reason="dgrad._core is not built"),
]

TELL = """
import json
import torch
import dgrad
from dgrad import _loader

one = torch.ones(1, 1, 1, 1)
assert dgrad.conv_transpose2d(one, one).item() == 1
reason = _loader.load()[1]
print(json.dumps([_loader._mapped_libraries(), _loader.cudnn_version(), reason]))
"""
WITHOUT_WHEEL = "import sys; sys.modules['nvidia'] = None"


def told(before: str = "", first: Path | None = None, system: Path | None = None) -> Any:
    """The libraries of a new process, the version and the reason against it.

    Args:
        before: code that runs before all else.
        first: a folder of packages that come before the installed ones.
        system: a folder that the system's loader searches.
    """

    def joined(*folders: str | Path | None) -> str:
        return os.pathsep.join(str(folder) for folder in folders if folder)

    done = subprocess.run(
        [sys.executable, "-c", f"{before}\n{TELL}"],
        env={
            **os.environ,
            "PYTHONPATH": joined(first, *sys.path),
            "LD_LIBRARY_PATH": joined(system, os.environ.get("LD_LIBRARY_PATH")),
        },
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[str], Path]:
    """A cuDNN of its own in a folder of this name; what that one loads itself is linked."""

    def copied(name: str) -> Path:
        assert WHEEL is not None
        folder = tmp_path.resolve() / name
        folder.mkdir()
        for library in WHEEL.parent.glob("libcudnn_*"):
            (folder / library.name).symlink_to(library)
        shutil.copy(WHEEL, folder)
        return folder

    return copied


def test_a_library_that_is_mapped_comes_before_the_wheel_and_the_system(
    copied: Callable[[str], Path],
) -> None:
    mapped = copied("mapped") / "libcudnn.so.9"
    before = f"import ctypes; ctypes.CDLL({str(mapped)!r})"
    libraries, version, reason = told(before, system=copied("system"))
    assert libraries == [str(mapped)]
    assert (version, reason) == (_loader.cudnn_version(), None)


def test_the_wheel_comes_before_the_system(copied: Callable[[str], Path]) -> None:
    assert WHEEL is not None
    libraries, version, reason = told(system=copied("system"))
    assert libraries == [str(WHEEL.resolve())]
    assert (version, reason) == (_loader.cudnn_version(), None)


def test_without_a_wheel_the_system_is_asked(copied: Callable[[str], Path]) -> None:
    system = copied("system")
    libraries, version, reason = told(WITHOUT_WHEEL, system=system)
    assert libraries == [str(system / "libcudnn.so.9")]
    assert (version, reason) == (_loader.cudnn_version(), None)


def test_a_wheel_that_cannot_be_loaded_is_the_reason_and_never_a_silent_other_choice(
    copied: Callable[[str], Path], tmp_path: Path
) -> None:
    package = tmp_path / "site" / "nvidia" / "cudnn"
    broken = package / "lib" / "libcudnn.so.9"
    broken.parent.mkdir(parents=True)
    for empty in (package.parent / "__init__.py", package / "__init__.py", broken):
        empty.touch()
    libraries, version, reason = told(first=tmp_path / "site", system=copied("system"))
    assert libraries == []
    assert version is None
    assert reason.startswith(f"{broken} could not be loaded: ")
    assert reason.endswith("file too short")


def test_a_wheel_without_the_library_is_none(copied: Callable[[str], Path], tmp_path: Path) -> None:
    package = tmp_path / "site" / "nvidia" / "cudnn"
    package.mkdir(parents=True)
    for empty in (package.parent / "__init__.py", package / "__init__.py"):
        empty.touch()
    system = copied("system")
    libraries, _, reason = told(first=tmp_path / "site", system=system)
    assert (libraries, reason) == ([str(system / "libcudnn.so.9")], None)


@pytest.mark.parametrize("content", [b"", b"no library"])
def test_a_broken_library_is_said_to_be_broken(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "libcudnn.so.9").write_bytes(content)
    _, version, reason = told(WITHOUT_WHEEL, system=tmp_path)
    assert version is None
    assert reason.startswith("the native module could not be loaded: ")
    assert str(tmp_path / "libcudnn.so.9") in reason


def test_a_library_without_its_parts_is_a_reason_and_no_abort(tmp_path: Path) -> None:
    assert WHEEL is not None
    shutil.copy(WHEEL, tmp_path / WHEEL.name)
    libraries, version, reason = told(WITHOUT_WHEEL, system=tmp_path)
    assert libraries == [str(tmp_path / "libcudnn.so.9")]
    assert version is None
    assert "a part of cuDNN is missing: libcudnn_graph.so.9" in reason
