"""What tune reads: logs of selections, lists of layers, models; and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad import _call, _layers, config, tune
from dgrad.cli import main
from pretended import LAYERS, MODEL, Pretended, pretend, problem, record, selection, told

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return pretend(monkeypatch)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "expected a JSON list of layers, one JSON object a line"),
        ("not JSON\n12\n", "expected a JSON list of layers, one JSON object a line"),
        ("[]", "the list is empty"),
        ("[" * 20_000, "what.json: "),
        ("[{]", "what.json: "),
        ("\udcff", "what.json: "),
    ],
)
def test_tune_refuses_a_file_without_entries(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: str
) -> None:
    path = tmp_path / "what.json"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    assert main(["tune", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tune: ")
    assert words in err


def test_tune_refuses_a_file_that_is_not_there_and_wrong_arguments(
    capsys: pytest.CaptureFixture[str], file: Callable[..., str]
) -> None:
    assert main(["tune", "nowhere.json"]) == 2
    assert "tune: nowhere.json: no such file" in capsys.readouterr().err
    assert main(["tune", "."]) == 2
    assert "tune: .: is a folder" in capsys.readouterr().err
    assert main(["tune", "n" * 300]) == 2
    assert "nnn: File name too long" in capsys.readouterr().err
    assert main(["tune", "/dev/null"]) == 2
    assert "tune: /dev/null: is no regular file" in capsys.readouterr().err
    limits = [["--limit", wrong] for wrong in ("0", "-1", "all", "1,", "", str(2**70))]
    for wrong in (*limits, ["--selection", "heuristic"], ["--no-such"]):
        with pytest.raises(SystemExit) as caught:
            main(["tune", file(LAYERS), *wrong])
        assert caught.value.code == 2
        assert wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "dtypes"),
    [
        ("fp32", [torch.float32]),
        ("fp16 (AMP)", [torch.float16]),
        ("fp32 or amp fp16", [torch.float32, torch.float16]),
        ("fp16/bf16", [torch.float16, torch.bfloat16]),
        ("float64", [torch.float64]),
    ],
)
def test_a_layer_is_taken_in_each_dtype_that_it_names(text: str, dtypes: list[torch.dtype]) -> None:
    assert [layer.dtype for layer in _layers.layers(LAYERS[0] | {"dtype": text})] == dtypes


@pytest.mark.parametrize(
    ("fields", "channels_last"),
    [
        ({}, False),
        ({"layout": "nchw"}, False),
        ({"layout": "contiguous"}, False),
        ({"layout": "NHWC"}, True),
        ({"layout": "channels_last"}, True),
    ],
)
def test_a_layer_is_taken_in_the_layout_that_it_names(
    fields: dict[str, str], channels_last: bool
) -> None:
    [layer] = _layers.layers(LAYERS[0] | fields)
    assert layer.channels_last is channels_last


def test_a_recorded_problem_is_made_again_from_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    made_by_others = problem(stride=(1, 1))

    def explain(_convolution: object, *arguments: Any, **bias: Any) -> dgrad.Explanation:
        [(runner, _, _)] = _call.Call(*arguments, **bias)._parts
        made.append(runner._problem)
        return dgrad.Explanation([selection(made[-1])])

    real = torch.randn
    monkeypatch.setattr(_layers, "explain", explain)
    monkeypatch.setattr(torch, "randn", lambda *sizes, dtype, device: real(*sizes, dtype=dtype))
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    strided = {"x": (2, 6, 12, 20), "w": (4, 3, 3, 5), "y": (2, 4, 6, 6), "stride": (2, 3)}
    for changes in (
        {},
        {"direction": "fprop", "layout": "nhwc", "dtype": "bfloat16", "tf32": False},
        {"direction": "wgrad", "tf32": False},
        {"dtype": "float16", "tf32": False, "layout": "nhwc"},
        strided | {"groups": 2, "padding": (1, 0), "x": (2, 6, 12, 20), "dtype": "float64"},
        {"x": (2, 1, 1, 1), "w": (4, 1, 1, 1), "y": (2, 4, 1, 1), "layout": "nhwc"},
        {"bias": True},
        strided | {"groups": 2, "padding": (1, 0), "layout": "nhwc", "bias": True},
    ):
        tf32 = {"tf32": False} if changes.get("dtype") == "float64" else {}
        wanted = problem(**(changes | tf32))
        _layers.run_problem(wanted)
        assert made.pop() == wanted
    monkeypatch.setattr(config, "tf32_allowed", lambda flags: False)
    with pytest.raises(RuntimeError, match=r"another problem runs here.*\['tf32'\]"):
        _layers.run_problem(made_by_others)


@pytest.mark.parametrize("direction", ["dgrad", "fprop", "wgrad"])
def test_a_recorded_part_of_split_tensors_is_run_as_it_is(
    monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    ran: list[tuple[Any, ...]] = []

    class Runner:
        def __init__(self, of: Any, policy: config.Policy) -> None:
            self.problem = of

        def run(self, x: Tensor, w: Tensor, y: Tensor, bias: Tensor | None) -> None:
            ran.append((self.problem, x, w, y, bias))

    real = torch.randn
    monkeypatch.setattr(_layers, "Runner", Runner)
    monkeypatch.setattr(torch, "randn", lambda *sizes, dtype, device: real(*sizes, dtype=dtype))
    bias = direction == "dgrad"
    part = problem(direction=direction, alignment=8, layout="nhwc", bias=bias)
    _layers.run_problem(part)
    [(of, *tensors, added)] = ran
    assert of == part
    assert [list(t.shape) for t in tensors] == [part.x, part.w, part.y]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    assert [t.data_ptr() % 16 for t in tensors] == [8, 0, 8]
    assert (added is not None) is bias
    monkeypatch.setattr(config, "tf32_allowed", lambda flags=None: False)
    with pytest.raises(RuntimeError, match=r"another problem runs here.*\['tf32'\]"):
        _layers.run_problem(part)


def test_tune_names_what_fails_and_goes_on(
    pretended: Pretended, capsys: pytest.CaptureFixture[str], file: Callable[..., str]
) -> None:
    spoiled = json.loads(record(problem()))
    wrong: list[tuple[Any, str]] = [
        ({"name": "short", "N": 1}, "entry 1 (short): the layer lacks C_in, H, W, C_out, kernel"),
        (LAYERS[0] | {"dtype": "fp32/int8"}, "entry 2 (net/up1): dtype is 'fp32/int8', expected"),
        (
            LAYERS[0] | {"layout": "hwcn"},
            "entry 3 (net/up1): layout is 'hwcn', expected one of nchw",
        ),
        (LAYERS[0] | {"kernel": "3x3"}, "entry 4 (net/up1): kernel is '3x3', expected an integer"),
        (LAYERS[0] | {"N": 1.5}, "entry 5 (net/up1): N is 1.5, expected an integer"),
        (LAYERS[0] | {"groups": 3}, "entry 6 (net/up1): out_channels is 8, expected a multiple"),
        ("text", "entry 7: expected a layer or a record of a selection, not 'text'"),
        ({"problem": {"x": 1}}, "entry 8: problem is not an object of direction, dtype"),
        ({"problem": spoiled["problem"] | {"x": "big"}}, "entry 9: problem has a field of a wrong"),
        ({"problem": spoiled["problem"] | {"groups": 5}}, "entry 10: groups is 5, expected"),
        ({"problem": spoiled["problem"] | {"direction": None}}, "entry 11: problem has a field"),
        ({"problem": spoiled["problem"] | {"bias": "yes"}}, "entry 12: problem has a field"),
        (
            {"problem": spoiled["problem"] | {"bias": True, "direction": "wgrad"}},
            "entry 13: bias is true, expected false",
        ),
        ({"problem": {k: v for k, v in spoiled["problem"].items() if k != "bias"}}, "entry 14: "),
    ]
    path = file([*(entry for entry, _ in wrong), LAYERS[0]])
    assert main(["tune", path, "--json"]) == 1
    out, err = capsys.readouterr()
    summary = json.loads(out)
    assert summary["new"] == 1
    told_lines = [f"{entry['where']}: {entry['reason']}" for entry in summary["failed"]]
    assert len(told_lines) == len(wrong)
    for line, (_, words) in zip(told_lines, wrong, strict=True):
        assert line.startswith(words)
        assert f"tune: {line}\n" in err


def test_tune_names_the_line_that_is_no_json(
    pretended: Pretended, capsys: pytest.CaptureFixture[str], file: Callable[..., str]
) -> None:
    assert main(["tune", file("\n{half a rec\n" + record(problem())), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["new"] == 1
    assert "tune: line 2: not JSON: " in err


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("class Model", "class Other", "the file lacks Model"),
        ("import torch\n", "import no_such_module\n", "cannot be imported at line 2"),
        ("return [8]", "return [0.5]", "Model(*get_init_inputs()) failed"),
        ("import torch\n", "import sys; sys.exit()\n", "cannot be imported at line 2: SystemExit"),
    ],
)
def test_tune_refuses_a_wrong_model(
    pretended: Pretended,
    capsys: pytest.CaptureFixture[str],
    file: Callable[..., str],
    old: str,
    new: str,
    words: str,
) -> None:
    path = file(MODEL.replace(old, new), "model.py")
    assert main(["tune", path]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"tune: {path}: " in err
    assert words in err


def test_tune_counts_an_exit_of_the_model_as_its_failure(
    pretended: Pretended,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: Callable[..., str],
) -> None:
    monkeypatch.setattr(tune, "warm_up", lambda model, *inputs, backward: model(*inputs))
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    path = file(MODEL.replace("return self.up(x)", "raise SystemExit(0)"), "model.py")
    assert main(["tune", path, "--json"]) == 1
    out, err = capsys.readouterr()
    assert "tune: model.py: SystemExit: 0\n" in err
    assert json.loads(out)["failed"] == [{"where": "model.py", "reason": "SystemExit: 0"}]


def test_tune_takes_a_log_line_by_line(
    pretended: Pretended, capsys: pytest.CaptureFixture[str], file: Callable[..., str]
) -> None:
    elsewhere = problem(device=3, direction="wgrad")
    path = file("\n".join([record(elsewhere), "", record(elsewhere), record(problem(groups=1))]))
    assert main(["tune", path, "--json"]) == 0
    assert pretended.stored == {problem(direction="wgrad"), problem()}
    assert told(capsys)["new"] == 2
    pretended.stored.clear()
    assert main(["tune", path, "--json", "--limit", "1", "--backward"]) == 0
    assert pretended.stored == {problem(direction=d) for d in ("dgrad", "fprop", "wgrad")}


def test_tune_takes_the_bias_of_a_record_for_its_own_direction_alone(
    pretended: Pretended, capsys: pytest.CaptureFixture[str], file: Callable[..., str]
) -> None:
    path = file(record(problem(bias=True)))
    assert main(["tune", path, "--json"]) == 0
    assert pretended.stored == {problem(bias=True)}
    assert main(["tune", path, "--json", "--backward"]) == 0
    gradients = {problem(direction="fprop"), problem(direction="wgrad")}
    assert pretended.stored == {problem(bias=True), *gradients}


def test_tune_reads_the_fields_of_a_layer(pretended: Pretended, file: Callable[..., str]) -> None:
    assert main(["tune", file(LAYERS[1:2])]) == 0
    assert pretended.asked[0][0] == _layers.Layer(
        (2, 8, 5, 6),
        4,
        (4, 4),
        stride=(2, 2),
        padding=(1, 1),
        groups=2,
        bias=True,
        dtype=torch.float16,
    )
