"""What is wrong with the store never reaches a call: it measures anew, and one warning is told.

All of it runs on the CPU: the GPU is pretended, and so is cuDNN.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import dgrad
import kernels
from fake_cudnn import StoredCore, real_problem
from kernels import FUSED, MARKS, choose, run, warned
from stored import a_fifo, a_folder, a_link, refuse

pytestmark = MARKS
core = kernels.core


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def huge(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(1 << 40)


def binary(file: Path) -> None:
    file.write_bytes(pickle.dumps(os.getcwd))


def nested(file: Path) -> None:
    file.write_bytes(b"[" * 60_000)


def of_wrong_types(file: Path) -> None:
    file.write_text(json.dumps({"problem": 3, "candidates": {"": []}}))


def out_of_range(file: Path) -> None:
    entry = json.loads(file.read_text())
    entry["candidates"][0]["workspace_bytes"] = 10**400
    file.write_text(json.dumps(entry))


def of_another_problem(file: Path) -> None:
    entry = json.loads(file.read_text())
    other = real_problem()
    entry["problem"] |= {name: getattr(other, name) for name in ("x", "w", "y", "bias")}
    file.write_text(json.dumps(entry))


@pytest.mark.parametrize(
    "spoil",
    [
        truncated,
        empty,
        huge,
        binary,
        nested,
        of_wrong_types,
        out_of_range,
        of_another_problem,
        a_link,
        a_fifo,
        a_folder,
    ],
)
def test_a_call_with_a_spoiled_entry_measures_anew(
    core: StoredCore,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], None],
) -> None:
    choose(core, monkeypatch, FUSED)
    assert run(core).source == "stored"
    (file,) = folder.glob("*.json")
    spoil(file)
    assert run(core).source == "measured"
    text, *others = warned(caplog)
    assert str(file) in text
    if spoil is a_folder:  # which stays where it is
        assert "Is a directory" in others.pop()
    else:
        assert run(core).source == "stored", "it was replaced"
    assert not others


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS])
@pytest.mark.parametrize("call", ["mkdir", "open", "replace"])
def test_a_call_where_nothing_can_be_written_costs_one_warning(
    core: StoredCore,
    monkeypatch: pytest.MonkeyPatch,
    own_store: Path,
    caplog: pytest.LogCaptureFixture,
    call: str,
    error: int,
) -> None:
    def is_written(path: Path) -> bool:
        mine = str(path).startswith(str(own_store))
        return mine and (call == "mkdir" or path.name.startswith("."))

    refuse(monkeypatch, call, error, is_written)
    for _ in range(2):
        choose(core, monkeypatch, FUSED)
        assert dgrad.selections()[0][0].source == "measured"
    (text,) = warned(caplog)
    assert os.strerror(error) in text
