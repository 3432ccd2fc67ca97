"""The other end of `_bench_worker`: a process that is asked and answers, or fails in words."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
from typing import IO, Any

from dgrad.bench.compare import _end

_COMMAND = (sys.executable, "-m", "dgrad.bench._bench_worker")
_PATIENCE_S = 900.0  # for one answer: compiling and exhaustive selection take long
_GOODBYE_S = 10.0


class Failure(Exception):
    """A contestant could not do what it was asked. The message says why."""


class Process:
    """A contestant's process, started when it is asked, and anew after it has ended.

    Args:
        arguments: those of :class:`dgrad.bench._bench_worker.Contestant`.
    """

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        if self.running:
            return
        # the worker finds the same packages as this process, however it found them
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._words = tempfile.TemporaryFile()  # noqa: SIM115, closed by stop()
        self._process = subprocess.Popen(
            [*_COMMAND, *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            env=environment,
        )

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """The answer to one request. Raises Failure with the worker's reason, or with its end."""
        self.start()
        assert self._process is not None
        requests, answers = self._pipes(self._process)
        line = b""
        with contextlib.suppress(BrokenPipeError):
            requests.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            requests.flush()
            if not select.select([answers], [], [], _PATIENCE_S)[0]:
                self.stop(kindly=False)
                raise Failure(f"its process did not answer within {_PATIENCE_S:.0f} seconds")
            line = answers.readline()
        if not line.endswith(b"\n"):
            raise Failure(self._obituary(self._process))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failure(answer["error"])
        return answer

    def _obituary(self, process: subprocess.Popen[bytes]) -> str:
        """How it ended, and its last words."""
        end = _end(process.wait())
        self._words.seek(0)
        words = self._words.read().decode(errors="replace").split("\n")
        self.stop(kindly=False)
        return ": ".join([f"its process {end}", *list(filter(str.strip, words))[-1:]])

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
