"""Entries of the store that are well formed and withhold what can run: cuDNN is asked all the same.

cuDNN's part is played by a fake: its answers are the premise here, not what is tested.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dgrad
from dgrad import _loader, config, store
from dgrad._call import call_for
from dgrad._check import WRONG
from dgrad._geometry import Geometry
from dgrad._knowledge import Knowledge, knowledge_of
from dgrad._runner import Runner
from dgrad._stored import UNNAMED
from dgrad._watch import watching
from fake_cudnn import (
    FakeCore,
    FakeEngine,
    FakeResult,
    W,
    X,
    Y,
    fake_times,
    names,
)

TIMES: dict[str, float | None] = {"convolution:eng1": 5.0, "convolution:eng2": 4.0, "ALGO_1": 3.0}
Warnings = Callable[[], list[str]]


class StoredCore(FakeCore):
    """Notes for which precision it is asked for engines."""

    asked: list[bool]

    def Problem(self, **fields: Any) -> Any:
        return _loader.require().Problem(**fields)

    def graph_heuristic(self, problem: Any, operation: str) -> tuple[list[FakeEngine], list[str]]:
        if operation == "convolution":
            self.asked.append(problem.tf32)
        return super().graph_heuristic(problem, operation)


@pytest.fixture(autouse=True)
def core(folder: Path, monkeypatch: pytest.MonkeyPatch) -> StoredCore:
    native, reason = _loader.load()
    if native is None:
        pytest.skip(f"the native module cannot be used: {reason}")
    core = StoredCore(FakeResult("ALGO_1", "FMA_MATH", workspace_bytes=100))
    core.asked = []
    core.engines = {"convolution": [FakeEngine("eng1"), FakeEngine("eng2", ["NONDETERMINISTIC"])]}
    core.begin(monkeypatch)
    fake_times(core, monkeypatch, TIMES)
    return core


@pytest.fixture
def warned(caplog: pytest.LogCaptureFixture) -> Warnings:
    def texts() -> list[str]:
        return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]

    return texts


def problem(tf32: bool = True) -> Any:
    fields: dict[str, Any] = {
        "direction": "dgrad", "dtype": "float32", "tf32": tf32, "layout": "nchw",
        "x": X.shape, "w": W.shape, "y": Y.shape, "padding": (0, 0), "stride": (2, 2),
        "dilation": (1, 1), "groups": 1, "bias": False, "alignment": 16, "device": 0,
    }  # fmt: skip
    return _loader.require().Problem(**fields)


def select(tf32: bool = True, **flags: Any) -> dgrad.Selection:
    """What runs, as explain says it."""
    policy = config.policy(dgrad.Flags(**{"selection": "measure", **flags}))
    with watching() as events:
        Runner(problem(tf32), policy).run(X, W, Y)
    (selection,) = events
    assert isinstance(selection, dgrad.Selection)
    return selection


def restart(core: StoredCore) -> None:
    """As another process that finds the same store."""
    dgrad.plan_cache.clear()
    core.asked.clear()
    core.ran.clear()


def candidate(algorithm: str, **fields: Any) -> dgrad.Candidate:
    provider = "graph" if algorithm.startswith("eng") else "legacy"
    usual = {"math_type": "FMA_MATH", "deterministic": True, "workspace_bytes": 0}
    return dgrad.Candidate(provider, algorithm, **{**usual, **fields})


def entry(tf32: bool = True) -> Path:
    return Path(store.entry_of(problem(tf32)))


UNKNOWN = (candidate("eng999", time_ms=0.001),)
UNSURE = (candidate("eng2", deterministic=False, time_ms=4.5),)
REFUSED = (
    *UNSURE,
    candidate("eng1", rejected="it is out of fashion"),
    candidate("ALGO_1", rejected="it is out of fashion", workspace_bytes=100),
)
BAD = [
    (UNKNOWN, {}),
    (UNKNOWN, {"selection": "heuristic"}),
    (UNKNOWN, {"deterministic": True}),
    (UNKNOWN, {"algorithm": "legacy:ALGO_1"}),
    (UNKNOWN, {"algorithm": "graph"}),
    (UNSURE, {"deterministic": True}),
    (UNSURE, {"deterministic": True, "selection": "heuristic"}),
    (UNSURE, {"algorithm": "legacy:ALGO_1"}),
    (UNSURE, {"algorithm": ["legacy:ALGO_1", "graph"]}),
    (UNSURE, {"algorithm": "legacy"}),
    (REFUSED, {"deterministic": True}),
    (REFUSED, {"algorithm": "legacy:ALGO_1"}),
    ((candidate("eng1", deterministic=False), candidate("ALGO_1", deterministic=False)),
     {"deterministic": True}),
    ((candidate("eng1", workspace_bytes=2**60),), {"workspace_limit": 50}),
    (tuple(candidate(f"eng{n}") for n in range(900, 1156)), {}),
]  # fmt: skip


@pytest.mark.parametrize("tf32", [True, False])
@pytest.mark.parametrize(("stored", "flags"), BAD, ids=range(len(BAD)))
def test_what_an_entry_withholds_runs_as_if_nothing_were_stored(
    core: StoredCore,
    warned: Warnings,
    stored: tuple[dgrad.Candidate, ...],
    flags: dict[str, Any],
    tf32: bool,
) -> None:
    clean = select(tf32, **flags).candidate
    store.forget()
    store.write(problem(tf32), stored)
    file = entry(tf32)
    restart(core)
    selection = select(tf32, **flags)
    assert selection.candidate.name == clean.name
    assert core.asked.count(tf32) == 1
    assert [str(file) in text for text in warned()] == [True]
    content = file.read_text()
    assert "eng999" not in content
    assert len(json.loads(content)["candidates"]) == 3
    restart(core)
    assert select(tf32, **flags).candidate.name == clean.name
    assert core.asked == []
    assert len(warned()) == 1


def test_times_that_are_known_stay(core: StoredCore) -> None:
    times = {"time_ms": 1.5, "device_ms": 1.25}
    store.write(problem(), [candidate("eng2", deterministic=False, **times), *UNKNOWN])
    selection = select(deterministic=True)
    assert [(c.algorithm, c.time_ms) for c in selection.candidates] == [
        ("eng2", 1.5), ("eng999", 0.001), ("eng1", 5.0), ("ALGO_1", 3.0),
    ]  # fmt: skip
    assert selection.verdicts()[1].startswith("rejected: cuDNN does not name it")
    assert [(c.algorithm, c.time_ms) for c in store.read(problem()) or []] == [
        ("eng2", 1.5), ("eng1", 5.0), ("ALGO_1", 3.0),
    ]  # fmt: skip
    assert (store.read(problem()) or [])[0].device_ms == 1.25


@pytest.mark.parametrize(("stored", "flags"), BAD, ids=range(len(BAD)))
def test_the_whole_call_runs_on_cudnn(
    core: StoredCore,
    monkeypatch: pytest.MonkeyPatch,
    stored: tuple[dgrad.Candidate, ...],
    flags: dict[str, Any],
) -> None:
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    store.write(problem(), stored)
    geometry = Geometry((0, 0), (2, 2), (1, 1), 1)
    for fallback in ("pytorch", "error"):
        restart(core)
        wanted = dgrad.Flags(**{**flags, "fallback": fallback, "allow_tf32": True})
        with watching() as events:
            out = call_for("dgrad", Y, W, geometry, (7, 7), wanted)(Y, W)
        assert out.shape == X.shape
        (selection,) = events
        assert isinstance(selection, dgrad.Selection)
        assert core.ran


def test_what_cannot_run_here_is_asked_for_once_and_spoils_no_entry(
    core: StoredCore, warned: Warnings
) -> None:
    select()
    file = entry()
    before = file.read_bytes()
    restart(core)
    for flags in ({"algorithm": "legacy:ALGO_9"}, {"algorithm": "graph:eng999"}) * 2:
        with pytest.raises(dgrad.NotSupportedError):
            select(**flags)
    assert core.asked == [True]
    select()
    select(algorithm=["legacy:ALGO_9", "graph"])
    assert core.asked == [True]
    assert warned() == []
    assert file.read_bytes() == before


def test_where_something_can_run_cudnn_is_not_asked(core: StoredCore, warned: Warnings) -> None:
    store.write(problem(), UNSURE)
    assert select().candidate.algorithm == "eng2"
    assert select(algorithm="graph").candidate.algorithm == "eng2"
    assert core.asked == []
    assert warned() == []


def test_what_gave_a_wrong_result_once_is_not_tried_again(core: StoredCore) -> None:
    wrong = candidate("eng1", rejected=f"{WRONG}: 3 apart (relative norm)")
    store.write(problem(), [*UNSURE, wrong])
    assert select(deterministic=True).candidate.algorithm == "ALGO_1"
    with pytest.raises(dgrad.NotSupportedError, match=WRONG):
        select(algorithm="graph:eng1")


def test_what_fails_all_the_same_says_why(core: StoredCore, warned: Warnings) -> None:
    store.write(problem(), REFUSED)
    core.unplannable["ALGO_1"] = dgrad.exceptions.cudnn_error(3000, "cuDNN's own words", "f", "")
    with pytest.raises(dgrad.NotSupportedError, match="cuDNN's own words"):
        select(algorithm="legacy:ALGO_1")
    assert warned() == []


def test_an_entry_is_replaced_where_the_next_one_had_to_run(
    core: StoredCore, warned: Warnings
) -> None:
    store.write(problem(), UNKNOWN)
    failure = dgrad.exceptions.cudnn_error(3000, "it fails when it runs", "f", "")
    core.failing["convolution:eng1"] = failure
    assert select(selection="heuristic", deterministic=True).candidate.algorithm == "ALGO_1"
    assert len(warned()) == 1
    restart(core)
    assert select(selection="heuristic", deterministic=True).candidate.algorithm == "ALGO_1"
    assert core.asked == []


def test_what_the_entry_of_the_other_precision_refuses_runs_too(
    core: StoredCore, warned: Warnings
) -> None:
    store.write(problem(tf32=True), REFUSED)
    file = entry()
    assert select(tf32=False, deterministic=True).candidate.algorithm == "ALGO_1"
    assert [str(file) in text for text in warned()] == [True]
    assert len(store.list()) == 2


def test_an_entry_that_came_later_is_doubted_too(core: StoredCore, warned: Warnings) -> None:
    select(selection="heuristic")  # the candidates are known, and have no times
    store.write(problem(), REFUSED)
    assert select().candidate.algorithm == "eng2"  # with what was stored meanwhile
    assert select(deterministic=True).candidate.algorithm == "ALGO_1"
    assert core.asked == [True, True]
    assert len(warned()) == 1


def test_threads_that_doubt_at_once_ask_once_and_all_run(
    core: StoredCore, warned: Warnings
) -> None:
    store.write(problem(), UNKNOWN)
    ready = threading.Barrier(8)
    ran: list[str] = []
    policy = config.policy(dgrad.Flags(selection="measure", deterministic=True))

    def work() -> None:
        runner = Runner(problem(), policy)
        ready.wait()
        runner.run(X, W, Y)
        ran.append(runner.selection().candidate.algorithm)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran == ["ALGO_1"] * 8
    assert names(core) == ["ALGO_1"] * 8
    assert core.asked == [True]
    assert len(warned()) == 1
    assert len(json.loads(entry().read_text())["candidates"]) == 3


def test_who_asked_replaces_the_entry_though_another_runs_first(
    core: StoredCore, warned: Warnings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.write(problem(), UNKNOWN)
    policy = config.policy(dgrad.Flags(selection="measure"))
    first, other = (Runner(problem(), policy) for _ in range(2))
    real = Knowledge.ask_again

    def ask_again(knowledge: Knowledge) -> bool:
        asked = real(knowledge)
        other.run(X, W, Y)
        return asked

    monkeypatch.setattr(Knowledge, "ask_again", ask_again)
    first.run(X, W, Y)
    assert names(core)[-2:] == ["ALGO_1", "ALGO_1"]
    assert len(warned()) == 1
    assert len(json.loads(entry().read_text())["candidates"]) == 3


def test_a_late_failure_does_not_hide_that_cudnn_names_no_such_engine(core: StoredCore) -> None:
    store.write(problem(), UNKNOWN)
    known = knowledge_of(problem())
    (index,) = (i for i, c in enumerate(known.candidates) if c.algorithm == "eng999")
    assert known.ask_again()
    # Another thread had begun to make a plan of it before.
    assert known.reject(index, "no such engine", False).rejected == UNNAMED
    assert known.candidates[index].rejected == UNNAMED
