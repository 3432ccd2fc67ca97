"""The stubs describe the module that was built, and the public names exist."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dgrad


def test_the_stubs_agree_with_the_module() -> None:
    try:
        importlib.import_module("dgrad._core")
    except ImportError as error:
        if "libcudnn" not in str(error):  # anything else is a broken build
            raise
        pytest.skip(f"dgrad._core cannot be loaded here: {error}")
    environment = dict(os.environ)
    parent = Path(dgrad.__file__).resolve().parents[1]
    if parent.name not in ("site-packages", "dist-packages"):  # an editable or in-tree build
        environment["MYPYPATH"] = str(parent)
    done = subprocess.run(
        [sys.executable, "-m", "mypy.stubtest", "dgrad._core"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", dgrad.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(dgrad, name) is not None


def test_public_names_are_listed_once_and_are_not_private() -> None:
    assert len(dgrad.__all__) == len(set(dgrad.__all__))
    assert not [name for name in dgrad.__all__ if name.startswith("_") and name != "__version__"]
