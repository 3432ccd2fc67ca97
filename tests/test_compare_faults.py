"""What `compare` says of wrong files and arguments, and of contestants that fail or die."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dgrad
from compare_fixtures import run_compare
from dgrad.cli import main


@pytest.mark.usefixtures("in_this_process")
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
        (
            [('return {"y"', 'return None, "y", {"y": 3.0}; {"y"')],
            "Model.forward returned no tensor",
        ),
        (
            [("return [torch.rand(4,", "return [4, None]; [torch.rand(4,")],
            "get_inputs() returned no",
        ),
        (
            [("from torch import nn", "raise SystemExit(0)")],
            "cannot be imported at line 3: SystemExit",
        ),
        (
            [("super().", "raise SystemExit; super().")],
            "get_init_inputs()) failed at line 7: SystemExit",
        ),
        ([("return [2]", "exit('bye')")], "get_init_inputs() failed at line 21: SystemExit: bye"),
        ([("return [torch", "exit(); [torch")], "get_inputs() failed at line 18: SystemExit"),
        ([("print(", "exit(0); print(")], "Model.forward failed at line 13: SystemExit: 0"),
        (
            [("print(", "type(self.up) is nn.ConvTranspose2d or exit(0); print(")],
            "Model.forward failed at line 13: SystemExit: 0",
        ),
        (
            [("print(", "raise GeneratorExit; print(")],
            "Model.forward failed at line 13: GeneratorExit",
        ),
        (
            [("from torch import nn", "raise KeyboardInterrupt")],
            "the file raised KeyboardInterrupt",
        ),
        (
            [("print(", "raise ValueError('a\\n\\nb'); print(")],
            "at line 13: ValueError: a b (the input",
        ),
        (
            [("import torch\n", "class E(Exception):\n  __str__ = None\nraise E\n")],
            "cannot be imported at line 4: E",
        ),
        ([("import torch\n", "import torch, (\n")], "the file cannot be imported: SyntaxError: "),
        ([("import torch\n", "import torch\0\n")], "the file cannot be imported: SyntaxError: "),
    ],
)
def test_compare_says_what_is_wrong_with_a_file(
    write_model: Any,
    capsys: pytest.CaptureFixture[str],
    edits: list[tuple[str, str]],
    words: str,
) -> None:
    file = write_model(*edits)
    assert run_compare(file, "--json") == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.replace("the model may print\n", "")
    assert line.startswith(f"compare: {file}: ")
    assert line.count("\n") == 1
    assert words in line


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("print(", "x = x.cuda(); print(", "Model.forward failed at line 13: "),
        (
            "super().__init__()",
            "super().__init__(); torch.ones(1).cuda()",
            "Model(*get_init_inputs()) failed",
        ),
        ("[2]", "[torch.zeros(2).cuda()]", "get_init_inputs() failed at line 21: "),
    ],
)
def test_compare_says_that_a_file_needs_a_gpu(
    write_model: Any, capsys: pytest.CaptureFixture[str], old: str, new: str, words: str
) -> None:
    file = write_model((old, new))
    assert run_compare(file) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"compare: {file}: {words}")
    assert err.count("\n") == 1
    assert re.search("CUDA|NVIDIA", err)


@pytest.mark.usefixtures("in_this_process")
def test_compare_tells_an_exit_in_the_backward_pass(
    write_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_model(
        ("y = self.up(x) * scale", "y = self.up(x); y.register_hook(lambda _: exit(0))")
    )
    assert run_compare(file, "--training") == 2
    assert "the backward pass failed at line 14: SystemExit: 0" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\x7fELF\0\xff\xfe" * 9])
@pytest.mark.usefixtures("in_this_process")
def test_compare_says_what_a_file_without_python_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    file = tmp_path / "what.py"
    file.write_bytes(content)
    assert run_compare(str(file)) == 2
    err = capsys.readouterr().err
    expected = "cannot be imported: SyntaxError" if content else "lacks Model, get_inputs, get_init"
    assert err.startswith(f"compare: {file}: the file {expected}")
    assert err.count("\n") == 1


@pytest.mark.usefixtures("in_this_process")
def test_compare_prints_a_file_name_that_the_terminal_cannot_write(
    write_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(write_model()).rename(Path(write_model()).with_name("\u4e2d\udcff.py"))
    out = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(out, "ascii"))
        assert run_compare(str(file)) == 0
        assert b"\\u4e2d\\udcff.py: 1 layer swapped" in out.getvalue()


@pytest.mark.usefixtures("in_this_process")
def test_compare_tells_a_failure_of_dgrad_from_one_of_the_file(
    write_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    fail = ("print(", "assert type(self.up) is nn.ConvTranspose2d, 'not mine'; print(")
    assert run_compare(write_model(fail)) == 3
    err = capsys.readouterr().err
    assert "dgrad: Model.forward failed at line" in err
    assert "AssertionError: not mine" in err


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("where", ["print(", "super().__init__("])
def test_compare_says_that_the_memory_does_not_suffice(
    write_model: Any, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    full = f"raise torch.cuda.OutOfMemoryError('CUDA out of memory'); {where}"
    assert run_compare(write_model((where, full))) == 3
    assert "PyTorch: out of memory: CUDA out of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("end", "words"),
    [("os._exit(9)", "ended with exit code 9"), ("os.abort()", "was killed by SIGABRT")],
)
def test_compare_shows_the_last_words_of_a_worker_that_died(
    end: str, words: str, write_model: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    last = f"import os, sys; print('gone', file=sys.stderr, flush=True); {end}; ("
    assert run_compare(write_model(("print(", last)), "--json") == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert "gone" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_file.py"], "no_such_file.py: no such file"),
        ([""], "compare: : no such file"),
        (["."], ".: is a folder"),
        (["/dev/null"], "/dev/null: is no regular file"),
        ([f"{__file__}/more"], "more: Not a directory"),
        (["n" * 300], "nnn: File name too long"),
        (["--device", "tpu"], "--device tpu"),
        (["--device", "meta"], "expected cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "GPU"),
    ],
)
def test_compare_refuses_wrong_arguments(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert main(["compare", *arguments]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("--seed=x", "argument --seed: 'x': expected a number from 0 to 2**32 - 1"),
        ("--seed=", "argument --seed: '': expected a number from 0 to 2**32 - 1"),
        ("--seed=-1", "argument --seed: '-1': expected a number from 0 to 2**32 - 1"),
        ("--seed=1.5", "argument --seed: '1.5': expected a number from 0 to 2**32 - 1"),
        (f"--seed={2**32}", f"argument --seed: '{2**32}': expected a number from 0 to 2**32 - 1"),
        (f"--seed={2**70}", f"argument --seed: '{2**70}': expected a number from 0 to 2**32 - 1"),
        ("--budget=soon", "argument --budget: 'soon': expected a positive number of seconds"),
        ("--budget=nan", "argument --budget: 'nan': expected a positive number of seconds"),
        ("--budget=0", "argument --budget: '0': expected a positive number of seconds"),
    ],
)
def test_compare_says_what_a_wrong_number_should_be(
    capsys: pytest.CaptureFixture[str], argument: str, words: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compare", argument])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.usefixtures("in_this_process")
def test_compare_takes_the_largest_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_compare("--seed", str(2**32 - 1)) == 0


def test_compare_refuses_a_gpu_that_dgrad_cannot_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(dgrad, "is_available", lambda: False)
    monkeypatch.setattr(dgrad, "unavailable_reason", lambda: "no cuDNN")
    assert main(["compare"]) == 3
    assert "dgrad cannot run on the GPU here: no cuDNN" in capsys.readouterr().err
