"""The commands explain and tune on a real GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dgrad
from dgrad import _measuring, store
from dgrad.cli import main
from dgrad.measure import measure
from pretended import LAYER, LAYERS, MODEL, problem, told

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_store")]


def _schema_errors(value: Any, part: str | None = None) -> list[str]:
    jsonschema = pytest.importorskip("jsonschema")
    path = Path(dgrad.__file__).with_name("selection.schema.json")
    schema = json.loads(path.read_text())
    if part is not None:
        schema = {"$ref": f"#/$defs/{part}", "$defs": schema["$defs"]}
    validator = jsonschema.Draft202012Validator(schema)
    return [error.message for error in validator.iter_errors(value)]


def _measurings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each problem that is measured from now on."""
    found: list[int] = []
    real = measure

    def counted(*arguments: Any) -> None:
        found.append(1)
        real(*arguments)

    monkeypatch.setattr(_measuring, "measure", counted)
    return found


def test_explain_chooses_one_candidate(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--stride", "2", "--direction", "all", "--bias", "--selection", "exhaustive"]
    assert main([*LAYER, *more]) == 0
    out = capsys.readouterr().out
    tables = out.split("\n\n")
    assert len(tables) == 3
    for direction, table in zip(("dgrad", "fprop", "wgrad"), tables, strict=True):
        name = direction.replace("dgrad", "dgrad+bias")
        assert table.startswith(f"{name} float32/tf32 nchw x=2x6x")
        chosen = [line for line in table.splitlines() if line.rstrip().endswith(" chosen")]
        assert len(chosen) == 1
        assert " ms " in chosen[0]
    assert "legacy:" in out


def test_explain_prints_json_that_the_schema_knows(capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--dtype", "float16", "--channels-last", "--direction", "wgrad", "--deterministic"]
    assert main([*LAYER, *more, "--workspace-limit", "16MiB", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)["selections"]
    assert _schema_errors(entry, "selection") == []
    assert entry["problem"]["direction"] == "wgrad"
    assert entry["problem"]["layout"] == "nhwc"
    chosen = entry["candidates"][entry["chosen"]]
    assert chosen["deterministic"]
    assert chosen["workspace_bytes"] <= 16 * 2**20


def test_explain_keeps_to_true_float32(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LAYER, "--strict", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)["selections"]
    assert entry["problem"]["tf32"] is False
    assert entry["candidates"][entry["chosen"]]["math_type"] == "FMA_MATH"


def test_explain_reports_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    huge = ["explain", "--input", "100000,1024,64,64", "--out", "1024", "--kernel", "2"]
    assert main(huge) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "out of memory" in err


def test_tune_measures_a_list_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: Callable[..., str]
) -> None:
    path = file(LAYERS)
    assert main(["tune", path, "--backward", "--json"]) == 0
    first = told(capsys)
    assert first["problems"] == 9
    assert first["new"] + first["alone"] == 9
    assert first["new"] > 0
    assert first["failed"] == []
    dgrad.plan_cache.clear()
    measured = _measurings(monkeypatch)
    assert main(["tune", path, "--backward", "--json"]) == 0
    second = told(capsys)
    assert second["known"] == first["new"] == len(store.list())
    assert (second["new"], second["alone"]) == (0, first["alone"])
    assert measured == []


def test_tune_survives_a_layer_that_does_not_fit(
    capsys: pytest.CaptureFixture[str], file: Callable[..., str]
) -> None:
    huge = LAYERS[0] | {"name": "huge", "N": 100_000, "C_in": 1024, "H": 64, "W": 64}
    assert main(["tune", file([huge, LAYERS[0]]), "--json"]) == 1
    summary = told(capsys)
    assert summary["problems"] == 1
    [failure] = summary["failed"]
    assert failure["where"] == "entry 1 (huge)"
    assert "out of memory" in failure["reason"]


def test_tune_measures_a_model_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: Callable[..., str]
) -> None:
    path = file(MODEL, "model.py")
    assert main(["tune", path, "--backward", "--json"]) == 0
    first = told(capsys)
    assert first["problems"] == 2  # the input needs no gradient
    assert first["failed"] == []
    dgrad.plan_cache.clear()
    measured = _measurings(monkeypatch)
    assert main(["tune", path, "--backward", "--json"]) == 0
    assert told(capsys)["known"] == first["new"]
    assert measured == []


@pytest.mark.processes
@pytest.mark.seconds(8)
def test_a_log_validates_and_can_be_tuned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    log_file = tmp_path / "selections.jsonl"
    code = """
import torch, dgrad
x = torch.randn(2, 8, 9, 9, device="cuda", requires_grad=True)
w = torch.randn(8, 4, 3, 5, device="cuda", requires_grad=True)
with dgrad.flags(selection="heuristic"):
    dgrad.conv_transpose2d(x, w, None, 2, 1, 1).sum().backward()
x = x.detach().half().contiguous(memory_format=torch.channels_last)
dgrad.conv_transpose2d(x, w.detach().half())
flat = torch.randn(2 * 8 * 9 * 9 + 1, device="cuda")
dgrad.conv_transpose2d(flat[1:].view(2, 8, 9, 9), w.detach(), stride=3)
"""
    monkeypatch.setenv("DGRAD_LOG_FILE", str(log_file))
    monkeypatch.setenv("PYTHONPATH", ":".join(filter(None, sys.path)))
    with monkeypatch.context() as patch:
        patch.setenv("DGRAD_STORE", "off")
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in log_file.read_text().splitlines()]
    assert len(records) == 5
    assert [_schema_errors(entry) for entry in records] == [[]] * 5
    assert [entry["problem"]["alignment"] for entry in records] == [16] * 5

    monkeypatch.delenv("DGRAD_LOG_FILE")
    assert main(["tune", str(log_file), "--json"]) == 0
    summary = told(capsys)
    assert summary["failed"] == []
    assert summary["problems"] == 5
    tuned = [selection.problem for selection, _ in dgrad.selections()]
    assert set(tuned) == {problem(**entry["problem"]) for entry in records}
