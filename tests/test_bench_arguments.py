"""What bench refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dgrad
from bench_layers import SMALL
from dgrad import _cli_bench
from dgrad.cli import main


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "the list is empty"),
        ("no layers", "expected a JSON list of layers"),
        ([1], "entry 1: expected a layer, not 1"),
        ([SMALL[0], {"N": 1}], "entry 2: the layer lacks C_in, H, W, C_out, kernel"),
        ([SMALL[0] | {"groups": 3}], "entry 1 (net/up1): out_channels is 8"),
        ([SMALL[0] | {"N": 2**70}], "entry 1 (net/up1): "),
        ([SMALL[0] | {"kernel": "3"}], "kernel is '3', expected an integer"),
        ([SMALL[0] | {"bias": "no"}], "bias is 'no', expected true or false"),
        ([SMALL[0] | {"strides": 2}], "the layer has 'strides', expected 'stride'"),
        ([SMALL[0] | {"kernel_size": 2}], "the layer has 'kernel_size', expected 'kernel'"),
        ([SMALL[0] | {"group": 2}], "the layer has 'group', expected 'groups'"),
        ([SMALL[0], SMALL[0]], "the name 'net/up1' occurs twice"),
        (json.dumps(SMALL[0]) + "\n{", "line 2: expected a layer, not not JSON"),
    ],
)
def test_a_malformed_suite_is_refused(
    content: Any, words: str, file: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--suite", file(content)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench: ")
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "no_such_file"], "no_such_file: no such file"),
        (["--suite", __file__], "expected a layer"),
        (["--only", "("], "'(' is no regular expression"),
        (["--only", "no such layer"], "no layer of layers matches 'no such layer'"),
        (["--dtype", "float32,int8"], "--dtype: 'int8': expected of float32, "),
        (["--layout", "chwn"], "--layout: 'chwn': expected of nchw, nhwc"),
        (["--against", "torch,"], "--against: '': expected of torch, torch-benchmark"),
        (["--direction", "wgrad"], "--direction"),
        (["--rounds", "0"], "--rounds: '0': expected a positive integer"),
        (["--rounds", str(2**70)], "expected a positive integer, not above"),
        (["--seconds", "\u00b2"], "--seconds: '\u00b2': expected a positive integer"),
        (["--seconds", "soon"], "--seconds: 'soon': expected a positive integer"),
        (["--json", "no/such/folder/out.json"], "out.json: there is no such folder"),
        (["--plot", "no/such/folder/out.png"], "out.png: there is no such folder"),
        (["--plot", "out.docx"], "out.docx: expected a name that ends in one of ."),
        (["--resume"], "--resume goes on with the FILE of --json"),
        (["--from", "no_such_file"], "no_such_file: No such file"),
        (["--from", "n" * 300], ": File name too long"),
        (["--from", "."], ".: Is a directory"),
        (["--suite", "n" * 300], ": File name too long"),
    ],
)
def test_a_wrong_argument_is_named(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra 'plot'")
    try:
        code: object = main(["bench", *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("--json", "n" * 300, ": File name too long"),
        ("--json", "n" * 252, ": File name too long"),  # before it is renamed
        ("--json", "", "'' names no file"),
        ("--json", "more/", "'more/' names no file"),
        ("--json", ".", ".: is a folder"),
        ("--json", "/dev/null", "/dev/null: is no regular file"),
        ("--json", "/proc/record.json", "/proc/record.json: "),
        ("--json", "n" * 300 + "/more.json", ": there is no such folder"),
        ("--plot", "n" * 300 + ".png", ": File name too long"),
        ("--plot", "folder.png", "folder.png: is a folder"),
        ("--plot", "/proc/image.png", "/proc/image.png: "),
        ("--plot", "", "expected a name that ends in one of ."),
    ],
)
@pytest.mark.parametrize("resume", [False, True])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_timed(
    option: str,
    name: str,
    words: str,
    resume: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if option == "--plot":
        pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra 'plot'")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_cli_bench, "_timed", lambda _: pytest.fail("has begun"))
    assert main(["bench", option, name, *["--resume"] * resume]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("bench: ")
    assert err.count("\n") == 1
    assert words in err
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


def test_trying_whether_files_can_be_written_leaves_them_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra 'plot'")
    record, image = tmp_path / "record.json", tmp_path / "image.png"
    record.write_text("earlier")
    image.write_text("earlier")
    monkeypatch.setattr(dgrad, "unavailable_reason", lambda: "there is no such thing")
    assert main(["bench", "--json", str(record), "--plot", str(image)]) == 3
    assert sorted(tmp_path.iterdir()) == [image, record]
    assert {path.read_text() for path in (record, image)} == {"earlier"}


def test_without_a_gpu_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dgrad, "unavailable_reason", lambda: "there is no such thing")
    assert main(["bench"]) == 3
    expected = "bench: dgrad cannot run on a GPU here: there is no such thing\n"
    assert capsys.readouterr() == ("", expected)
