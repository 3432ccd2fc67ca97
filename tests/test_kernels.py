"""What cuDNN compiled for a chosen candidate: kept, restored, and forgotten.

All of it runs on the CPU: the GPU is pretended, and so is what cuDNN compiles.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import dgrad
import kernels
from dgrad import _kernels, _runner, config, store
from dgrad._runner import Runner
from fake_cudnn import FakePlan, StoredCore, W, X, Y, names, real_problem
from kernels import BIAS, BIASED, FUSED, MARKS, PASS, REFUSED, ROWS, choose, kept, run, warned

pytestmark = MARKS
core = kernels.core


@pytest.mark.parametrize(
    ("name", "compiled"), [(FUSED, FUSED), (PASS, ROWS), (f"ALGO_1 + {ROWS}", ROWS)]
)
def test_what_was_compiled_for_the_chosen_one_is_not_compiled_again(
    core: StoredCore,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    compiled: str,
) -> None:
    choose(core, monkeypatch, name)
    (file,) = kept(folder)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    before = file.stat().st_mtime_ns
    assert run(core).source == "stored"
    assert names(core) == [name]
    assert core.restored == [compiled]
    assert tuple(compiled.split(":")) not in core.planned
    assert kept(folder) == [file]
    assert file.stat().st_mtime_ns == before
    assert not warned(caplog)


def test_nothing_is_kept_of_a_candidate_that_is_not_compiled(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    choose(core, monkeypatch, "ALGO_1")
    assert len(list(folder.glob("*.json"))) == 1
    assert not kept(folder)


def test_nothing_is_kept_or_read_where_the_store_is_off(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch, own_store: Path
) -> None:
    monkeypatch.setenv("DGRAD_STORE", "off")
    choose(core, monkeypatch, FUSED)
    run(core)
    assert core.restored == []
    assert not own_store.exists()


def test_a_cudnn_that_gives_no_text_costs_a_warning(
    core: StoredCore,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refuse(_plan: object) -> list[bytes]:
        raise REFUSED

    monkeypatch.setattr(FakePlan, "compiled", property(refuse, lambda *_: None), raising=False)
    choose(core, monkeypatch, FUSED)
    assert not kept(folder)
    (text,) = warned(caplog)
    assert "not supported" in text


def test_a_folder_that_cannot_be_written_costs_a_warning(
    core: StoredCore,
    monkeypatch: pytest.MonkeyPatch,
    own_store: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    own_store.write_text("a file, and no folder")
    choose(core, monkeypatch, FUSED)
    (text,) = warned(caplog)
    assert "selections are not stored" in text


def test_forget_removes_it_and_export_leaves_it_out(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    choose(core, monkeypatch, FUSED)
    store.export(tmp_path / "all.json")
    assert len(kept(folder)) == 1
    assert b"convolution_bias" not in (tmp_path / "all.json").read_bytes()
    assert store.forget("no such problem") == 0
    assert len(kept(folder)) == 1
    assert store.forget("x=2x2x7x9") == 1
    assert list(folder.iterdir()) == []
    choose(core, monkeypatch, FUSED)
    assert store.forget() == 1
    assert list(folder.iterdir()) == []
    assert store.load(tmp_path / "all.json") == 1
    assert not kept(folder)


def test_forget_removes_spoiled_kernels_with_their_entry(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    choose(core, monkeypatch, FUSED)
    kept(folder)[0].write_bytes(b"of no problem")
    assert store.forget("dgrad+bias") == 1
    assert not kept(folder)


def test_forget_finds_the_problem_of_kernels_that_have_no_entry(
    core: StoredCore, folder: Path
) -> None:
    for layout in ("nchw", "nhwc"):
        problem = real_problem(x=(2, 2, 7, 9), w=(4, 2, 3, 3), bias=True, layout=layout)
        candidate = dgrad.Candidate("graph", "eng2", "FMA_MATH", True, 0, bias="fused")
        _kernels.keep(problem, candidate, FakePlan(core, FUSED, 0, compiled=[b"text"]))
    assert len(kept(folder)) == 2
    assert store.list() == []
    assert store.forget("nch") == 0
    assert len(kept(folder)) == 2
    assert store.forget("nhwc x=2x2x7x9") == 0
    (left,) = kept(folder)
    assert b" nchw " in left.read_bytes()
    assert store.forget("dgrad") == 0
    assert not kept(folder)


def test_what_a_killed_process_left_goes(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    choose(core, monkeypatch, FUSED)
    (file,) = kept(folder)
    left = folder / f".{file.name}.{'0' * 16}.tmp"
    left.touch()
    an_hour_ago = time.time() - 3700
    os.utime(left, (an_hour_ago, an_hour_ago))
    monkeypatch.setattr(store, "_swept", set())
    file.unlink()
    run(core)
    assert kept(folder) == [file]
    assert not left.exists()


def test_nothing_is_kept_before_it_has_run(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    core.failing[FUSED] = REFUSED
    runner = Runner(BIASED, config.policy(dgrad.Flags(algorithm="graph:eng2")))
    with pytest.raises(dgrad.NotSupportedError):
        runner.run(X, W, Y, BIAS)
    assert core.attempts == [FUSED]
    assert not kept(folder)


def test_what_was_not_measured_is_kept_too_in_a_store_that_is_not_there_yet(
    core: StoredCore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    policy = config.policy(dgrad.Flags(algorithm="graph:eng2"))
    for times in (0, 1):
        dgrad.plan_cache.clear()
        Runner(BIASED, policy).run(X, W, Y, BIAS)
        assert core.restored == [FUSED] * times
        assert len(kept(folder)) == 1
    assert not warned(caplog)


@pytest.mark.parametrize("name", ["ALGO_1", FUSED, PASS])
def test_a_plan_that_was_compiled_and_captured_is_kept_for_its_graphs(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """See Note [Captured] in src/plan.hpp."""
    choose(core, monkeypatch, name)
    run(core)
    assert core.kept_for_graphs == []
    runner = Runner(BIASED, config.policy(dgrad.Flags(selection="measure")))
    runner.run(X, W, Y, BIAS)
    monkeypatch.setattr(_runner, "_loader", SimpleNamespace(require=lambda: core))
    cuda = vars(_runner)["torch"].cuda
    monkeypatch.setattr(cuda, "is_current_stream_capturing", lambda: True)
    runner.run(X, W, Y, BIAS)
    assert core.kept_for_graphs == ([] if name == "ALGO_1" else [name])


def test_too_large_a_text_is_not_kept(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(_kernels, "_MAX_BYTES", 20)
    choose(core, monkeypatch, FUSED)
    assert not kept(folder)
