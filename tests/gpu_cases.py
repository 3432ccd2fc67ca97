"""What gpu tests of single calls share: cases, ways to run them, what an error must say."""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import dgrad
from dgrad.selection import Candidate, Selection
from reference import TOLERANCES, Arguments, Case, assert_close, expected, results

DIRECTIONS = ("dgrad", "fprop", "wgrad")
BOTH_LAYOUTS = ("nchw", "channels_last")
PRECISIONS = tuple(TOLERANCES)

# Small: the slowest algorithm may be 500 times slower than the best.
PROBLEMS = {
    "3x3": Case(n=2, c_in=16, c_out=16, size=(12, 12), padding=(1, 1)),
    "5x5": Case(n=2, c_in=8, c_out=16, size=(10, 11), kernel=(5, 5), padding=(2, 2)),
    "3x7": Case(n=1, c_in=16, c_out=8, size=(9, 10), kernel=(3, 7)),
    "1x1": Case(n=2, c_in=32, c_out=16, size=(7, 7), kernel=(1, 1)),
    "2x2 s2": Case(n=2, c_in=16, c_out=8, size=(8, 8), kernel=(2, 2), stride=(2, 2)),
    "4x4 s2": Case(
        n=2, c_in=16, c_out=16, size=(8, 8), kernel=(4, 4), stride=(2, 2), padding=(1, 1)
    ),
    "groups and dilation": Case(
        n=2, c_in=16, c_out=32, size=(6, 7), stride=(2, 3), dilation=(2, 1), groups=4
    ),
    "depthwise": Case(n=2, c_in=16, c_out=16, groups=16, stride=(2, 2), padding=(1, 1)),
}
PLAIN = replace(PROBLEMS["3x3"], bias=False)
UPSAMPLING = Case(n=2, c_in=16, c_out=16, size=(12, 12), stride=(2, 2), padding=(1, 1))

# Large enough for ALGO_1 to use the tensor cores where it may.
WIDE = Case(n=4, c_in=64, c_out=64, size=(48, 48), bias=False)


def with_layout(case: Case, layout: str) -> Case:
    return replace(case, layout=layout, weight_layout=layout, grad_layout=layout)


def forward(case: Case, given: Arguments) -> Tensor:
    with torch.no_grad():
        return dgrad.conv_transpose2d(given.input, given.weight, given.bias, **case.options)


def dgrad_results(case: Case, given: Arguments) -> dict[str, Tensor]:
    """dgrad's output and gradients; what cuDNN does not run is an error, not PyTorch's work."""
    with dgrad.flags(allow_tf32=case.precision == "tf32", fallback="error"):
        return results(dgrad.conv_transpose2d, case, given)


def check(case: Case, given: Arguments, found: dict[str, Tensor]) -> None:
    wanted = expected(case, given)
    for name, actual in found.items():
        assert_close(actual, wanted[name], case.tolerance, f"{name} of {case}")


def verdict(selection: Selection, candidate: Candidate) -> str:
    return selection.verdicts()[selection.candidates.index(candidate)]


def assert_lists_candidates_with_reasons(message: str, wanted: str) -> None:
    lines = [line for line in message.splitlines() if re.match(r"  \w+:\w+ \(\w+\)", line)]
    assert lines, message
    for line in lines:
        assert re.fullmatch(r"  \w+:\w+ \(\w+\) +\S.*", line), f"no reason: {line!r}"
    # The others only are not the wanted one; the wanted one says why it cannot run.
    reasons = [line for line in lines if line.startswith(f"  {wanted} ")]
    assert all("is asked for" not in line for line in reasons), message
    assert wanted in message
    assert "import torch, dgrad" in message


def in_thread(work: Callable[[], Any]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@contextmanager
def room_for(count_bytes: int) -> Iterator[None]:
    """Let PyTorch's allocator get so much memory more, and hand out nothing of what it holds.

    It may hold much that is free: a small tensor that stays keeps all of the block it is a part of.
    """
    gc.collect()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    held, size = torch.cuda.memory_reserved(), 2**30
    fillers = []
    try:
        torch.cuda.set_per_process_memory_fraction(held / total)
        while size >= 2**20:
            try:
                fillers.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
            except torch.cuda.OutOfMemoryError:
                size //= 2
        torch.cuda.set_per_process_memory_fraction((held + count_bytes) / total)
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
