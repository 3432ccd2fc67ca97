"""What the tests of compare share: its model, and contestants that need no process."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dgrad.bench import _process, _worker
from dgrad.bench._worker import Contestant, Request
from dgrad.cli import main

MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, 3, 3, stride=2)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout()

    def forward(self, x, scale):
        print("the model may print")
        y = self.up(x) * scale
        return {"y": self.drop(self.norm(y)), "more": (y.mean(), None, 7)}

def get_inputs():
    return [torch.rand(4, 2, 5, 6), torch.rand(4, 1, 1, 1)]

def get_init_inputs():
    return [2]
"""


def run_compare(*arguments: str) -> int:
    return main(["compare", "--device", "cpu", "--budget", "0.01", *arguments])


@pytest.fixture
def write_model(tmp_path: Path) -> Any:
    """Write a variant of the model: old text and new text, in turn."""

    def write(*edits: tuple[str, str]) -> str:
        text = MODEL
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "my model.py"
        file.write_text(text)
        return str(file)

    return write


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process be all three contestants: to start one takes seconds."""
    contestants: dict[Any, Contestant] = {}

    def exchange(process: Any, request: dict[str, Any]) -> Any:
        if process not in contestants:
            contestants[process] = Contestant(Request(**json.loads(process._command[-1])))
        with contextlib.redirect_stdout(sys.stderr):
            answer = _worker._answer(contestants[process], request)
        return json.loads(json.dumps(answer))

    monkeypatch.setattr(_process.Process, "start", lambda process: None)
    monkeypatch.setattr(_process.Process, "_exchange", exchange)
    monkeypatch.setattr(sys, "path", [*sys.path])
    logger = logging.getLogger("dgrad")
    monkeypatch.setattr(logger, "handlers", [*logger.handlers])
    level = logger.level
    yield
    logger.setLevel(level)
