"""What is known of a problem from the store, and from the same problem in the other precision."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

import dgrad
from dgrad import _knowledge, config
from dgrad._knowledge import Knowledge, knowledge_of
from dgrad._runner import Runner
from dgrad._watch import watching
from dgrad.exceptions import TorchOutOfMemoryError, cudnn_error
from dgrad.selection import Candidate
from fake_cudnn import (
    BIAS,
    STRICT,
    FakeEngine,
    FakeProblem,
    FakeResult,
    Start,
    StoredCore,
    W,
    X,
    Y,
    compute,
    fake_times,
    names,
    real_problem,
)
from known import CANDIDATES, known


@pytest.fixture
def stored(folder: Path, monkeypatch: pytest.MonkeyPatch) -> StoredCore:
    """A store of the test's own, and engines of which some are fast."""
    core = StoredCore(FakeResult("ALGO_1", "FMA_MATH", workspace_bytes=100))
    core.engines = {
        "convolution": [FakeEngine("eng1_k2=3"), FakeEngine("eng2", ["NONDETERMINISTIC"])],
        "convolution_identity": [FakeEngine("eng3")],
        "convolution_bias": [FakeEngine("eng4")],
        "bias_rows": [FakeEngine("eng5_k24=4", workspace_bytes=300)],
    }
    core.begin(monkeypatch)
    compute(core, X)
    return core


TIMES: dict[str, float | None] = {
    "convolution:eng1_k2=3": 5.0,
    "convolution:eng2": 4.0,
    "ALGO_1": 6.0,
    "convolution_identity:eng3": 3.0,
    "convolution_bias:eng4": 4.5,
    "convolution:eng1_k2=3 + bias_rows:eng5_k24=4": 4.4,
    "convolution:eng2 + bias_rows:eng5_k24=4": 3.4,
}


def run_one(bias: bool, **flags: Any) -> dgrad.Selection:
    """What ran, as explain says it."""
    policy = config.policy(dgrad.Flags(**{"selection": "measure", **flags}))
    with watching() as events:
        Runner(real_problem(tf32=False, bias=bias), policy).run(X, W, Y, BIAS)
    (selection,) = events
    assert isinstance(selection, dgrad.Selection)
    return selection


def test_a_choice_is_a_stored_one_where_another_look_timed_nothing(
    stored: StoredCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = fake_times(stored, monkeypatch, TIMES | {"ALGO_1": None})
    assert run_one(False).source == "measured"
    dgrad.plan_cache.clear()
    stored.failing["ALGO_1"] = TorchOutOfMemoryError("no room")
    assert run_one(False, selection="exhaustive").source == "stored"
    assert measured[1] == []


@pytest.mark.parametrize(
    ("bias", "fastest"),
    [(False, "convolution_identity:eng3"), (True, "convolution:eng2 + bias_rows:eng5_k24=4")],
)
def test_what_was_measured_runs_again_without_measuring(
    stored: StoredCore, monkeypatch: pytest.MonkeyPatch, bias: bool, fastest: str
) -> None:
    measured = fake_times(stored, monkeypatch, TIMES)
    first = run_one(bias)
    assert [*chain(*measured)][-1] == fastest
    measured.clear()
    stored.planned.clear()
    dgrad.plan_cache.clear()  # as a new process
    monkeypatch.setattr(stored, "graph_heuristic", lambda *_: pytest.fail("cuDNN was asked"))
    monkeypatch.setattr(stored, "legacy_heuristic", lambda *_: pytest.fail("cuDNN was asked"))
    again = run_one(bias)
    assert measured == []
    assert names(stored) == [fastest] * 2
    assert (first.source, again.source) == ("measured", "stored")
    assert again.candidates == first.candidates
    assert again.chosen == first.chosen
    assert len(stored.planned) == 1 + bias
    assert run_one(bias, deterministic=True).candidate.deterministic
    assert measured == []


def entry_of(root: Path) -> tuple[Path, Any]:
    (file,) = root.rglob("*.json")
    return file, json.loads(file.read_text())


def test_a_stored_engine_that_says_otherwise_of_itself_does_not_run(
    stored: StoredCore, own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_times(stored, monkeypatch, TIMES)
    run_one(False)
    file, entry = entry_of(own_store)
    for candidate in entry["candidates"]:  # what a file may say of an engine that rounds to tf32
        if candidate["algorithm"] == "eng1_k2=3":
            candidate["time_ms"] = 0.001
    file.write_text(json.dumps(entry))
    stored.engines["convolution"] = [FakeEngine("eng1_k2=3", ["TENSOR_CORE"]), FakeEngine("eng2")]
    dgrad.plan_cache.clear()
    selection = run_one(False)
    assert names(stored) == ["convolution_identity:eng3"] * 2
    verdicts = {
        c.algorithm: v for c, v in zip(selection.candidates, selection.verdicts(), strict=True)
    }
    assert verdicts["eng1_k2=3"].startswith("rejected: it may round float32 to tf32")
    assert selection.source == "stored"


@pytest.mark.parametrize("field", ["algorithm", "bias"])
def test_a_stored_engine_that_cudnn_does_not_know_does_not_run(
    stored: StoredCore, own_store: Path, monkeypatch: pytest.MonkeyPatch, field: str
) -> None:
    fake_times(stored, monkeypatch, TIMES)
    fastest = run_one(True).chosen
    file, entry = entry_of(own_store)
    entry["candidates"][fastest][field] = "eng999_k1=2"
    file.write_text(json.dumps(entry))
    dgrad.plan_cache.clear()
    selection = run_one(True)
    assert selection.source == "stored"
    assert names(stored)[1] == "convolution:eng2"  # the next best
    assert "expected a name such as" in selection.verdicts()[fastest]
    dgrad.plan_cache.clear()
    stored.planned.clear()
    assert run_one(True).verdicts() == selection.verdicts()
    assert not [name for name in stored.planned if "eng999" in str(name)], "the entry tells"


def test_an_entry_of_the_first_format_is_not_read(
    stored: StoredCore, own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = fake_times(stored, monkeypatch, TIMES)
    run_one(False)
    (folder,) = own_store.iterdir()
    assert folder.name.endswith("_v3")
    folder.rename(folder.with_name(folder.name[:-1] + "1"))
    dgrad.plan_cache.clear()
    assert run_one(False).source == "measured"
    assert len(measured) == 2
    assert len(dgrad.store.list()) == 1


FRESH = Candidate("graph", "eng1", "FMA_MATH", True, 0)
TIMED = replace(FRESH, workspace_bytes=512, time_ms=1.0, device_ms=0.5)
SKIPPED = replace(FRESH, skipped=True)
FAILED = replace(FRESH, rejected="it failed")


@pytest.mark.parametrize(
    ("ours", "stored", "kept"),
    [
        (FRESH, TIMED, TIMED),
        (SKIPPED, TIMED, TIMED),
        (replace(TIMED, time_ms=2.0), TIMED, TIMED),  # times of one measuring compare best
        (FAILED, TIMED, FAILED),
        (TIMED, FAILED, FAILED),
        (FRESH, SKIPPED, SKIPPED),
        (TIMED, SKIPPED, TIMED),
        (TIMED, FRESH, TIMED),
        (SKIPPED, FRESH, SKIPPED),
    ],
)
def test_of_what_is_known_and_what_was_stored_the_more_telling_is_kept(
    monkeypatch: pytest.MonkeyPatch, ours: Candidate, stored: Candidate, kept: Candidate
) -> None:
    monkeypatch.setattr(_knowledge.store, "read", lambda of: [stored] if of.tf32 else None)
    for packed in (False, True):
        knowledge = known([ours])
        if packed:
            knowledge.pack()
        knowledge.refresh()
        assert knowledge.candidates == [kept]
        assert knowledge.source == ("measured" if kept == ours else "stored")


def test_what_others_stored_moves_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [replace(FRESH, algorithm=f"eng{i}", bias="add") for i in range(3)]
    stored = [replace(c, time_ms=1.0 + i) for i, c in enumerate(reversed(ours))]
    joined = replace(stored[0], bias="eng7")
    monkeypatch.setattr(_knowledge.store, "read", lambda of: [joined, *stored] if of.tf32 else None)
    knowledge = known(ours)
    knowledge.refresh()
    assert knowledge.candidates == [*reversed(stored), joined]


def test_nothing_stored_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_knowledge.store, "read", lambda problem: None)
    knowledge = known([*CANDIDATES])
    knowledge.refresh()
    assert (knowledge.candidates, knowledge.source) == (CANDIDATES, "measured")


def restart(core: StoredCore) -> None:
    """As another process begins."""
    dgrad.plan_cache.clear()
    core.ran.clear()


def test_a_failure_that_may_not_last_is_not_stored(
    stored: StoredCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest = "convolution_identity:eng3"
    fake_times(stored, monkeypatch, TIMES)
    run_one(bias=False)
    restart(stored)
    stored.failing[fastest] = cudnn_error(5000, "a bad moment", "cudnnBackendExecute", "")
    selection = run_one(bias=False)
    assert str(selection.candidate).startswith("graph:eng2")
    assert "it failed this time: a bad moment" in {c.rejected for c in selection.candidates}
    _knowledge.store.write(selection.problem, knowledge_of(selection.problem).candidates)
    stored.failing.clear()
    restart(stored)
    (again,) = (c for c in run_one(bias=False).candidates if "eng3" in c.algorithm)
    assert (again.rejected, again.skipped) == (None, True)


@pytest.mark.parametrize("provider", ["legacy", "graph"])
def test_a_moment_when_cudnn_could_not_be_asked_is_not_stored(
    stored: StoredCore, monkeypatch: pytest.MonkeyPatch, own_store: Path, provider: str
) -> None:
    fake_times(stored, monkeypatch, TIMES)
    error = cudnn_error(4003, "no memory", "cudnnGet", "")
    engines, results = dict(stored.engines), stored.results
    if provider == "graph":
        stored.engines["convolution"] = error
    else:
        stored.results = error
    run_one(bias=False)
    assert not list(own_store.glob("*/*.json"))
    restart(stored)
    stored.engines, stored.results = engines, results
    assert str(run_one(bias=False).candidate) == "graph:eng3+identity (FMA_MATH)"
    assert len(list(own_store.glob("*/*.json"))) == 1


# --- in the other precision ---------------------------------------------------------------------


def test_what_is_lent_later_moves_no_candidate_and_changes_no_time(start: Start) -> None:
    start(FakeResult("ALGO_0", "FMA_MATH"), FakeResult("ALGO_1", "FMA_MATH"), FakeResult("GEMM"))
    tf32, strict = (knowledge_of(FakeProblem(tf32=tf32)) for tf32 in (True, False))  # type: ignore[arg-type]
    strict.update(0, time_ms=1.0, device_ms=0.5)
    strict.update(1, skipped=True)
    tf32.update(2, time_ms=3.0)
    tf32.refresh()
    strict.update(0, time_ms=2.0)
    tf32.refresh()
    now = [(c.time_ms, c.device_ms, c.skipped) for c in tf32.candidates]
    assert now == [(1.0, 0.5, False), (None, None, True), (3.0, None, False)]


def test_what_was_skipped_where_nothing_got_a_time_is_due_in_the_other_precision(
    start: Start,
) -> None:
    start(FakeResult("ALGO_0", "FMA_MATH"), FakeResult("ALGO_1", "FMA_MATH"))
    strict = knowledge_of(FakeProblem(tf32=False))  # type: ignore[arg-type]
    strict.update(1, skipped=True)
    tf32 = knowledge_of(FakeProblem(tf32=True))  # type: ignore[arg-type]
    assert [c.skipped for c in tf32.candidates] == [False, False]
    tf32.update(0, skipped=True)
    tf32.refresh()
    assert [c.skipped for c in tf32.candidates] == [True, False]


def test_only_what_fails_with_tf32_fails_without_it_too(start: Start) -> None:
    for lender, lent in ((True, "it failed"), (False, None)):
        start(FakeResult("ALGO_0", "FMA_MATH"), FakeResult("ALGO_1", "FMA_MATH"))
        dgrad.plan_cache.clear()
        one, other = (knowledge_of(FakeProblem(tf32=tf32)) for tf32 in (lender, not lender))  # type: ignore[arg-type]
        one.update(0, rejected="it failed")
        one.update(1, rejected="no room", out_of_memory=True)
        other.refresh()
        assert [c.rejected for c in other.candidates] == [lent, None]


def test_what_was_read_from_the_store_stays_in_doubt_when_the_other_precision_lends(
    start: Start, folder: Path
) -> None:
    start(FakeResult("ALGO_1", "FMA_MATH"), FakeResult("ALGO_0", "FMA_MATH"))
    knowledge_of(FakeProblem(tf32=True))  # type: ignore[arg-type]
    listed = Candidate("legacy", "ALGO_1", "FMA_MATH", True, 0, 1.0)
    withheld = Knowledge(STRICT, [listed], "stored")  # type: ignore[arg-type]
    withheld.refresh()
    assert withheld.ask_again()
    assert [c.algorithm for c in withheld.candidates] == ["ALGO_1", "ALGO_0"]
