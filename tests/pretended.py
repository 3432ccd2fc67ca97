"""What the tests of explain, tune and store share: a GPU that is pretended, layers, a model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import dgrad
from dgrad import _layers, _loader, config, tune
from dgrad._watch import note

LAYER = ["explain", "--input", "2,4,9,9", "--out", "6", "--kernel", "3,5"]
LAYERS = [
    {"name": "net/up1", "N": 2, "C_in": 8, "H": 9, "W": 9, "C_out": 8, "kernel": [3, 5]},
    {
        "name": "net/up2",
        "N": 2,
        "C_in": 8,
        "H": 5,
        "W": 6,
        "C_out": 4,
        "kernel": 4,
        "stride": [2, 2],
        "padding": [1, 1],
        "output_padding": 0,
        "groups": 2,
        "bias": True,
        "dtype": "fp16",
        "source": "of no importance",
    },
    {"name": "net/up3", "N": 1, "C_in": 4, "H": 3, "W": 3, "C_out": 4, "kernel": [2, 2]},
]
MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.up = nn.ConvTranspose2d(channels, 4, 3, stride=2)

    def forward(self, x):
        print("the model may print")
        return self.up(x)

def get_inputs():
    return [torch.rand(2, 8, 6, 6)]

def get_init_inputs():
    return [8]
"""


def problem(**changes: Any) -> Any:
    fields: dict[str, Any] = {
        "direction": "dgrad",
        "dtype": "float32",
        "tf32": True,
        "layout": "nchw",
        "x": (2, 6, 11, 13),
        "w": (4, 6, 3, 5),
        "y": (2, 4, 9, 9),
        "padding": (0, 0),
        "stride": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "bias": False,
        "alignment": 16,
        "device": 0,
    }
    return _loader.require().Problem(**(fields | changes))


def selection(of: Any, source: str = "measured") -> dgrad.Selection:
    fast = dgrad.Candidate("legacy", "ALGO_1", "TENSOR_OP_MATH", True, 2048, time_ms=0.5)
    slow = dgrad.Candidate("legacy", "ALGO_0", "TENSOR_OP_MATH", False, 0, time_ms=0.75)
    return dgrad.Selection(of, (fast, slow), 0, (None, None), source)


def record(of: Any) -> str:
    fields = selection(of).to_dict()
    return json.dumps({"format": 4, "gpu": "another GPU", **fields})


class Pretended:
    """A GPU that runs nothing: what is asked of it, and the problems that its store has."""

    def __init__(self) -> None:
        self.stored: set[Any] = set()
        self._widths: dict[_layers.Layer, int] = {}
        self.asked: list[tuple[_layers.Layer, Sequence[str]]] = []
        self.policies: list[config.Policy] = []
        self.strict: list[bool] = []
        self.error: Exception | None = None

    def run(self, of: Any) -> dgrad.Selection:
        self.policies.append(config.policy())
        self.strict.append(not config.tf32_allowed())
        if self.error is not None:
            raise self.error
        chosen = selection(of, "stored" if of in self.stored else "measured")
        self.stored.add(of)
        note(chosen)
        return chosen

    def explain(self, layer: _layers.Layer, directions: Sequence[str]) -> dgrad.Explanation:
        self.asked.append((layer, directions))
        # another problem for each layer, whatever its sizes
        width = self._widths.setdefault(layer, 9 + len(self._widths))
        x, y = (2, 6, 11, width + 4), (2, 4, 9, width)
        names = dict.fromkeys(("dgrad", *directions))
        return dgrad.Explanation([self.run(problem(direction=d, x=x, y=y)) for d in names])


def pretend(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    """A pretended GPU in the place of a real one."""
    gpu = Pretended()
    monkeypatch.setattr(dgrad, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        _layers.Layer, "explain", lambda layer, directions: gpu.explain(layer, directions)
    )
    monkeypatch.setattr(tune, "run_problem", gpu.run)
    return gpu


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON that tune has printed, without the seconds."""
    summary: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert summary.pop("seconds") >= 0
    return summary
