"""The command line on any machine: `info`, wrong usage, a closed pipe."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dgrad
from dgrad.cli import main


def test_info_tells_versions_and_providers(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert dgrad.__version__ in out
    assert torch.__version__ in out
    assert "provider legacy" in out
    assert "usable" in out


def test_info_json_says_why_a_provider_is_not_usable(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["versions"]["torch"] == torch.__version__
    assert len(told["devices"]) == torch.cuda.device_count()
    legacy = told["providers"]["legacy"]
    assert legacy["usable"] is dgrad.is_available()
    assert legacy["usable"] or legacy["reason"] == dgrad.unavailable_reason()


def test_info_survives_what_raises(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        raise RuntimeError("[broken] driver")

    monkeypatch.setattr(dgrad, "is_available", broken)
    monkeypatch.setattr(dgrad, "unavailable_reason", broken)
    monkeypatch.setattr(torch.cuda, "is_available", broken)
    assert main(["info"]) == 0
    assert "not usable: not known ([broken] driver)" in capsys.readouterr().out


def test_info_runs_as_a_module_from_a_narrow_terminal_without_cutting() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from dgrad.cli import main; raise SystemExit(main(['info']))"],
        env={"PYTHONPATH": ":".join(filter(None, sys.path)), "COLUMNS": "10"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert torch.__version__ in done.stdout
    assert "…" not in done.stdout


@pytest.mark.parametrize("arguments", [[], ["no_such_command"], ["compare", "--budget", "-1"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


_BENCH = Path(__file__).with_name("results") / "bench-forward-h200.json"


@pytest.mark.parametrize(
    ("arguments", "unbuffered", "codes"),
    [
        (["info"], "", {141}),
        (["--help"], "", {0, 141}),  # argparse may not notice
        (["--help"], "1", {0, 141}),
        (["bench", "--from", str(_BENCH)], "1", {141}),
        (["store", "export", "/dev/stdout"], "", {141}),
        (["store", "load", "no_such_file.json"], "1", {141}),  # of stderr
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_closed_pipe_ends_a_command_quietly(
    tmp_path: Path, arguments: list[str], unbuffered: str, codes: set[int]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    told = tmp_path / "told"
    to_stderr = "load" in arguments
    settings = {"DGRAD_STORE": str(tmp_path / "store"), "PYTHONUNBUFFERED": unbuffered}
    with told.open("wb") as words:
        done = subprocess.run(
            [sys.executable, "-m", "dgrad", *arguments],
            stdout=words if to_stderr else writer,
            stderr=writer if to_stderr else words,
            env={**os.environ, **settings},
        )
    os.close(writer)
    assert told.read_text() == ""
    assert done.returncode in codes


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"], ["store", "list"]])
def test_a_full_disk_has_an_exit_code_of_its_own(arguments: list[str], tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "dgrad", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "DGRAD_STORE": str(tmp_path)},
        )
    assert done.returncode == 74
    assert done.stderr.endswith("the output cannot be written: No space left on device\n")
    assert "Traceback" not in done.stderr


def test_words_for_a_closed_stderr_do_not_come_to_stdout() -> None:
    command = f"exec {shlex.quote(sys.executable)} -m dgrad store load no_such_file.json 2>&-"
    done = subprocess.run(["sh", "-c", command], stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (2, "")
