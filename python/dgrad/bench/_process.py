"""A process that is asked and answers, or fails in words: both of its ends."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from typing import IO, Any

_GOODBYE_S = 10.0


Answer = dict[str, Any]


class Failure(Exception):
    """A contestant could not do what it was asked. The message says why.

    Attributes:
        fault: what its answer says of whose fault it is, or None.
    """

    fault: str | None = None


class Process:
    """A contestant's process, started when it is asked, and anew after it has ended.

    Args:
        module: what it runs; its `main` calls :func:`serve`.
        arguments: of the command line.
        last_lines: how many of its last words are told if it ends before it answers.
        patience_s: seconds to wait for one answer; None waits for ever.
        environment: variables over those of this process. Default none.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        last_lines: int = 1,
        patience_s: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._command = (sys.executable, "-m", module, *arguments)
        self._last_lines = last_lines
        self._patience_s = patience_s
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        if self.running:
            return
        # The worker finds the same packages as this process, however it found them, and none in
        # the current folder (before Python 3.11 it looks there too).
        path = os.pathsep.join(filter(None, sys.path))
        own = self._environment
        environment = {**os.environ, **own, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
        self._words = tempfile.TemporaryFile()  # noqa: SIM115, closed by stop()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=environment,
        )

    def ask(self, do: str, **fields: Any) -> Answer:
        """The answer to one request. Raises Failure with the worker's reason, or with its end."""
        answer = self._exchange({"do": do, **fields})
        if "error" in answer:
            failure = Failure(answer["error"])
            failure.fault = answer.get("fault")
            raise failure
        return answer

    def _exchange(self, request: dict[str, Any]) -> Answer:
        self.start()
        assert self._process is not None
        requests, answers = self._pipes(self._process)
        line = b""
        with contextlib.suppress(BrokenPipeError):
            requests.write(json.dumps(request).encode() + b"\n")
            requests.flush()
            if not select.select([answers], [], [], self._patience_s)[0]:
                self.stop(kindly=False)
                raise Failure(f"its process did not answer within {self._patience_s:.0f} seconds")
            line = answers.readline()
        if not line.endswith(b"\n"):
            raise Failure(self._obituary(self._process))
        answer: Answer = json.loads(line)
        return answer

    def _obituary(self, process: subprocess.Popen[bytes]) -> str:
        """How it ended, and its last words."""
        end = _end(process.wait())
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").split("\n")
        self.stop(kindly=False)
        lines = list(filter(str.strip, words))[-self._last_lines :]
        return (": " if len(lines) == 1 else "\n").join([f"its process {end}", *lines])

    def stop(self, kindly: bool = True) -> None:
        """End the process; kindly, it may finish what it does."""
        process, self._process = self._process, None
        if process is None:
            return
        requests, answers = self._pipes(process)
        with contextlib.suppress(BrokenPipeError):
            requests.close()
        try:
            process.wait(_GOODBYE_S if kindly else 0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        answers.close()
        self._words.close()

    @staticmethod
    def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
        assert process.stdin is not None
        assert process.stdout is not None
        return process.stdin, process.stdout


def serve(answer: Callable[[dict[str, Any]], Answer]) -> None:
    """In the process: give each request of :meth:`Process.ask` to `answer`, until there is none.

    What else runs there may read its standard input, which is empty, and print.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what Ctrl-C ends
    with os.fdopen(os.dup(0)) as requests, os.fdopen(os.dup(1), "w") as answers:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        for line in iter(requests.readline, ""):
            answers.write(json.dumps(answer(json.loads(line))) + "\n")
            answers.flush()


def _end(returncode: int) -> str:
    if returncode >= 0:
        return f"ended with exit code {returncode}"
    try:
        return f"was killed by {signal.Signals(-returncode).name}"
    except ValueError:
        return f"was killed by signal {-returncode}"
