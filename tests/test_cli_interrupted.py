"""Ctrl-C, which reaches all processes of a command: it ends quietly, and nothing of it runs on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bench_layers import SMALL
from pretended import LAYERS, MODEL

_TOO_LONG_S = 60.0
_BENCH = """
import sys
from dgrad.bench.contest import Contest
from dgrad.cli import main

def run(contest, case, run=Contest.run):
    print("begun", file=sys.stderr, flush=True)
    return run(contest, case)

Contest.run = run
sys.exit(main(sys.argv[1:]))
"""
_TUNE = """
import sys, time
import pytest
from dgrad.cli import main
from pretended import pretend

def explain(layer, directions):
    print("begun", file=sys.stderr, flush=True)
    time.sleep(60)

pretend(pytest.MonkeyPatch()).explain = explain
sys.exit(main(sys.argv[1:]))
"""


def _interrupt(arguments: list[str], words: Path, flag: Path | None = None) -> tuple[int, str]:
    """Send SIGINT to a command's process group once it has begun, which a file or words tell.

    Returns its exit code and its words.
    """

    def begun() -> bool:
        return "begun\n" in words.read_text() if flag is None else flag.exists()

    with words.open("w+") as out:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=out,
            stderr=out,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            start_new_session=True,
        )
        try:
            end = time.monotonic() + _TOO_LONG_S
            while not begun() and process.poll() is None and time.monotonic() < end:
                time.sleep(0.05)
            assert process.poll() is None, words.read_text()
            os.killpg(process.pid, signal.SIGINT)
            code = process.wait(timeout=20)
            with pytest.raises(ProcessLookupError):  # the group has no process any more
                os.killpg(process.pid, 0)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, words.read_text()


def test_ctrl_c_ends_compare(tmp_path: Path, file: Callable[..., str]) -> None:
    flag = tmp_path / "flag"
    waits = f"import time; open({str(flag)!r}, 'w').close(); time.sleep(60)"
    path = file(MODEL.replace('print("the model may print")', waits), "model.py")
    arguments = ["-m", "dgrad", "compare", "--device", "cpu", path]
    assert _interrupt(arguments, tmp_path / "words", flag) == (130, "interrupted\n")


def test_ctrl_c_ends_bench(tmp_path: Path, file: Callable[..., str]) -> None:
    arguments = ["-c", _BENCH, "bench", "--device", "cpu", "--suite", file(SMALL)]
    arguments += ["--rounds", "1000000"]
    assert _interrupt(arguments, tmp_path / "words") == (130, "begun\ninterrupted\n")


@pytest.mark.usefixtures("own_store")
def test_ctrl_c_ends_tune(tmp_path: Path, file: Callable[..., str]) -> None:
    arguments = ["-c", _TUNE, "tune", file(LAYERS)]
    assert _interrupt(arguments, tmp_path / "words") == (130, "begun\ninterrupted\n")
