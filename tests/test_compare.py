"""The command `compare`, on any machine: all of it runs on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from compare_fixtures import run_compare
from dgrad import cli
from dgrad.bench import default_model


@pytest.mark.usefixtures("in_this_process")
def test_compare_takes_a_step_of_training(
    write_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_compare(write_model(), "--training", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["training"] is True
    assert told["equal"] is True
    assert all(told[f"{name}_ms"] > 0 for name in ("pytorch", "pytorch_benchmark", "dgrad"))


@pytest.mark.usefixtures("in_this_process")
def test_compare_swaps_parametrized_layers(
    write_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    normed = "nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(channels, 3, 3, stride=2))"
    file = write_model(("nn.ConvTranspose2d(channels, 3, 3, stride=2)", normed))
    assert run_compare(file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 1


def test_the_rest_of_dgrads_model_has_the_setting_that_pytorch_was_faster_with(
    write_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = "time.sleep(0.3 * (not torch.backends.cudnn.benchmark))"
    file = write_model(
        ("import torch\n", "import time\nimport torch\n"), ('print("the model may print")', waits)
    )
    assert run_compare(file, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pytorch_ms"] > 300
    assert told["dgrad_ms"] < 300 > told["pytorch_benchmark_ms"]


@pytest.mark.usefixtures("in_this_process")
def test_a_step_of_training_needs_gradients(
    write_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_model(
        ("self.drop = nn.Dropout()", "self.requires_grad_(False).drop = nn.Dropout()")
    )
    assert run_compare(file, "--training") == 2
    assert "no tensor that requires a gradient" in capsys.readouterr().err


def test_compare_finds_a_model_equal_to_itself(
    write_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_model()
    assert run_compare(file, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["equal"] is True
    assert told["max_abs_diff"] == 0
    assert told["differences"] == []
    assert (told["file"], told["device"], told["dtype"]) == (file, "cpu", "float32")
    assert (told["layers"], told["tolerance"]) == (1, 1e-4)
    best = min(told["pytorch_ms"], told["pytorch_benchmark_ms"])
    assert told["ratio"] == pytest.approx(best / told["dgrad_ms"])
    assert set(told["spreads"]) == {"pytorch", "pytorch_benchmark", "dgrad"}
    assert set(told["shares"]) == set(told["spreads"])
    assert all(0 < share <= 1 for share in told["shares"].values())
    assert any("PyTorch's own operator" in note for note in told["notes"])
    assert any("batch 1" in note for note in told["notes"])
    assert isinstance(told["selected"], list)
    assert told["versions"]["torch"] == torch.__version__


@pytest.mark.usefixtures("in_this_process")
def test_compare_without_a_file_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_compare() == 0
    out = capsys.readouterr().out
    assert "built-in model: 1 layer swapped, float32, cpu" in out
    assert "outputs equal: yes (largest difference 0, atol = rtol = 0.0001)" in out
    assert "PyTorch, benchmark on" in out
    assert "ratio (better PyTorch / dgrad): " in out
    assert "the input is (1, 64, 128, 128) instead of (8, 64, 512, 512); --full-size" in out


def test_compare_says_of_the_built_in_input_what_the_help_says() -> None:
    assert [tuple(x.shape) for x in default_model.get_small_inputs()] == [default_model.SMALL_SIZE]
    for size in (default_model.SMALL_SIZE, default_model.FULL_SIZE):
        assert str(size) in cli._COMPARE_EPILOG


@pytest.mark.usefixtures("in_this_process")
def test_compare_says_that_outputs_differ(
    write_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    off = ("* scale", "* scale + (type(self.up) is not nn.ConvTranspose2d)")
    # normalising would hide a constant
    assert run_compare(write_model(off, ("self.drop(self.norm(y))", "y")), "--json") == 1
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["equal"] is False
    assert told["max_abs_diff"] == pytest.approx(1, abs=1e-5)
    assert "outputs differ: output['y']: largest absolute difference 1" in err


@pytest.mark.usefixtures("in_this_process")
def test_compare_says_which_of_two_unlike_outputs_is_nearer_to_float64_and_of_tf32(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "off.py"
    file.write_text("""
import logging

import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 2)

    def forward(self, x):
        logging.getLogger("dgrad").info("dgrad float32/tf32 nchw: graph:eng1 (TENSOR_OP_MATH)")
        return self.up(x) + (type(self.up) is not nn.ConvTranspose2d)

def get_inputs():
    return [torch.rand(1, 2, 4, 4)]

def get_init_inputs():
    return []
""")
    assert run_compare(str(file), "--json", "--selection", "heuristic") == 1
    out, err = capsys.readouterr()
    told = json.loads(out)
    errors = told["float64_errors"]
    assert errors["pytorch"] < 1e-6 < 0.1 < errors["dgrad"]
    assert any("torch.backends.cudnn.allow_tf32" in note for note in told["notes"])
    assert "relative error against float64: pytorch" in err


@pytest.mark.usefixtures("in_this_process")
def test_compare_keeps_the_batch_when_asked(
    write_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_model(("print(", "assert len(x) == 4, len(x); print("))
    assert run_compare(file) == 2
    assert "--full-size keeps it" in capsys.readouterr().err
    assert run_compare(file, "--full-size") == 0


@pytest.mark.usefixtures("in_this_process")
def test_compare_names_the_layers_that_stay_pytorchs(
    write_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    edits = [
        ("class Model", "class Own(nn.ConvTranspose2d):\n    pass\n\nclass Model"),
        ("self.norm =", "self.own = Own(3, 3, 1)\n        self.norm ="),
    ]
    assert run_compare(write_model(*edits), "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layers"] == 1
    assert "these layers stay PyTorch's: own: " in " ".join(told["notes"])


@pytest.mark.usefixtures("in_this_process")
def test_compare_says_why_no_layer_is_swapped(
    write_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    own = "class Own(nn.ConvTranspose2d):\n    pass\n\nclass Model"
    file = write_model(("class Model", own), ("self.up = nn.ConvTranspose2d(", "self.up = Own("))
    assert run_compare(file) == 2
    assert "layer to swap (up: " in capsys.readouterr().err
