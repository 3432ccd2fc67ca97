"""What the tests of claims share: processes that hold a claim, and slow measuring."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import dgrad
from dgrad import _claim, _loader, _measuring, config, store
from dgrad._runner import Runner
from dgrad._watch import watching
from fake_cudnn import FakeCore, W, X, Y, fake_times, real_problem

_CORE, _REASON = _loader.load()
MARKS = [
    pytest.mark.skipif(_CORE is None, reason=str(_REASON)),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
    pytest.mark.usefixtures("folder", "waits_long"),
]

USUAL_S = _claim.WAIT_S
SHORT_S = 0.2  # a wait that ends; the others are to end before
LONG_S = 60.0
TIMES: dict[str, float | None] = {"convolution:eng1": 5.0, "convolution:eng2": 4.0, "ALGO_1": 3.0}


def locks(folder: Path) -> list[Path]:
    return [*folder.glob(".*.lock")]


class Child:
    """A process that runs ``work`` with a function that says words to this one."""

    def __init__(self, work: Callable[[Callable[[str], None]], object]) -> None:
        self._read, write = os.pipe()

        def say(word: str) -> None:
            os.write(write, word.encode() + b"\n")

        self.id = os.fork()
        if self.id == 0:
            status = 1
            try:
                work(say)
                status = 0
            finally:
                os._exit(status)
        os.close(write)

    def hear(self) -> str:
        """The next word."""
        word = b""
        while not word.endswith(b"\n"):
            more = os.read(self._read, 1)
            assert more, f"the process ended after {word!r}"
            word += more
        return word.decode().strip()

    def kill(self) -> None:
        os.kill(self.id, signal.SIGKILL)
        os.waitpid(self.id, 0)
        os.close(self._read)

    def wait(self) -> int:
        """Its exit code."""
        os.close(self._read)
        return os.waitstatus_to_exitcode(os.waitpid(self.id, 0)[1])


def hold(say: Callable[[str], None], of: Any = None) -> None:
    with store.claim(of or real_problem()):
        say("held")
        time.sleep(LONG_S)


@contextmanager
def held_elsewhere(of: Any = None) -> Iterator[Child]:
    """A process that has the claim of a problem, and keeps it."""
    child = Child(lambda say: hold(say, of))
    assert child.hear() == "held"
    try:
        yield child
    finally:
        child.kill()


def waited_s(of: Any = None) -> float:
    """How long it takes to get in."""
    begin = time.monotonic()
    with store.claim(of or real_problem()):
        return time.monotonic() - begin


def slow_times(
    core: FakeCore, monkeypatch: pytest.MonkeyPatch, log_file: Path, seconds: float
) -> list[list[str]]:
    """As fake_times, and so many seconds each; each measuring of any process is a line."""
    measured = fake_times(core, monkeypatch, TIMES)
    quick: Any = vars(_measuring)["measure"]

    def measure(*arguments: Any) -> None:
        with log_file.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        time.sleep(seconds)
        quick(*arguments)

    monkeypatch.setattr(_measuring, "measure", measure)
    return measured


def select(of: Any = None, **flags: Any) -> dgrad.Selection:
    policy = config.policy(dgrad.Flags(**{"selection": "measure", **flags}))
    with watching() as events:
        Runner(of or real_problem(), policy).run(X, W, Y)
    (selection,) = events
    assert isinstance(selection, dgrad.Selection)
    return selection
