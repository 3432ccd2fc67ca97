"""Stores of a test's own, and what a process remembers of one; a plugin that conftest.py names."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import dgrad
from claims import LONG_S
from dgrad import _claim, _folders, _kernels, _loader, log, store
from fake_device import pretend_name
from stored import HERE


@pytest.fixture(autouse=True)
def _no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own store; those of the store name a folder."""
    monkeypatch.setenv("DGRAD_STORE", "off")


@pytest.fixture
def own_store(_no_store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A store of the test's own, and nothing known of any problem."""
    monkeypatch.setenv("DGRAD_STORE", str(tmp_path / "store"))
    monkeypatch.delenv("DGRAD_LOG_FILE", raising=False)
    dgrad.plan_cache.clear()
    yield tmp_path / "store"
    dgrad.plan_cache.clear()


@pytest.fixture
def folder(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a pretended GPU in a store of the test's own, for a process that begins."""
    pretend_name(monkeypatch)
    monkeypatch.setattr(log, "_warned", {})
    monkeypatch.setattr(_claim, "_in_vain", set())
    monkeypatch.setattr(_kernels, "_refused", set())
    return own_store / f"NVIDIA-Pretended-1_sm90_cudnn-{_loader.cudnn_version()}_v3"


@pytest.fixture
def waits_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim of another process is waited for longer than any test takes."""
    monkeypatch.setattr(_claim, "WAIT_S", LONG_S)


@pytest.fixture
def store_root(_no_store: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own for a GPU that is made up; nothing of the user's can be reached."""
    root = tmp_path / "store"
    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("DGRAD_STORE", str(root))
    monkeypatch.setattr(_folders, "folder_name", lambda device: HERE)
    monkeypatch.setattr(log, "_warned", {})
    monkeypatch.setattr(store, "_swept", set())
    return root


@pytest.fixture
def warnings_of_store(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    def texts() -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == "dgrad" and record.levelno >= logging.WARNING
        ]

    return texts
