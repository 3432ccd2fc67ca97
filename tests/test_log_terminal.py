"""Records of the log on a terminal that shows a progress bar: whole lines, above the bar."""

from __future__ import annotations

import os
import pty
import re
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad import log
from dgrad.cli import main
from pretended import LAYERS, pretend

RECORD = "[dgrad] PyTorch's own conv_transpose2d runs: " + "why: longer than a line " * 5
ERASED = "\x1b[2K"  # what rich begins a line with that it draws anew


def lines_of(act: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines of a terminal of 80 columns that is stderr meanwhile; each as it is left there."""
    ours, theirs = pty.openpty()
    written: list[bytes] = []

    def collect() -> None:
        with suppress(OSError):  # once nobody has the other end any more
            while True:
                written.append(os.read(ours, 65536))

    reader = threading.Thread(target=collect)
    reader.start()
    with monkeypatch.context() as patch, open(theirs, "w", buffering=1) as terminal:
        patch.setattr(sys, "stderr", terminal)
        for name, value in {"TERM": "xterm", "COLUMNS": "80", "DGRAD_LOG": "info"}.items():
            patch.setenv(name, value)
        patch.setattr(log, "_told", type(log._told)())
        log.fallback("told before the bar is there")
        act()
    log._configure()
    reader.join()
    os.close(ours)
    drawn = [line.rpartition(ERASED)[2] for line in b"".join(written).decode().splitlines()]
    return [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in drawn]


def tell() -> None:
    log.fallback(RECORD.partition(": ")[2])


class Model(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tell()
        return x


def test_a_record_stands_above_the_bar_of_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    found = lines_of(lambda: dgrad.warm_up(Model(), torch.ones(1), backward=False), monkeypatch)
    assert RECORD in found
    assert any("selecting" in line for line in found), "there was a bar"
    assert found[0] == "[dgrad] PyTorch's own conv_transpose2d runs: told before the bar is there"


def test_a_record_stands_above_the_bar_of_tune(
    monkeypatch: pytest.MonkeyPatch, file: Callable[..., str]
) -> None:
    gpu = pretend(monkeypatch)
    explain = gpu.explain

    def telling(*arguments: Any) -> dgrad.Explanation:
        tell()
        return explain(*arguments)

    monkeypatch.setattr(gpu, "explain", telling)
    found = lines_of(lambda: main(["tune", file(LAYERS)]), monkeypatch)
    assert RECORD in found
    assert any("3/3" in line for line in found), "there was a bar"
