"""The command `compare`, on any machine: all of it runs on the CPU."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dgrad
from dgrad import cli
from dgrad.bench import _process, _worker, default_model
from dgrad.bench._worker import Contestant, Request
from dgrad.cli import main

_MODEL = """
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


def _compare(*arguments: str) -> int:
    return main(["compare", "--device", "cpu", "--budget", "0.01", *arguments])


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Write a variant of the model: old text and new text, in turn."""

    def write(*edits: tuple[str, str]) -> str:
        text = _MODEL
        for old, new in edits:
            assert old in text
            text = text.replace(old, new)
        file = tmp_path / "my model.py"
        file.write_text(text)
        return str(file)

    return write


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
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


# --- answers ---------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
def test_compare_takes_a_step_of_training(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert _compare(write(), "--training", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["training"] is True
    assert told["equal"] is True
    assert all(told[f"{name}_ms"] > 0 for name in ("pytorch", "pytorch_benchmark", "dgrad"))


@pytest.mark.usefixtures("here")
def test_compare_swaps_parametrized_layers(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    normed = "nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(channels, 3, 3, stride=2))"
    file = write(("nn.ConvTranspose2d(channels, 3, 3, stride=2)", normed))
    assert _compare(file, "--json") == 0
    assert json.loads(capsys.readouterr().out)["layers"] == 1


def test_the_rest_of_dgrads_model_has_the_setting_that_pytorch_was_faster_with(
    write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    waits = "time.sleep(0.3 * (not torch.backends.cudnn.benchmark))"
    file = write(
        ("import torch\n", "import time\nimport torch\n"), ('print("the model may print")', waits)
    )
    assert _compare(file, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["pytorch_ms"] > 300
    assert told["dgrad_ms"] < 300 > told["pytorch_benchmark_ms"]


@pytest.mark.usefixtures("here")
def test_a_step_of_training_needs_gradients(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(("self.drop = nn.Dropout()", "self.requires_grad_(False).drop = nn.Dropout()"))
    assert _compare(file, "--training") == 2
    assert "no tensor that requires a gradient" in capsys.readouterr().err


def test_compare_finds_a_model_equal_to_itself(
    write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write()
    assert _compare(file, "--json") == 0
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


@pytest.mark.usefixtures("here")
def test_compare_without_a_file_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert _compare() == 0
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


@pytest.mark.usefixtures("here")
def test_compare_says_that_outputs_differ(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    off = ("* scale", "* scale + (type(self.up) is not nn.ConvTranspose2d)")
    # normalising would hide a constant
    assert _compare(write(off, ("self.drop(self.norm(y))", "y")), "--json") == 1
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert told["equal"] is False
    assert told["max_abs_diff"] == pytest.approx(1, abs=1e-5)
    assert "outputs differ: output['y']: largest absolute difference 1" in err


@pytest.mark.usefixtures("here")
def test_compare_says_which_of_two_unlike_outputs_is_nearer_to_float64(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "off.py"
    file.write_text("""
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 2)

    def forward(self, x):
        return self.up(x) + (type(self.up) is not nn.ConvTranspose2d)

def get_inputs():
    return [torch.rand(1, 2, 4, 4)]

def get_init_inputs():
    return []
""")
    assert _compare(str(file), "--json", "--selection", "heuristic") == 1
    out, err = capsys.readouterr()
    errors = json.loads(out)["float64_errors"]
    assert errors["pytorch"] < 1e-6 < 0.1 < errors["dgrad"]
    assert "relative error against float64: pytorch" in err


@pytest.mark.usefixtures("here")
def test_compare_keeps_the_batch_when_asked(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(("print(", "assert len(x) == 4, len(x); print("))
    assert _compare(file) == 2
    assert "--full-size keeps it" in capsys.readouterr().err
    assert _compare(file, "--full-size") == 0


# --- failures --------------------------------------------------------------------------


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("edits", "words"),
    [
        ([("def get_init_inputs", "def other")], "the file lacks get_init_inputs"),
        ([("class Model", "class Other")], "the file lacks Model"),
        ([("import torch\n", "import no_such_module\n")], "cannot be imported at line 2"),
        ([("[2]", "[0.5]")], "Model(*get_init_inputs()) failed"),
        ([("return [2]", "return 2")], "get_init_inputs() returned a int: expected a list"),
        ([("return [torch.rand(4,", "return [1 / 0, torch.rand(4,")], "get_inputs() failed"),
        ([("torch.rand(4, 2, 5, 6)", "torch.rand(4, 9, 5, 6)")], "Model.forward failed"),
        ([("ConvTranspose2d(", "Conv2d(")], "no torch.nn.ConvTranspose2d layer to swap"),
        (
            [('"y": self', '"y": y.to_sparse(), "z": self')],
            "output['y'] is a tensor of layout torch.sparse_coo",
        ),
    ],
)
def test_compare_says_what_is_wrong_with_a_file(
    write: Any,
    capsys: pytest.CaptureFixture[str],
    edits: list[tuple[str, str]],
    words: str,
) -> None:
    file = write(*edits)
    assert _compare(file, "--json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert file in err


@pytest.mark.usefixtures("here")
def test_compare_tells_a_failure_of_dgrad_from_one_of_the_file(
    write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fail = ("print(", "assert type(self.up) is nn.ConvTranspose2d, 'not mine'; print(")
    assert _compare(write(fail)) == 3
    err = capsys.readouterr().err
    assert "dgrad: Model.forward failed at line" in err
    assert "AssertionError: not mine" in err


@pytest.mark.parametrize(
    ("end", "words"),
    [("os._exit(9)", "ended with exit code 9"), ("os.abort()", "was killed by SIGABRT")],
)
def test_compare_shows_the_last_words_of_a_worker_that_died(
    end: str, words: str, write: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    last = f"import os, sys; print('gone', file=sys.stderr, flush=True); {end}; ("
    assert _compare(write(("print(", last)), "--json") == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert "gone" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_file.py"], "no_such_file.py: no such file"),
        (["."], ".: is a folder"),
        (["--device", "tpu"], "--device tpu"),
        (["--device", "meta"], "expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "GPU"),
    ],
)
def test_compare_refuses_wrong_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["compare", *arguments]) == 2
    assert words in capsys.readouterr().err


def test_compare_refuses_a_gpu_that_dgrad_cannot_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dgrad, "is_available", lambda: False)
    monkeypatch.setattr(dgrad, "unavailable_reason", lambda: "no cuDNN")
    assert main(["compare"]) == 3
    assert "dgrad cannot run on the GPU here: no cuDNN" in capsys.readouterr().err
