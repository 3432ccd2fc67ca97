"""explain and warm_up say what would run, and leave the model as it was."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import dgrad


class Counting(torch.nn.Module):
    """Buffers that are replaced, written to, expanded and saved by the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.up = dgrad.ConvTranspose2d(2, 2, 2)
        self.norm = torch.nn.BatchNorm2d(2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("wide", torch.ones(1).expand(2))
        self.register_buffer("scale", torch.full((1,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.norm(self.up(x)) * self.scale


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_of_the_model_changes(backward: bool) -> None:
    model, x = Counting(), torch.randn(1, 2, 3, 3)
    output = model(x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    dgrad.explain(model, x, backward=backward)
    dgrad.warm_up(model, x, backward=backward)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    output.sum().backward()  # a graph made before is still whole


def test_a_model_made_for_inference_is_explained_too() -> None:
    with torch.inference_mode():
        model = Counting()
        dgrad.explain(model, torch.randn(1, 2, 3, 3))
        assert float(model.calls) == 0


def test_where_pytorch_runs_the_reason_is_said() -> None:
    explanation = dgrad.explain(dgrad.ConvTranspose2d(2, 2, 2), torch.randn(1, 2, 3, 3))
    assert explanation.selections == []
    (note,) = explanation.notes
    assert "PyTorch's own operator runs: input is on cpu" in note
    assert str(explanation) == note
    assert explanation.to_dict() == {"selections": [], "notes": [note]}


def test_a_call_without_transposed_convolutions_says_so() -> None:
    assert str(dgrad.explain(torch.nn.ReLU(), torch.ones(1))) == "no transposed convolution ran"


def test_warm_up_prints_nothing_where_there_is_no_terminal() -> None:
    code = (
        "import torch, dgrad; "
        "dgrad.warm_up(dgrad.ConvTranspose2d(2, 2, 2), torch.randn(1, 2, 3, 3))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
