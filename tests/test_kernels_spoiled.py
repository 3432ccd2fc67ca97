"""Kept kernels that are spoiled, of something else or do not run: not believed, and made anew.

All of it runs on the CPU: the GPU is pretended, and so is what cuDNN compiles.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import dgrad
import kernels
from dgrad import _folders, _kernels, _loader, config, store
from dgrad._runner import Runner
from dgrad.exceptions import cudnn_error
from fake_cudnn import FakePlan, StoredCore, W, X, Y, names, real_problem
from fake_device import pretend_name
from kernels import BIAS, BIASED, FUSED, MARKS, REFUSED, choose, kept, run, warned
from stored import a_fifo, a_folder, a_link

_CORE, _ = _loader.load()
pytestmark = MARKS
core = kernels.core


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


def head_alone(file: Path) -> None:
    file.write_bytes(b"\n".join(file.read_bytes().split(b"\n")[:2]) + b"\n")


@pytest.mark.parametrize(
    "spoil", [truncate, flip, a_link, a_fifo, a_folder, huge, empty, garbage, head_alone]
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
        assert other in _kernels._refused
    (text,) = warned(caplog)
    assert text.endswith("; this is told of the first one only")
    with monkeypatch.context() as patch:
        pretend_name(patch, "NVIDIA Pretended 2")
        (folder.parent / _folders.folder_name(0)).mkdir(mode=0o700)
        elsewhere = _kernels._file(*right)
        assert elsewhere is not None
        shutil.copy(file, elsewhere)
        assert _kernels._read(elsewhere, *right) == []
        assert elsewhere in _kernels._refused
    assert len(warned(caplog)) == 1
    assert _kernels._read(file, *right) == [FUSED.encode()]


def of_another_version(file: Path) -> None:
    first, _, rest = file.read_bytes().partition(b"\n")
    file.write_bytes(first.replace(b" kernels", b".1 kernels") + b"\n" + rest)


def of_the_first_container(file: Path) -> None:
    file.write_bytes(os.urandom(32) + zlib.compress(json.dumps([FUSED]).encode(), 1))


@pytest.mark.parametrize("make", [of_another_version, of_the_first_container])
def test_what_another_version_has_kept_is_replaced_in_silence(
    core: StoredCore,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    make: Callable[[Path], None],
) -> None:
    choose(core, monkeypatch, FUSED)
    (file,) = kept(folder)
    before = file.read_bytes()
    make(file)
    run(core)
    assert (names(core), core.restored) == ([FUSED], [])
    assert file.read_bytes() == before
    run(core)
    assert core.restored == [FUSED]
    assert not warned(caplog)


def test_a_thousand_spoiled_files_cost_one_warning(
    core: StoredCore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.mkdir(parents=True, mode=0o700)
    candidate = dgrad.Candidate("graph", "eng1+identity", "FMA_MATH", True, 0)
    for size in range(1, 1001):
        problem = real_problem(size)
        file = _kernels._file(problem, candidate)
        assert file is not None
        garbage(file)
        assert _kernels._read(file, problem, candidate) == []
    assert len(warned(caplog)) == 1


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
    "body",
    [
        b"",
        b"garbage",
        b"\n",
        b"0\n",
        b"1 x\nab",
        b"3\nab",
        b"1\nab",
        b"9" * 5000 + b"\n",
        b"\xff\n",
    ],
    ids=ascii,
)
def test_what_dgrad_would_not_have_joined_is_a_miss(
    core: StoredCore,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    body: bytes,
) -> None:
    choose(core, monkeypatch, FUSED)
    (file,) = kept(folder)
    candidate = dgrad.selections()[0][0].candidate
    head = _kernels._head(BIASED)
    file.write_bytes(head + _kernels._digest(BIASED, candidate, body) + body)
    run(core)
    assert (names(core), core.restored) == ([FUSED], [])
    assert len(warned(caplog)) == 1
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
    core.unrestorable[FUSED] = cudnn_error(4004, "no memory", "cudnnBackendFinalize", "")
    dgrad.plan_cache.clear()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    candidate = store.read(BIASED)
    assert candidate is not None
    fused = next(c for c in candidate if c.bias == "fused")
    with pytest.raises(dgrad.CudnnError, match="no memory"):
        _kernels.make_plan(BIASED, fused)
    assert not warned(caplog)


def test_the_native_module_refuses_what_it_did_not_give() -> None:
    assert _CORE is not None
    for text in (b"", b"120 119 {}", b"\n{}", b"no such thing\n{}", b"7 120\n{}", b"9" * 30):
        with pytest.raises(ValueError, match="compiled"):
            _CORE.restored_plan(0, text)
