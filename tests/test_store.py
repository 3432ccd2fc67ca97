"""The store: what is written is read back, from the folder that is asked for or none."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dgrad import _candidates, _folders, _loader, _stored, store
from dgrad.exceptions import NOT_ASKED, cudnn_error
from fake_device import pretend_name
from stored import (
    CANDIDATES,
    HERE,
    MARKS,
    OTHER_CUDNN,
    OTHER_GPU,
    WITH_BIAS,
    content_of,
    folder_name_of_device,
    make_problem,
    written,
)

pytestmark = MARKS


# Round trips


def test_candidates_come_back_as_they_were(store_root: Path) -> None:
    assert store.read(make_problem()) is None
    store.write(make_problem(), CANDIDATES)
    assert store.read(make_problem()) == CANDIDATES


def test_no_file_stays_open(store_root: Path) -> None:
    before = os.listdir("/proc/self/fd")
    store.write(make_problem(), CANDIDATES)
    store.read(make_problem())
    assert set(os.listdir("/proc/self/fd")) <= set(before)


def test_candidates_of_a_biased_problem_come_back_as_they_were(
    warnings_of_store: Callable[[], list[str]],
) -> None:
    problem = make_problem(bias=True)
    store.write(problem, WITH_BIAS)
    assert store.read(problem) == WITH_BIAS
    assert [each.bias for each in store.read(problem) or []] == [each.bias for each in WITH_BIAS]
    assert store.read(make_problem()) is None
    assert warnings_of_store() == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "refused",
    [(), ("convolution_identity", "convolution_bias"), ("bias_rows",), ("legacy",)],
    ids=str,
)
def test_all_that_gather_names_is_stored(
    refused: tuple[str, ...],
    bias: bool,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of_store: Callable[[], list[str]],
) -> None:
    """Also what stands for the engines or algorithms that cuDNN refused."""

    def answer(operation: str, names: list[str]) -> list[str]:
        if operation in refused:
            raise cudnn_error(
                3000, "cudnnBackendFinalize returned 3000", "cudnnBackendFinalize", ""
            )
        return names

    def engines(problem: Any, operation: str) -> tuple[list[Any], list[str]]:
        names = {"convolution": ["eng5", "eng0_k2=3"], "bias_rows": ["eng1", "eng2_k24=4"]}
        found = answer(operation, names.get(operation, ["eng7"]))
        return [SimpleNamespace(name=name, notes=["TENSOR_CORE"]) for name in found], []

    core = _loader.require()
    fake = SimpleNamespace(
        graph_heuristic=engines,
        graph_plan=lambda *_: None,
        legacy_heuristic=lambda problem: answer("legacy", []),
        legacy_algorithms=core.legacy_algorithms,
        Problem=core.Problem,
    )
    monkeypatch.setattr(_candidates, "_loader", SimpleNamespace(require=lambda: fake))
    problem = make_problem(bias=bias)
    found = _candidates.gather(problem)
    store.write(problem, found)
    assert store.read(problem) == found
    assert warnings_of_store() == []


def test_the_file_is_plain_json_without_the_device(store_root: Path) -> None:
    file = written(store_root, make_problem(device=3))
    assert content_of(file) == {
        "problem": {
            "direction": "dgrad",
            "dtype": "float32",
            "tf32": True,
            "layout": "nchw",
            "x": [2, 8, 17, 17],
            "w": [4, 8, 3, 3],
            "y": [2, 4, 8, 8],
            "padding": [0, 0],
            "stride": [2, 2],
            "dilation": [1, 1],
            "groups": 1,
            "bias": False,
            "alignment": 16,
        },
        "candidates": [
            {name: value for name, value in asdict(each).items() if name != "out_of_memory"}
            for each in CANDIDATES
        ],
    }


def test_the_same_gpu_at_another_index_is_the_same_entry() -> None:
    store.write(make_problem(device=0), CANDIDATES)
    assert store.read(make_problem(device=5)) == CANDIDATES


@pytest.mark.parametrize(
    "changes",
    [
        {"direction": "fprop"},
        {"dtype": "float16", "tf32": False},
        {"tf32": False},
        {"layout": "nhwc"},
        {"x": (3, 8, 17, 17), "y": (3, 4, 8, 8)},
        {"x": (2, 8, 18, 17)},
        {"w": (4, 8, 3, 1), "x": (2, 8, 17, 15)},
        {"padding": (0, 1), "x": (2, 8, 17, 15)},
        {"stride": (1, 2), "x": (2, 8, 10, 17)},
        {"dilation": (1, 2), "x": (2, 8, 17, 19)},
        {"groups": 2, "w": (4, 4, 3, 3)},
        {"bias": True},
        {"alignment": 8},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_problem_is_another_entry(changes: dict[str, Any]) -> None:
    store.write(make_problem(), CANDIDATES)
    assert store.read(make_problem(**changes)) is None


def test_a_later_write_replaces_an_earlier_one() -> None:
    store.write(make_problem(), CANDIDATES)
    store.write(make_problem(), CANDIDATES[:2])
    assert store.read(make_problem()) == CANDIDATES[:2]


def test_want_of_memory_is_not_remembered() -> None:
    full = replace(CANDIDATES[0], rejected="out of memory: no room", out_of_memory=True)
    store.write(make_problem(), [full, *CANDIDATES[1:]])
    read = store.read(make_problem())
    left = replace(CANDIDATES[0], time_ms=None, device_ms=None, skipped=True)
    assert read == [left, *CANDIDATES[1:]]


def test_candidates_that_all_failed_are_not_remembered(
    warnings_of_store: Callable[[], list[str]],
) -> None:
    store.write(make_problem(), [replace(each, rejected="broken") for each in CANDIDATES])
    store.write(make_problem(), [])
    assert store.read(make_problem()) is None
    assert warnings_of_store() == []


@pytest.mark.parametrize(
    ("reason", "stored"),
    [
        ("two\nlines\x1b[31m", "two lines [31m"),
        ("\ud800 is no text", "  is no text"),
        ("größer als 4 GiB", "größer als 4 GiB"),
        ("", "no reason given"),
        ("x" * 10000, "x" * 300),
    ],
)
def test_a_reason_is_made_fit_for_the_store(reason: str, stored: str) -> None:
    store.write(make_problem(), [CANDIDATES[1], replace(CANDIDATES[0], rejected=reason)])
    read = store.read(make_problem())
    assert read is not None
    assert read[1].rejected == stored


@pytest.mark.parametrize("time_ms", [0.0, -1.0, float("nan"), float("inf"), 1e7])
def test_a_time_that_cannot_be_is_not_stored(time_ms: float) -> None:
    wrong = replace(CANDIDATES[0], time_ms=time_ms, device_ms=time_ms)
    store.write(make_problem(), [wrong, replace(CANDIDATES[1], device_ms=0.4)])
    read = store.read(make_problem())
    assert read is not None
    assert [each.time_ms for each in read] == [None, 0.5]
    assert [each.device_ms for each in read] == [None, 0.4]


def test_what_could_not_be_read_again_is_not_written(
    store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    for unknown in (
        [replace(CANDIDATES[0], algorithm="ALGO_9")],
        [CANDIDATES[0], CANDIDATES[0]],
        CANDIDATES * 65,
    ):
        store.write(make_problem(), unknown)
    assert not store_root.exists()
    assert len(warnings_of_store()) == 1


def test_a_read_takes_less_than_five_milliseconds() -> None:
    many = [
        replace(
            CANDIDATES[0],
            algorithm=algorithm,
            math_type=math_type,
            deterministic=algorithm != "ALGO_0",
            rejected="x" * 300,
        )
        for algorithm in _loader.require().legacy_algorithms("dgrad")
        for math_type in _stored.MATH_TYPES
    ]
    many += [
        replace(CANDIDATES[4], algorithm=f"eng{n}_k2=3_k14=2_k24=0", rejected="x" * 100)
        for n in range(100)
    ]
    many[0] = replace(many[0], rejected=None)
    store.write(make_problem(), many)
    times_ms = []
    for _ in range(20):
        begin = time.perf_counter()
        assert store.read(make_problem()) == many
        times_ms.append((time.perf_counter() - begin) * 1e3)
    assert min(times_ms) < 5


# Which folder


def test_the_environment_is_read_when_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(make_problem(), CANDIDATES)
    monkeypatch.setenv("DGRAD_STORE", str(tmp_path / "other"))
    assert store.path() == tmp_path / "other"
    assert store.read(make_problem()) is None
    monkeypatch.setenv("DGRAD_STORE", "Off")
    assert store.path() is None
    monkeypatch.setenv("DGRAD_STORE", "~/mine")
    assert store.path() == tmp_path / "HOME" / "mine"
    monkeypatch.delenv("DGRAD_STORE")
    assert store.path() == tmp_path / "XDG_CACHE_HOME" / "dgrad"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert store.path() == tmp_path / "HOME" / ".cache" / "dgrad"
    monkeypatch.setenv("DGRAD_STORE", "")
    assert store.path() == tmp_path / "HOME" / ".cache" / "dgrad"


@pytest.mark.parametrize("home", [None, "", "not/absolute"])
def test_without_a_home_the_store_is_off(
    home: str | None, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    for variable in ("DGRAD_STORE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(variable)
    if home is not None:
        monkeypatch.setenv("HOME", home)
    for _ in range(3):
        store.write(make_problem(), CANDIDATES)
        assert store.read(make_problem()) is None
    assert store.path() is None
    assert len(warnings_of_store()) == 1
    assert "HOME" in warnings_of_store()[0]


def test_off_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    monkeypatch.setenv("DGRAD_STORE", "off")
    monkeypatch.chdir(tmp_path)
    store.write(make_problem(), CANDIDATES)
    assert store.read(make_problem()) is None
    assert store.list() == []
    assert store.forget() == 0
    for command in (store.export, store.load):
        with pytest.raises(RuntimeError, match="the store is off"):
            command("all.json")
    assert [*tmp_path.iterdir()] == []
    assert warnings_of_store() == []


def test_folders_and_files_are_the_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DGRAD_STORE")
    monkeypatch.delenv("XDG_CACHE_HOME")
    before = os.umask(0)
    try:
        store.write(make_problem(), CANDIDATES)
    finally:
        os.umask(before)
    made = [*(tmp_path / "HOME").rglob("*")]
    assert len(made) == 4
    for each in [tmp_path / "HOME", *made]:
        assert stat.S_IMODE(each.stat().st_mode) == (0o600 if each.is_file() else 0o700)


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "NVIDIA-H200_sm90_cudnn-9.12.0_v3"),
        ("NVIDIA H200 MIG 1g.18gb", "NVIDIA-H200-MIG-1g.18gb_sm90_cudnn-9.12.0_v3"),
        ("../../x\0\n/ä", "..-..-x-_sm90_cudnn-9.12.0_v3"),
        ("..", ".._sm90_cudnn-9.12.0_v3"),
        ("N" * 500, "N" * 100 + "_sm90_cudnn-9.12.0_v3"),
    ],
)
def test_a_folder_is_named_by_gpu_cudnn_and_format(
    name: str, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend_name(monkeypatch, name)
    monkeypatch.setattr(_loader, "cudnn_version", lambda: "9.12.0")
    assert folder_name_of_device(0) == folder
    assert _stored.FOLDER.fullmatch(folder)


def test_another_gpu_and_another_cudnn_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, folder in enumerate((HERE, OTHER_GPU, OTHER_CUDNN)):
        monkeypatch.setattr(_folders, "folder_name", lambda device, folder=folder: folder)
        assert store.read(make_problem()) is None
        store.write(make_problem(), [replace(CANDIDATES[0], time_ms=1.0 + number)])
    assert [entry["folder"] for entry in store.list()] == sorted([HERE, OTHER_GPU, OTHER_CUDNN])
    assert store.read(make_problem()) == [replace(CANDIDATES[0], time_ms=3.0)]


def test_what_was_found_while_cudnn_could_not_be_asked_is_not_remembered(
    store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    reason = f"{NOT_ASKED}cudnnGet returned 5000"
    unasked = replace(CANDIDATES[0], time_ms=None, device_ms=None, rejected=reason)
    store.write(make_problem(), [unasked, *CANDIDATES[4:]])
    assert store.read(make_problem()) is None
    assert warnings_of_store() == []
