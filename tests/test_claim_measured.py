"""Of processes and threads that meet a problem at once, one measures it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import dgrad
from claims import MARKS, SHORT_S, TIMES, Child, held_elsewhere, select, slow_times
from dgrad import _claim, _runner, store
from fake_cudnn import (
    FakeEngine,
    FakeResult,
    StoredCore,
    X,
    compute,
    fake_times,
    names,
    real_problem,
)

pytestmark = MARKS


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> StoredCore:
    core = StoredCore(FakeResult("ALGO_1", "FMA_MATH", workspace_bytes=100))
    core.engines = {"convolution": [FakeEngine("eng1"), FakeEngine("eng2", ["NONDETERMINISTIC"])]}
    core.begin(monkeypatch)
    compute(core, X)
    return core


def test_processes_that_meet_a_problem_at_once_measure_it_once(
    core: StoredCore,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slow_times(core, monkeypatch, tmp_path / "measured", 0.1)

    def work(say: Callable[[str], None]) -> None:
        os.close(opened)
        os.read(gate, 1)  # until all are there
        for size in (3, 4, 5):
            selection = select(real_problem(size))
            say(f"{selection.source} {selection.candidate}")

    gate, opened = os.pipe()
    children = [Child(work) for _ in range(4)]
    os.close(gate)
    os.close(opened)
    for _ in range(3):
        heard = sorted(child.hear() for child in children)
        stored = "stored legacy:ALGO_1 (FMA_MATH)"
        assert heard == ["measured legacy:ALGO_1 (FMA_MATH)", stored, stored, stored]
    assert [child.wait() for child in children] == [0] * 4
    assert len((tmp_path / "measured").read_text().splitlines()) == 3
    assert len(store.list()) == len([*folder.iterdir()]) == 3


def test_two_gpus_of_one_name_in_one_process_measure_once(
    core: StoredCore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second is known before the first is measured, and finds it in the store."""
    measured = slow_times(core, monkeypatch, tmp_path / "measured", 0.0)
    monkeypatch.setattr(core, "storage", lambda *_, **__: SimpleNamespace(data_ptr=lambda: 4096))
    monkeypatch.setattr(vars(_runner)["torch"], "UntypedStorage", core.storage)
    select(real_problem(device=1), selection="heuristic")
    assert select(real_problem(device=0)).source == "measured"
    assert select(real_problem(device=1)).source == "stored"
    assert len(measured) == 1


def test_who_waits_in_vain_measures_for_itself(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_claim, "WAIT_S", SHORT_S)
    measured = fake_times(core, monkeypatch, TIMES)
    with held_elsewhere():
        assert select().source == "measured"
    assert len(measured) == 1
    assert store.read(real_problem()) is not None


def test_where_the_store_is_off_everybody_measures(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGRAD_STORE", "off")
    measured = fake_times(core, monkeypatch, TIMES)
    assert select().source == "measured"
    assert len(measured) == 1


def elsewhere(core: StoredCore, **flags: Any) -> None:
    """Select in another process."""
    assert Child(lambda say: select(**flags)).wait() == 0


def test_what_another_process_stored_is_taken_over(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = fake_times(core, monkeypatch, TIMES)
    assert select(selection="heuristic").source == "heuristic"  # known, and without times
    elsewhere(core)
    selection = select()
    assert measured == []
    assert selection.source == "stored"
    assert selection.candidate.name == "legacy:ALGO_1"
    assert [c.time_ms for c in selection.candidates] == [5.0, 4.0, 3.0]
    assert dgrad.selections()[-1][0].source == "stored"


def test_what_another_process_left_out_is_measured(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = fake_times(core, monkeypatch, TIMES)
    select(selection="heuristic")
    elsewhere(core, workspace_limit=99)
    selection = select()
    assert measured == [["ALGO_1"]]
    assert selection.source == "measured"
    assert [c.time_ms for c in selection.candidates] == [5.0, 4.0, 3.0]


def test_what_the_budget_of_another_process_left_out_stays_so(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = {**TIMES, "ALGO_1": None}
    measured = fake_times(core, monkeypatch, times)
    select(selection="heuristic")
    elsewhere(core)
    assert select().source == "stored"
    assert measured == []
    times["ALGO_1"] = 3.0
    assert select(selection="exhaustive").source == "measured"
    assert measured == [["ALGO_1"]]


def test_what_another_process_measured_strictly_is_stored_for_tf32_too(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    core.engines["convolution"] = [FakeEngine("eng1"), FakeEngine("eng2", ["TENSOR_CORE"])]
    measured = fake_times(core, monkeypatch, TIMES)
    assert Child(lambda say: select(real_problem(tf32=False))).wait() == 0
    selections = [select(real_problem(tf32=tf32)) for tf32 in (True, False)]
    assert measured == []
    assert [selection.source for selection in selections] == ["stored"] * 2
    times = [[c.time_ms for c in selection.candidates] for selection in selections]
    assert times == [[5.0, 4.0, 3.0], [5.0, None, 3.0]]


def test_a_selection_of_a_capture_is_announced_anew_when_another_process_has_measured(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_times(core, monkeypatch, TIMES)
    cuda: Any = vars(_runner)["torch"].cuda
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "is_current_stream_capturing", lambda: True)
        assert select().source == "heuristic"
    elsewhere(core)
    assert select().source == "stored"
    assert [s.source for s, _ in dgrad.selections()] == ["heuristic", "stored"]
    assert names(core) == ["convolution:eng1", "ALGO_1"]
