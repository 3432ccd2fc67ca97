"""The stubs describe the module that was built, and the public names exist."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import dgrad
from dgrad import _loader

# stubtest imports the module by itself, so the cuDNN of a wheel has to be there before.
STUBTEST = """
import sys
from dgrad import _loader
from mypy import stubtest
_loader.load()
sys.exit(stubtest.main())
"""

# Of every class that pybind11 makes, and nothing that a stub could say.
PYBIND11_ITSELF = (
    " is inconsistent, metaclass differs",
    '.__init__ is inconsistent, stub does not have *args parameter "args"',  # has no constructor
)


# Else mypy reads all of PyTorch, which takes most of a minute; no variable here has its types.
MYPY_CONFIG = "[mypy]\nfollow_imports = skip\n"


def test_the_stubs_agree_with_the_module(file: Callable[..., str]) -> None:
    core, reason = _loader.load()
    if core is None:
        assert reason is not None
        assert "libcudnn.so.9 was not found" in reason  # anything else is a broken build
        pytest.skip(reason)
    environment = dict(os.environ)
    parent = Path(dgrad.__file__).resolve().parents[1]
    if parent.name not in ("site-packages", "dist-packages"):  # an editable or in-tree build
        environment["MYPYPATH"] = str(parent)
    arguments = ["--concise", "--mypy-config-file", file(MYPY_CONFIG, "mypy.ini"), "dgrad._core"]
    done = subprocess.run(
        [sys.executable, "-c", STUBTEST, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    found = (done.stdout + done.stderr).splitlines()
    assert [line for line in found if not line.endswith(PYBIND11_ITSELF)] == []
    assert found or done.returncode == 0


@pytest.mark.parametrize("name", dgrad.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(dgrad, name) is not None


def test_public_names_are_listed_once_and_are_not_private() -> None:
    assert len(dgrad.__all__) == len(set(dgrad.__all__))
    assert not [name for name in dgrad.__all__ if name.startswith("_") and name != "__version__"]
