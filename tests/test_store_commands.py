"""What users ask of the store: list, export, load, forget."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from dgrad import Candidate, _export, _folders, _stored, store
from stored import (
    CANDIDATES,
    HERE,
    MARKS,
    OTHER_CUDNN,
    OTHER_GPU,
    WITH_BIAS,
    content_of,
    make_problem,
    numbered,
    refuse,
    spoiled,
    written,
)

pytestmark = MARKS


def test_list_says_what_is_stored_and_the_fastest(store_root: Path) -> None:
    file = written(store_root)
    assert store.list() == [
        {
            "problem": "dgrad float32/tf32 nchw x=2x8x17x17 w=4x8x3x3 y=2x4x8x8 padding=0,0 "
            "stride=2,2 dilation=1,1 groups=1 alignment=16",
            "best": "legacy:ALGO_1 (TENSOR_OP_MATH)",
            "time_ms": 0.021,
            "folder": HERE,
            "file": str(file),
        }
    ]


def test_list_says_how_the_bias_is_added(store_root: Path) -> None:
    written(store_root, make_problem(bias=True))
    (entry,) = store.list()
    assert entry["problem"].startswith("dgrad+bias float32/tf32 nchw x=2x8x17x17")
    assert entry["best"] == "graph:eng5_k2=3_k24=0 (TENSOR_OP_MATH) with bias"
    assert entry["time_ms"] == 0.6
    assert store.forget("dgrad+bias") == 1


def test_list_names_no_best_where_nothing_was_timed() -> None:
    store.write(
        make_problem(), [CANDIDATES[2], replace(CANDIDATES[0], rejected="failed when it ran")]
    )
    (entry,) = store.list()
    assert entry["best"] is None
    assert entry["time_ms"] is None


def test_nothing_is_listed_before_anything_is_stored(store_root: Path) -> None:
    assert store.list() == []
    assert store.forget() == 0
    assert not store_root.exists()


def test_foreign_files_in_the_store_are_left_alone(store_root: Path) -> None:
    file = written(store_root)
    for name in ("README", ".hidden", "0.json", file.name + ".bak"):
        (store_root / HERE / name).write_text("mine")
    (store_root / "mine").mkdir()
    (store_root / "mine" / file.name).write_text("mine")
    assert len(store.list()) == 1
    assert store.forget() == 1
    assert len([*store_root.rglob("*")]) == 7


def test_exports_of_several_machines_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exports = []
    for number, folder in enumerate((HERE, OTHER_GPU, OTHER_CUDNN)):
        monkeypatch.setenv("DGRAD_STORE", str(tmp_path / f"machine {number}"))
        monkeypatch.setattr(_folders, "folder_name", lambda device, folder=folder: folder)
        times = [replace(CANDIDATES[0], time_ms=1.0 + number), *CANDIDATES[1:]]
        store.write(make_problem(), times)
        store.write(numbered(11 + number), times)
        exports.append(tmp_path / f"{number}.json")
        assert store.export(exports[-1]) == 2

    monkeypatch.setenv("DGRAD_STORE", str(tmp_path / "merged"))
    monkeypatch.setattr(_folders, "folder_name", lambda device: HERE)
    assert [store.load(file) for file in exports] == [2, 2, 2]
    assert len(store.list()) == 6
    assert store.read(make_problem()) == [replace(CANDIDATES[0], time_ms=1.0), *CANDIDATES[1:]]
    assert store.read(numbered(11)) is not None
    assert store.read(numbered(13)) is None  # known of another GPU only
    together = tmp_path / "together.json"
    assert store.export(together) == 6
    assert [*content_of(together)["folders"]] == sorted([HERE, OTHER_GPU, OTHER_CUDNN])

    before = store.list()
    assert store.forget() == 6
    assert store.read(make_problem()) is None
    assert store.load(str(together)) == 6
    assert store.list() == before


def load_over(
    tmp_path: Path, stored: list[Candidate], loaded: list[Candidate]
) -> list[Candidate] | None:
    """What is read after one entry was loaded over another."""
    exported = tmp_path / "export.json"
    store.forget()
    store.write(make_problem(), loaded)
    store.export(exported)
    store.forget()
    store.write(make_problem(), stored)
    store.write(numbered(1), CANDIDATES)
    assert store.load(exported) == 1
    assert store.read(numbered(1)) == CANDIDATES
    return store.read(make_problem())


_FIRST, _SECOND, _THIRD = (Candidate("graph", f"eng{n}", "FMA_MATH", True, 64) for n in range(3))


def timed(candidate: Candidate, time_ms: float) -> Candidate:
    return replace(candidate, time_ms=time_ms, device_ms=time_ms / 2)


FAILED = replace(_FIRST, rejected="it failed")


@pytest.mark.parametrize(
    ("stored", "loaded", "kept"),
    [
        (_FIRST, timed(_FIRST, 1.0), timed(_FIRST, 1.0)),
        (timed(_FIRST, 1.0), _FIRST, timed(_FIRST, 1.0)),
        (timed(_FIRST, 1.0), replace(_FIRST, skipped=True), timed(_FIRST, 1.0)),
        (timed(_FIRST, 1.0), timed(_FIRST, 2.0), timed(_FIRST, 2.0)),  # entries have no date
        (_FIRST, FAILED, FAILED),
        (FAILED, _FIRST, FAILED),
        (FAILED, timed(_FIRST, 1.0), timed(_FIRST, 1.0)),
        (timed(_FIRST, 1.0), FAILED, FAILED),
    ],
)
def test_what_one_entry_tells_of_a_candidate_stays_where_another_is_loaded(
    tmp_path: Path, stored: Candidate, loaded: Candidate, kept: Candidate
) -> None:
    others = [timed(_SECOND, 3.0), _THIRD]
    assert load_over(tmp_path, [stored, *others], [loaded, *others]) == [kept, *others]


@pytest.mark.parametrize("turned", [False, True])
def test_candidates_that_one_entry_lacks_come_from_the_other_in_cudnns_order(
    tmp_path: Path, turned: bool
) -> None:
    all_three = [timed(_FIRST, 1.0), timed(_SECOND, 2.0), timed(_THIRD, 3.0)]
    entries = [all_three[2:], all_three]
    assert load_over(tmp_path, entries[turned], entries[not turned]) == all_three


def test_the_bias_tells_candidates_apart_when_an_entry_is_loaded(store_root: Path) -> None:
    problem = make_problem(bias=True)
    store.write(problem, WITH_BIAS)
    exported = store_root.with_name("export.json")
    store.export(exported)
    store.write(problem, WITH_BIAS[1:3])
    store.load(exported)
    assert store.read(problem) == WITH_BIAS


def test_two_entries_that_make_none_together_leave_the_loaded_one(tmp_path: Path) -> None:
    stored = [replace(_FIRST, time_ms=1.0), replace(_SECOND, rejected="it failed")]
    loaded = [FAILED, _SECOND]
    assert load_over(tmp_path, stored, loaded) == loaded
    many = [replace(_FIRST, algorithm=f"eng{n}") for n in range(300)]
    assert load_over(tmp_path, many[:200], many[200:]) == many[200:]


def test_a_spoiled_entry_is_replaced_by_the_loaded_one(store_root: Path, tmp_path: Path) -> None:
    file = written(store_root)
    store.export(tmp_path / "export.json")
    file.write_bytes(b"{}")
    assert store.load(tmp_path / "export.json") == 1
    assert store.read(make_problem()) == CANDIDATES


def test_an_export_that_cannot_be_finished_leaves_the_old_one(
    store_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(store_root)
    exported = tmp_path / "export.json"
    exported.write_text("of old")
    for call in ("open", "replace"):
        with monkeypatch.context() as patch:
            refuse(patch, call, errno.ENOSPC, lambda path: str(path).endswith(".tmp"))
            with pytest.raises(OSError, match="No space left") as caught:
                store.export(exported)
            assert caught.value.filename == str(exported)
    assert exported.read_text() == "of old"
    assert sorted(tmp_path.iterdir()) == [exported, store_root]


def test_an_export_may_be_read_as_other_files_of_the_user(store_root: Path, tmp_path: Path) -> None:
    written(store_root)
    before = os.umask(0o027)
    try:
        store.export(tmp_path / "export.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "export.json").stat().st_mode) == 0o640


def test_an_export_follows_a_link_and_writes_to_a_pipe(store_root: Path, tmp_path: Path) -> None:
    written(store_root)
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "export.json")
    for _ in range(2):
        assert store.export(link) == 1
        assert link.is_symlink()
    assert store.load(tmp_path / "export.json") == 1
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert store.export(pipe) == 1
        assert os.read(reader, 100_000) == link.read_bytes()
    finally:
        os.close(reader)
    assert pipe.is_fifo()


def test_an_export_leaves_out_what_is_spoiled(store_root: Path, tmp_path: Path) -> None:
    spoiled(store_root, b"{}")
    written(store_root, numbered(1))
    assert store.export(tmp_path / "export.json") == 1


@pytest.mark.parametrize(
    "folder",
    [
        "",
        ".",
        "..",
        "/",
        "/etc/" + HERE,
        "../" + HERE,
        HERE + "/..",
        HERE + "/../../x",
        HERE + "\0",
        HERE + "\n",
        "a/" + HERE,
        "a\\" + HERE,
        "N" * 5000 + "_sm90_cudnn-9.12.0_v3",
        HERE + "0",
        HERE[:-1] + "1",
        HERE[:-1] + "2",
        "NVIDIA-H200_sm\u0661\u0662_cudnn-9.12.0_v3",
        "\ud800" + HERE,
    ],
    ids=ascii,
)
def test_an_export_with_a_hostile_folder_name_is_refused(
    store_root: Path, tmp_path: Path, folder: str
) -> None:
    entry = content_of(written(store_root))
    store.forget()
    before = [*tmp_path.rglob("*")]
    exported = tmp_path / "hostile.json"
    exported.write_text(json.dumps({"format": 3, "folders": {HERE: [entry], folder: [entry]}}))
    with pytest.raises(ValueError, match=re.escape(repr(folder)[:100])):
        store.load(exported)
    assert [file for file in tmp_path.rglob("*") if file not in (*before, exported)] == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b"\x80",
        b'{"format": 2, "folders": {}}',
        b'{"format": 4, "folders": {}}',
        b'{"format": 3.0, "folders": {}}',
        b'{"format": true, "folders": {}}',
        b'{"format": 3, "folders": []}',
        b'{"format": 3, "folders": {}, "more": 1}',
        b'{"format": 3, "folders": {"' + HERE.encode() + b'": {}}}',
        b'{"format": ' + b"1" * 5000 + b', "folders": {}}',
    ],
    ids=lambda content: repr(content[:32]),
)
def test_what_is_no_export_is_refused(store_root: Path, tmp_path: Path, content: bytes) -> None:
    exported = tmp_path / "bad.json"
    exported.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(exported))):
        store.load(exported)
    assert not store_root.exists()


def test_two_entries_of_one_problem_are_refused(store_root: Path, tmp_path: Path) -> None:
    written(store_root)
    file = tmp_path / "export.json"
    store.export(file)
    content = json.loads(file.read_text())
    for entries in content["folders"].values():
        entries *= 2
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has two entries of "):
        store.load(file)


def test_a_device_that_never_ends_is_no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_export, "_MAX_BYTES", 2**20)
    with pytest.raises(ValueError, match="is not an export of the store: it has over 1048576 "):
        store.load("/dev/zero")


def test_a_missing_export_and_a_folder_that_cannot_be_written_raise(
    store_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        store.load(tmp_path / "none.json")
    written(store_root)
    with pytest.raises(FileNotFoundError):
        store.export(tmp_path / "no folder" / "export.json")
    store.export(tmp_path / "export.json")
    monkeypatch.setenv("DGRAD_STORE", "/dev/null/none")
    with pytest.raises(NotADirectoryError):
        store.load(tmp_path / "export.json")


def test_a_negative_knob_is_kept() -> None:
    """As in cuDNN 9.19's names of engines for fprop: eng41_k2=0_k12=-1_k13=2."""
    engine = Candidate("graph", "eng41_k2=0_k12=-1_k13=2", "FMA_MATH", True, 0, time_ms=1.0)
    problem = make_problem()
    assert _stored.validated(_stored.decode(_stored.encode(problem, [engine])))[1] == [engine]
