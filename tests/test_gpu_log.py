"""The log of what is selected: one line for each new selection, and a verdict on each candidate."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace

import pytest

import dgrad
from dgrad import _loader
from dgrad.selection import Candidate, Selection
from gpu_cases import DIRECTIONS, PLAIN, forward, in_thread, verdict
from reference import arguments, results

pytestmark = pytest.mark.gpu


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The INFO lines about selections since the last call."""
    caplog.set_level(logging.INFO, logger="dgrad")
    dgrad.plan_cache.clear()

    def lines() -> list[str]:
        found = [
            record.getMessage()
            for record in caplog.records
            if record.name == "dgrad" and record.levelno == logging.INFO
        ]
        caplog.clear()
        return [line for line in found if line.startswith("selected ")]

    return lines


def test_one_line_for_each_new_selection_and_none_for_a_repeat(
    info: Callable[[], list[str]],
) -> None:
    given = arguments(PLAIN)
    with dgrad.flags(allow_tf32=False, selection="heuristic"):
        results(dgrad.conv_transpose2d, PLAIN, given)
        lines = info()
        assert len(lines) == 3
        for line, direction in zip(lines, DIRECTIONS, strict=True):
            assert re.search(
                rf"^selected (graph|legacy):\S+ \(\w+_MATH\) for {direction} float32/ieee nchw ",
                line,
            ), line
            assert re.search(r"workspace [\d.]+ ([KMG]i)?B\b", line), line
            assert "source heuristic" in line
            assert f"cuDNN {_loader.cudnn_version()}" in line
        results(dgrad.conv_transpose2d, PLAIN, given)
        assert info() == []
        in_thread(lambda: results(dgrad.conv_transpose2d, PLAIN, given))
        assert info() == []
        # The same problem at other addresses.
        results(dgrad.conv_transpose2d, PLAIN, arguments(replace(PLAIN, seed=1)))
        assert info() == []


def test_another_problem_or_other_flags_are_another_line(info: Callable[[], list[str]]) -> None:
    given = arguments(PLAIN)
    forward(PLAIN, given)
    assert len(info()) == 1
    with dgrad.flags(deterministic=True):
        forward(PLAIN, given)
    (line,) = info()
    assert re.search(r"(?<!not )deterministic", line)
    with dgrad.flags(algorithm="legacy:ALGO_1"):
        forward(PLAIN, given)
    (line,) = info()
    assert "legacy:ALGO_1" in line
    assert "source forced" in line
    taller = replace(PLAIN, size=(13, 12))
    forward(taller, arguments(taller))
    assert len(info()) == 1


def test_the_verdicts_cover_all_candidates(selections: list[Selection]) -> None:
    forward(PLAIN, arguments(PLAIN))
    (selection,) = selections
    verdicts: dict[Candidate, str] = {c: verdict(selection, c) for c in selection.candidates}
    assert list(verdicts.values()).count("chosen") == 1
    assert all(verdicts.values())
    assert selection.to_dict()["chosen"] == selection.chosen
