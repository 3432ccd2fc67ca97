"""What cuDNN compiled for a chosen candidate: kept, restored, and not believed where spoiled.

All of it runs on the CPU: the GPU is pretended, and so is what cuDNN compiles.
"""

from __future__ import annotations

import logging
import os
import shutil
import stat
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import dgrad
from dgrad import _folders, _kernels, _loader, _runner, config, log, store
from dgrad._runner import Runner
from dgrad.exceptions import cudnn_error
from fake_cudnn import (
    FakeEngine,
    FakePlan,
    FakeResult,
    StoredCore,
    W,
    X,
    Y,
    compute,
    fake_times,
    names,
    real_problem,
)
from stored import a_fifo, a_folder, a_link

_CORE, _REASON = _loader.load()
pytestmark = pytest.mark.skipif(_CORE is None, reason=str(_REASON))

PLAIN, FUSED, ROWS = "convolution:eng1", "convolution_bias:eng2", "bias_rows:eng3"
PASS = f"{PLAIN} + {ROWS}"
BIAS = torch.tensor([1.0, 2.0])
BIASED = None if _CORE is None else real_problem(x=(2, 2, 7, 9), w=(4, 2, 3, 3), bias=True)
REFUSED = cudnn_error(3000, "not supported", "cudnnBackendFinalize", "")


@pytest.fixture(autouse=True)
def folder(own_store: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the store that a pretended GPU has."""
    properties = SimpleNamespace(name="NVIDIA Pretended 1", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(log, "_warned", {})
    monkeypatch.setattr(_kernels, "_refused", set())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    return own_store / f"NVIDIA-Pretended-1_sm90_cudnn-{_loader.cudnn_version()}_v3"


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> StoredCore:
    """A core that compiles for the engines which take a bias."""
    core = StoredCore(FakeResult("ALGO_1", "FMA_MATH"))
    core.engines = {
        "convolution": [FakeEngine("eng1", ["TENSOR_CORE"])],
        "convolution_bias": [FakeEngine("eng2", ["TENSOR_CORE"])],
        "bias_rows": [FakeEngine("eng3")],
    }
    core.compiling = {FUSED, ROWS}
    core.begin(monkeypatch)
    compute(core, X)
    return core


def run(core: StoredCore) -> dgrad.Selection:
    """Run a biased problem as another process would."""
    dgrad.plan_cache.clear()
    core.planned.clear()
    core.restored.clear()
    core.ran.clear()
    X.zero_()
    Runner(BIASED, config.policy(dgrad.Flags(selection="measure"))).run(X, W, Y, BIAS)
    assert X[0, :, 0, 0].tolist() == pytest.approx([4.0, 5.0])
    (selection, *_), *_ = dgrad.selections()
    return selection


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kernels"))


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def choose(core: StoredCore, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a plan be the fastest, and measure."""
    times: dict[str, float | None] = dict.fromkeys((PLAIN, "ALGO_1", FUSED, PASS), 2.0)
    times |= {PASS: 1.8, "ALGO_1": 1.9} if name.startswith("ALGO_1 ") else {}
    times[name] = 1.0
    fake_times(core, monkeypatch, times)
    run(core)
    assert names(core)[-1] == name


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


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def huge(file: Path) -> None:
    with file.open("r+b") as stream:
        stream.truncate(1 << 32)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def garbage(file: Path) -> None:
    file.write_bytes(os.urandom(5000))


def no_json(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:32] + b"[" * 100_000)


@pytest.mark.parametrize(
    "spoil", [truncate, flip, a_link, a_fifo, a_folder, huge, empty, garbage, no_json]
)
def test_a_spoiled_file_is_a_miss_with_one_warning(
    core: StoredCore,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], None],
) -> None:
    choose(core, monkeypatch, FUSED)
    (file,) = kept(folder)
    spoil(file)
    run(core)
    assert names(core) == [FUSED]
    assert core.restored == []
    assert tuple(FUSED.split(":")) in core.planned
    text, *others = warned(caplog)
    assert str(file) in text
    if spoil is a_folder:  # which stays where it is
        assert "Is a directory" in others.pop()
    else:
        run(core)
        assert core.restored == [FUSED], "the file was replaced"
    assert not others
    assert len(warned(caplog)) == 1 + (spoil is a_folder)


def test_a_file_of_another_problem_or_candidate_is_a_miss(
    core: StoredCore,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    choose(core, monkeypatch, FUSED)
    (file,) = kept(folder)
    selection = dgrad.selections()[0][0]
    right = (BIASED, selection.candidate)
    assert _kernels._read(file, *right) == [FUSED.encode()]
    another = next(c for c in selection.candidates if c.bias == "eng3")
    for of in ((real_problem(), selection.candidate), (BIASED, another)):
        other = _kernels._file(*of)
        assert other is not None
        shutil.copy(file, other)
        assert _kernels._read(other, *of) == []
    assert len(warned(caplog)) == 2
    with monkeypatch.context() as patch:
        gpu = SimpleNamespace(name="NVIDIA Pretended 2", major=9, minor=0)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        (folder.parent / _folders.folder_name(0)).mkdir(mode=0o700)
        elsewhere = _kernels._file(*right)
        assert elsewhere is not None
        shutil.copy(file, elsewhere)
        assert _kernels._read(elsewhere, *right) == []
    assert len(warned(caplog)) == 3
    assert _kernels._read(file, *right) == [FUSED.encode()]
    later = SimpleNamespace(__version__="of another graph")
    monkeypatch.setattr(_kernels, "_loader", SimpleNamespace(require=lambda: later))
    assert _kernels._read(file, *right) == []


def test_what_cudnn_does_not_restore_is_made_anew(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose(core, monkeypatch, FUSED)
    core.unrestorable[FUSED] = REFUSED
    for _ in range(2):
        run(core)
        assert names(core) == [FUSED]
        assert core.restored == [FUSED]
        assert tuple(FUSED.split(":")) in core.planned
    (text,) = warned(caplog)
    assert "cannot be restored" in text
    assert "not supported" in text
    core.unrestorable.clear()
    run(core)
    assert core.planned == []


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


def test_kernels_that_do_not_run_are_compiled_once_more(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose(core, monkeypatch, FUSED)
    failed = []

    def execute(plan: FakePlan, *arguments: int) -> None:
        if plan.name == FUSED and core.restored and not failed:
            failed.append(plan)
            raise cudnn_error(5000, "no such kernel", "cudnnBackendExecute", "")
        real(plan, *arguments)

    real = FakePlan.execute
    monkeypatch.setattr(FakePlan, "execute", execute)
    run(core)
    assert len(failed) == 1
    assert names(core) == [FUSED]
    assert tuple(FUSED.split(":")) in core.planned
    (text,) = warned(caplog)
    assert "no such kernel" in text
    run(core)
    assert core.planned == [], "the file was replaced"


def test_each_thread_compiles_once_more_where_restored_kernels_do_not_run(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(core, monkeypatch, FUSED)
    dgrad.plan_cache.clear()
    policy = config.policy(dgrad.Flags(selection="measure"))
    runners = [Runner(BIASED, policy) for _ in range(2)]
    for runner in runners:
        runner.run(X, W, Y, BIAS)
    assert core.restored[-2:] == [FUSED] * 2
    plans, real = [runner._plan for runner in runners], FakePlan.execute

    def execute(plan: FakePlan, *arguments: int) -> None:
        if any(plan is each for each in plans):
            raise cudnn_error(5000, "no such kernel", "cudnnBackendExecute", "")
        real(plan, *arguments)

    monkeypatch.setattr(FakePlan, "execute", execute)
    for runner in runners:
        runner.run(X, W, Y, BIAS)
        assert names(core)[-1] == FUSED


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


def test_where_a_bad_file_cannot_be_replaced_it_is_not_used_again(
    core: StoredCore,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    choose(core, monkeypatch, FUSED)
    garbage(kept(folder)[0])
    monkeypatch.setattr(store, "put", lambda *_: os.open(folder, os.O_WRONLY))  # EISDIR
    for _ in range(2):
        run(core)
        assert names(core) == [FUSED]
        assert core.restored == []
    assert len(warned(caplog)) == 2  # of the file, and of the store


@pytest.mark.parametrize(
    "packed",
    [
        b"garbage",
        zlib.compress(b"[1]"),
        zlib.compress(b"7"),
        zlib.compress(b"[" * 100_000),
        zlib.compress('["\u4e00"]'.encode()),
        zlib.compress(b'["' + b"a" * (20 << 20) + b'"]'),
    ],
    ids=["no zlib", "a number", "no list", "deep", "no bytes", "a bomb"],
)
def test_what_dgrad_would_not_have_packed_is_a_miss(
    core: StoredCore,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    packed: bytes,
) -> None:
    choose(core, monkeypatch, FUSED)
    (file,) = kept(folder)
    candidate = dgrad.selections()[0][0].candidate
    file.write_bytes(_kernels._digest(BIASED, candidate, packed) + packed)
    run(core)
    assert (names(core), core.restored) == ([FUSED], [])
    (text,) = warned(caplog)
    assert "is not what dgrad packs" in text
    run(core)
    assert core.restored == [FUSED], "it was replaced"


def test_a_candidate_that_does_not_run_either_way_is_rejected(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(core, monkeypatch, FUSED)
    core.failing[FUSED] = cudnn_error(5000, "no such kernel", "cudnnBackendExecute", "")
    run(core)
    assert core.attempts[-3:-1] == [FUSED] * 2
    assert names(core) != [FUSED]


def test_a_capture_says_nothing_of_kernels(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    choose(core, monkeypatch, FUSED)
    core.unrestorable[FUSED] = cudnn_error(4004, "no memory", "cudnnCreate", "")
    dgrad.plan_cache.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    candidate = store.read(BIASED)
    assert candidate is not None
    fused = next(c for c in candidate if c.bias == "fused")
    with pytest.raises(dgrad.CudnnError, match="no memory"):
        _kernels.make_plan(BIASED, fused)
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


def test_the_native_module_refuses_what_it_did_not_give() -> None:
    assert _CORE is not None
    for text in (b"", b"120 119 {}", b"\n{}", b"no such thing\n{}", b"7 120\n{}", b"9" * 30):
        with pytest.raises(ValueError, match="compiled"):
            _CORE.restored_plan(0, text)


def test_too_large_a_text_is_not_kept(
    core: StoredCore, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(_kernels, "_MAX_BYTES", 20)
    choose(core, monkeypatch, FUSED)
    assert not kept(folder)
