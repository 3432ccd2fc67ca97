"""The store: what is written is read back, and what anybody spoiled is a miss and no more.

All of it runs on the CPU: problems are plain data, and the GPU's name is made up.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import pickle
import random
import re
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dgrad import Candidate, _candidates, _loader, _stored, log, store
from dgrad.exceptions import cudnn_error

_CORE, _REASON = _loader.load()
pytestmark = [
    pytest.mark.skipif(_CORE is None, reason=str(_REASON)),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning"),
]

HERE = "NVIDIA-H200_sm90_cudnn-9.12.0_v3"
OTHER_GPU = "NVIDIA-L4_sm89_cudnn-9.12.0_v3"
OTHER_CUDNN = "NVIDIA-H200_sm90_cudnn-9.19.0_v3"
EXAMPLES = settings(max_examples=150, deadline=None, database=None)
folder_name_of_device = store._folder_name


def make_problem(**changes: Any) -> Any:
    fields = {
        "direction": "dgrad",
        "dtype": "float32",
        "tf32": True,
        "layout": "nchw",
        "x": (2, 8, 17, 17),
        "w": (4, 8, 3, 3),
        "y": (2, 4, 8, 8),
        "padding": (0, 0),
        "stride": (2, 2),
        "dilation": (1, 1),
        "groups": 1,
        "bias": False,
        "alignment": 16,
        "device": 0,
    }
    assert _CORE is not None
    return _CORE.Problem(**fields | changes)


def numbered(number: int) -> Any:
    """One of many different problems."""
    return make_problem(x=(number, 8, 17, 17), y=(number, 4, 8, 8))


CANDIDATES = [
    Candidate("legacy", "ALGO_1", "TENSOR_OP_MATH", True, 4096, time_ms=0.021, device_ms=0.01),
    Candidate("legacy", "ALGO_0", "DEFAULT_MATH", False, 0, time_ms=0.5),
    Candidate("legacy", "FFT", "FMA_MATH", True, 2**31, skipped=True),
    Candidate("legacy", "WINOGRAD", "DEFAULT_MATH", True, 0, rejected="cuDNN's heuristic says no"),
    Candidate("graph", "eng5_k2=3_k24=0", "TENSOR_OP_MATH", True, 512, time_ms=0.7),
    Candidate("graph", "eng0+identity", "FMA_MATH", False, 0, time_ms=0.8),
    Candidate("graph", "engines+identity", "DEFAULT_MATH", False, 0, rejected="no such graph"),
]
_ENGINE = Candidate("graph", "eng5_k2=3_k24=0", "TENSOR_OP_MATH", True, 512, 0.7, bias="eng1_k24=4")
BIASED = [
    _ENGINE,
    replace(_ENGINE, time_ms=0.6, bias="fused"),
    replace(_ENGINE, time_ms=None, skipped=True, bias="add"),
    replace(CANDIDATES[0], time_ms=1.0, bias="eng1_k24=4"),
    replace(CANDIDATES[0], time_ms=0.9, bias="add"),
    replace(CANDIDATES[6], algorithm="engines", bias="fused"),
]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store of the test's own; nothing of the user's can be reached by accident."""
    root = tmp_path / "store"
    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable))
    monkeypatch.setenv("DGRAD_STORE", str(root))
    monkeypatch.setattr(store, "_folder_name", lambda device: HERE)
    monkeypatch.setattr(log, "_warned", {})
    monkeypatch.setattr(store, "_swept", set())
    return root


@pytest.fixture
def warnings_of_store(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    def texts() -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == "dgrad" and record.levelno >= logging.WARNING
        ]

    return texts


def written(root: Path, problem: Any = None) -> Path:
    """Store an entry and give its file."""
    problem = problem or make_problem()
    store.write(problem, BIASED if problem.bias else CANDIDATES)
    return root / HERE / _stored.file_name(problem)


def spoiled(root: Path, content: bytes) -> Path:
    file = written(root)
    file.write_bytes(content)
    return file


def content_of(file: Path) -> Any:
    content: Any = json.loads(file.read_text())
    return content


def fork(work: Callable[[], object]) -> int:
    """Run ``work`` in a child process and give its process id; it exits with 0 if all went well."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


# Round trips


def test_candidates_come_back_as_they_were(root: Path) -> None:
    assert store.read(make_problem()) is None
    store.write(make_problem(), CANDIDATES)
    assert store.read(make_problem()) == CANDIDATES


def test_candidates_of_a_biased_problem_come_back_as_they_were(
    warnings_of_store: Callable[[], list[str]],
) -> None:
    problem = make_problem(bias=True)
    store.write(problem, BIASED)
    assert store.read(problem) == BIASED
    assert [each.bias for each in store.read(problem) or []] == [each.bias for each in BIASED]
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

    def engines(problem: Any, operation: str) -> list[Any]:
        names = {"convolution": ["eng5", "eng0_k2=3"], "bias_rows": ["eng1", "eng2_k24=4"]}
        found = answer(operation, names.get(operation, ["eng7"]))
        return [SimpleNamespace(name=name, notes=["TENSOR_CORE"]) for name in found]

    core = _CORE
    assert core is not None
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


def test_the_file_is_plain_json_without_the_device(root: Path) -> None:
    file = written(root, make_problem(device=3))
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
    assert read == [replace(CANDIDATES[0], time_ms=None), *CANDIDATES[1:]]


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
    root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    for unknown in (
        [replace(CANDIDATES[0], algorithm="ALGO_9")],
        [CANDIDATES[0], CANDIDATES[0]],
        CANDIDATES * 65,
    ):
        store.write(make_problem(), unknown)
    assert not root.exists()
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
    properties = SimpleNamespace(name=name, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(_loader, "cudnn_version", lambda: "9.12.0")
    assert folder_name_of_device(0) == folder
    assert _stored.FOLDER.fullmatch(folder)


def test_another_gpu_and_another_cudnn_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, folder in enumerate((HERE, OTHER_GPU, OTHER_CUDNN)):
        monkeypatch.setattr(store, "_folder_name", lambda device, folder=folder: folder)
        assert store.read(make_problem()) is None
        store.write(make_problem(), [replace(CANDIDATES[0], time_ms=1.0 + number)])
    assert [entry["folder"] for entry in store.list()] == sorted([HERE, OTHER_GPU, OTHER_CUDNN])
    assert store.read(make_problem()) == [replace(CANDIDATES[0], time_ms=3.0)]


# Many processes, and those that die


def test_eight_processes_write_at_once(
    root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    def write(mine: int) -> None:
        os.close(opened)
        os.read(gate, 1)  # until all are there
        for turn in range(25):
            times = [replace(CANDIDATES[0], time_ms=1.0 + mine), *CANDIDATES[1:]]
            store.write(numbered(100), times)
            store.write(numbered(1 + turn % 5), times)
            store.write(numbered(200 + mine), times)
            for each in (numbered(100), numbered(1 + turn % 5)):
                read = store.read(each)
                assert read is not None
                assert read[1:] == CANDIDATES[1:]
        assert not log._warned

    gate, opened = os.pipe()
    children = [fork(lambda mine=mine: write(mine)) for mine in range(8)]
    os.close(gate)
    os.close(opened)
    assert [wait(child) for child in children] == [0] * 8
    assert len(store.list()) == 1 + 5 + 8
    assert all(store._FILE.fullmatch(file.name) for file in (root / HERE).iterdir())
    assert warnings_of_store() == []


def test_a_folder_that_another_process_makes_first_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", lambda path: False)
        store.write(make_problem(), CANDIDATES)
    assert store.read(make_problem()) == CANDIDATES


def test_a_killed_writer_leaves_whole_entries_only(
    root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    def write() -> None:
        while True:
            for number in range(1, 6):
                store.write(numbered(number), CANDIDATES)

    store.write(numbered(1), CANDIDATES)
    pause = random.Random(0)
    for _ in range(40):
        child = fork(write)
        time.sleep(pause.uniform(0.001, 0.02))
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
        found = [store.read(numbered(number)) for number in range(1, 6)]
        assert found[0] == CANDIDATES
        assert all(each in (None, CANDIDATES) for each in found)
    assert len(store.list()) == 5
    assert warnings_of_store() == []


def test_what_a_killed_writer_left_is_ignored_and_later_removed(
    root: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    def die(*arguments: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        os.replace = die  # type: ignore[assignment]
        store.write(make_problem(), CANDIDATES)

    for _ in range(2):
        assert wait(fork(write)) == -signal.SIGKILL
    old, young = (root / HERE).iterdir()
    assert store.read(make_problem()) is None
    assert store.list() == []
    assert warnings_of_store() == []

    an_hour_ago = time.time() - 3700
    unrelated = root / HERE / "notes.tmp"
    unrelated.touch()
    for file in (old, unrelated):
        os.utime(file, (an_hour_ago, an_hour_ago))
    store.write(numbered(1), CANDIDATES)
    assert not old.exists()
    assert young.exists()
    assert unrelated.exists()
    assert store.forget() == 1
    assert [*(root / HERE).iterdir()] == [unrelated]


# What anybody spoiled


def assert_is_a_miss_with_one_warning(
    warnings_of_store: Callable[[], list[str]], problem: Any = None
) -> str:
    problem = problem or make_problem()
    assert store.read(problem) is None
    assert store.read(problem) is None
    (text,) = warnings_of_store()
    assert len(text) < 1000
    assert text.isprintable()
    return text


def test_a_file_cut_off_anywhere_is_a_miss(
    root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    store.write(make_problem(), CANDIDATES[:1])
    (file,) = (root / HERE).iterdir()
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert store.read(make_problem()) is None
    assert len(warnings_of_store()) == 1
    store.write(make_problem(), CANDIDATES)
    assert store.read(make_problem()) == CANDIDATES


class Harmful:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["DGRAD_STORE"] + ".harm",)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        bytes(range(256)),
        b" " * 70_000,
        b"[" * 3000,
        b"[" * 60_000,
        b'{"a":' * 3000,
        b"null",
        b"1" * 5000,
        b"NaN",
        b"[]",
        b'"text"',
        b"{}",
        b"\xef\xbb\xbf{}",
        "{}".encode("utf-16"),
        b'{"problem": {}, "candidates": []}',
        b"__import__('os').mkdir('harm')",
        b'{"py/object": "os.mkdir", "__reduce__": ["os.mkdir", ["harm"]], "__class__": "Problem"}',
        b"!!python/object/apply:os.mkdir ['harm']",
        pickle.dumps(Harmful),
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_entry_is_a_miss(
    root: Path, content: bytes, warnings_of_store: Callable[[], list[str]]
) -> None:
    spoiled(root, content)
    assert_is_a_miss_with_one_warning(warnings_of_store)


def test_nothing_that_is_read_is_executed(
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of_store: Callable[[], list[str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    harm = Path(f"{root}.harm")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps(Harmful(), protocol)
        spoiled(root, pickled)
        assert store.read(make_problem()) is None
        with pytest.raises(ValueError, match="is not an export"):
            store.load(next((root / HERE).iterdir()))
        assert not harm.exists()
    assert len(warnings_of_store()) == 1
    pickle.loads(pickled)
    assert harm.exists()  # so it would have been noticed


def test_deep_nesting_is_a_miss_even_where_the_program_allows_deep_recursion(root: Path) -> None:
    def read() -> None:
        import sys

        sys.setrecursionlimit(10**6)
        assert store.read(make_problem()) is None

    for content in (b"[" * 65_536, b'{"a":' * 13_000):
        spoiled(root, content)
        assert wait(fork(read)) == 0


def set_in(*keys: Any, to: Any) -> Callable[[Any], Any]:
    def change(entry: Any) -> Any:
        inner = entry
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = to
        return entry

    return change


def without(*keys: Any) -> Callable[[Any], Any]:
    def change(entry: Any) -> Any:
        inner = entry
        for key in keys[:-1]:
            inner = inner[key]
        del inner[keys[-1]]
        return entry

    return change


FIRST = ("candidates", 0)
WRONG = {
    "another field": set_in("more", to=1),
    "no problem": without("problem"),
    "no candidates": without("candidates"),
    "problem is a list": set_in("problem", to=[]),
    "problem with a device": set_in("problem", "device", to=0),
    "problem without groups": without("problem", "groups"),
    "problem of another size": set_in("problem", "x", to=[2, 8, 18, 17]),
    "problem of another direction": set_in("problem", "direction", to="wgrad"),
    "tf32 is 1": set_in("problem", "tf32", to=1),
    "groups is true": set_in("problem", "groups", to=True),
    "groups is 1.0": set_in("problem", "groups", to=1.0),
    "x is text": set_in("problem", "x", to="2x8x17x17"),
    "x is nested": set_in("problem", "x", to=[[2, 8, 17, 17]]),
    "candidates is an object": set_in("candidates", to={"0": {}}),
    "candidates is empty": set_in("candidates", to=[]),
    "candidates is text": set_in("candidates", to="ALGO_1"),
    "candidate is null": set_in(*FIRST, to=None),
    "candidate is a list": set_in(*FIRST, to=["legacy", "ALGO_1"]),
    "candidate with out_of_memory": set_in(*FIRST, "out_of_memory", to=True),
    "candidate without a time": without(*FIRST, "time_ms"),
    "candidate without a time on the device": without(*FIRST, "device_ms"),
    "time on the device is text": set_in(*FIRST, "device_ms", to="0.1"),
    "provider unknown": set_in(*FIRST, "provider", to="kernel"),
    "provider is a path": set_in(*FIRST, "provider", to="../legacy"),
    "provider is null": set_in(*FIRST, "provider", to=None),
    "algorithm unknown": set_in(*FIRST, "algorithm", to="ALGO_9"),
    "algorithm of wgrad": set_in(*FIRST, "algorithm", to="ALGO_3"),
    "algorithm is a number": set_in(*FIRST, "algorithm", to=1),
    "algorithm is a list": set_in(*FIRST, "algorithm", to=["ALGO_1"]),
    "algorithm is very long": set_in(*FIRST, "algorithm", to="A" * 50_000),
    "math type unknown": set_in(*FIRST, "math_type", to="UNKNOWN_MATH"),
    "math type is an object": set_in(*FIRST, "math_type", to={}),
    "deterministic is 1": set_in(*FIRST, "deterministic", to=1),
    "deterministic is text": set_in(*FIRST, "deterministic", to="true"),
    "workspace is negative": set_in(*FIRST, "workspace_bytes", to=-1),
    "workspace is true": set_in(*FIRST, "workspace_bytes", to=True),
    "workspace is a float": set_in(*FIRST, "workspace_bytes", to=4096.0),
    "workspace is over 64 bits": set_in(*FIRST, "workspace_bytes", to=2**64),
    "workspace is enormous": set_in(*FIRST, "workspace_bytes", to=10**4000),
    "time is NaN": set_in(*FIRST, "time_ms", to=float("nan")),
    "time is inf": set_in(*FIRST, "time_ms", to=float("inf")),
    "time is -inf": set_in(*FIRST, "time_ms", to=float("-inf")),
    "time is negative": set_in(*FIRST, "time_ms", to=-0.5),
    "time is zero": set_in(*FIRST, "time_ms", to=0.0),
    "time is hours": set_in(*FIRST, "time_ms", to=1e7),
    "time is an int": set_in(*FIRST, "time_ms", to=1),
    "time is true": set_in(*FIRST, "time_ms", to=True),
    "time is text": set_in(*FIRST, "time_ms", to="0.1"),
    "skipped is 0": set_in(*FIRST, "skipped", to=0),
    "skipped is null": set_in(*FIRST, "skipped", to=None),
    "rejected is false": set_in(*FIRST, "rejected", to=False),
    "rejected is empty": set_in(*FIRST, "rejected", to=""),
    "rejected is very long": set_in(*FIRST, "rejected", to="x" * 301),
    "rejected commands the terminal": set_in(*FIRST, "rejected", to="\x1b[2J"),
    "rejected has lines": set_in(*FIRST, "rejected", to="a\nERROR b"),
    "rejected is no text": set_in(*FIRST, "rejected", to="\ud800"),
    "a candidate twice": lambda entry: set_in("candidates", 1, to=entry["candidates"][0])(entry),
    "nothing may run": lambda entry: set_in("candidates", to=[entry["candidates"][3]])(entry),
    "257 candidates": lambda entry: set_in("candidates", to=[{}] * 257)(entry),
    "a million candidates": lambda entry: set_in("candidates", to=[0] * 10**6)(entry),
}

NOT_A_FEW_CANDIDATES = {label for label in WRONG if label.startswith(("candidates is", "257"))}


@pytest.mark.parametrize("label", WRONG)
def test_an_entry_with_something_wrong_is_a_miss(
    root: Path, label: str, warnings_of_store: Callable[[], list[str]]
) -> None:
    file = written(root)
    file.write_text(json.dumps(WRONG[label](content_of(file))))
    text = assert_is_a_miss_with_one_warning(warnings_of_store)
    assert str(file) in text
    assert ("1 to 256 candidates" in text) == (label in NOT_A_FEW_CANDIDATES)
    assert store.list() == []


@pytest.mark.parametrize("label", WRONG)
def test_an_export_with_something_wrong_is_refused_as_a_whole(
    root: Path, tmp_path: Path, label: str
) -> None:
    file = written(root)
    good = content_of(file)
    bad = WRONG[label](content_of(file))
    store.forget()
    if label.startswith("problem of another"):
        bad["problem"]["x"] = [2, 8, 99, 17]  # not another problem, but none at all
    exported = tmp_path / "bad.json"
    exported.write_text(json.dumps({"format": 3, "folders": {OTHER_GPU: [good, bad]}}))
    with pytest.raises(ValueError, match=f"entry 1 of {OTHER_GPU}") as error:
        store.load(exported)
    assert len(str(error.value)) < 1000
    assert store.list() == []


def test_the_entry_of_another_problem_under_this_name_is_a_miss(
    root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    other, mine = written(root, numbered(1)), written(root)
    os.replace(other, mine)
    text = assert_is_a_miss_with_one_warning(warnings_of_store)
    assert "is for another problem" in text
    assert store.list() == []


ENGINE = ("candidates", 4)
LONGEST = "eng999999999" + "_k999999999=999999999" * 64
WRONG_ENGINES = (
    "", "eng", "eng-5", "eng+5", "eng 5", " eng5", "eng5 ", "eng5\n", "eng5\0", "ENG5", "5",
    "xeng5", "eng5.0", "eng0x5", "eng1000000000", "eng\u0665", "eng5_k\u0662=3", "eng5_k2=\uff13",
    "eng5_", "eng5_k2", "eng5_k2=", "eng5_k-2=3", "eng5_k=3", "eng5_k2=3_", "eng5_k2=3,k4=0",
    "eng5_k2==3", "eng5k2=3", LONGEST + "_k1=1", "+identity", "eng5identity", "eng5+", "eng5+bias",
    "eng5+identity ", "eng5+identity+identity", "eng5+identityeng5", "+identityeng5",
    "eng+identity", "engines", "engines+identity",  # stand for a refusal, and may not run
    "engines5", "ALGO_1", "graph:eng5", "legacy:ALGO_1", "../eng5", "eng5/../eng6", "eng5;eng6",
)  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ENGINES, ids=ascii)
def test_a_wrong_engine_is_a_miss(
    root: Path, name: str, warnings_of_store: Callable[[], list[str]]
) -> None:
    file = written(root)
    file.write_text(json.dumps(set_in(*ENGINE, "algorithm", to=name)(content_of(file))))
    assert "whose algorithm is" in assert_is_a_miss_with_one_warning(warnings_of_store)
    assert store.list() == []


@pytest.mark.parametrize("direction", ["fprop", "wgrad"])
def test_a_compiled_engine_of_a_gradient_is_a_miss(
    direction: str, root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    problem = make_problem(direction=direction)  # it can be wrong: see gather
    store.write(problem, [CANDIDATES[4]])
    file = root / HERE / _stored.file_name(problem)
    assert store.read(problem) == [CANDIDATES[4]]
    changed = set_in(*FIRST, "algorithm", to="eng5_k2=3_k24=0+identity")(content_of(file))
    file.write_text(json.dumps(changed))
    text = assert_is_a_miss_with_one_warning(warnings_of_store, problem)
    assert "whose algorithm is 'eng5_k2=3_k24=0+identity'" in text


@pytest.mark.parametrize("name", ["eng5_k2=3_k24=0", "ALGO_9", "IMPLICIT_GEMM", "engines"])
def test_an_engine_is_no_legacy_algorithm(
    root: Path, name: str, warnings_of_store: Callable[[], list[str]]
) -> None:
    file = written(root)
    file.write_text(json.dumps(set_in(*FIRST, "algorithm", to=name)(content_of(file))))
    assert "whose algorithm is" in assert_is_a_miss_with_one_warning(warnings_of_store)


@pytest.mark.parametrize("name", ["eng0", "eng007", LONGEST, LONGEST + "+identity"])
def test_an_engine_of_any_numbers_comes_back(name: str) -> None:
    candidates = [replace(CANDIDATES[4], algorithm=name)]
    store.write(make_problem(), candidates)
    assert store.read(make_problem()) == candidates


@pytest.mark.parametrize("bias", ["fused", "add", "eng1_k24=4", "", False, 0, [], "null"])
def test_a_bias_in_an_unbiased_problem_is_a_miss(
    root: Path, bias: object, warnings_of_store: Callable[[], list[str]]
) -> None:
    for number in (0, 4):
        file = written(root)
        changed = set_in("candidates", number, "bias", to=bias)(content_of(file))
        file.write_text(json.dumps(changed))
        assert store.read(make_problem()) is None
    (text,) = warnings_of_store()
    assert "whose bias is" in text


WRONG_BIASES = (
    None, "", True, 1, ["add"], {"add": 1}, "Add", "add ", "fuse", "fused\n", "none", "eng",
    "eng-1", "eng\u0661", "eng1_k24", "eng1+identity", "eng1 + add", "engines", "ALGO_1",
    LONGEST + "_k1=1",
)  # fmt: skip


@pytest.mark.parametrize("bias", WRONG_BIASES, ids=ascii)
def test_a_wrong_bias_is_a_miss(
    root: Path, bias: object, warnings_of_store: Callable[[], list[str]]
) -> None:
    problem = make_problem(bias=True)
    for number in (1, 3):  # an engine, a legacy algorithm
        store.write(problem, BIASED)
        file = root / HERE / _stored.file_name(problem)
        changed = set_in("candidates", number, "bias", to=bias)(content_of(file))
        file.write_text(json.dumps(changed))
        assert store.read(problem) is None
    (text,) = warnings_of_store()
    assert "whose bias is" in text


def test_a_legacy_algorithm_that_claims_to_add_the_bias_is_a_miss(
    root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    problem = make_problem(bias=True)  # its result would lack the bias
    store.write(problem, BIASED)
    file = root / HERE / _stored.file_name(problem)
    file.write_text(json.dumps(set_in("candidates", 3, "bias", to="fused")(content_of(file))))
    assert "whose bias is" in assert_is_a_miss_with_one_warning(warnings_of_store, problem)


def test_the_entry_of_the_problem_without_its_bias_is_a_miss(
    root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    plain, biased = make_problem(), make_problem(bias=True)
    store.write(plain, CANDIDATES)
    folder = root / HERE
    os.replace(folder / _stored.file_name(plain), folder / _stored.file_name(biased))
    text = assert_is_a_miss_with_one_warning(warnings_of_store, biased)
    assert "is for another problem" in text


@pytest.mark.parametrize("math_type", ["DEFAULT_MATH", "TENSOR_OP_MATH"])
@pytest.mark.parametrize("name", ["eng5_k2=3_k24=0", "eng5_k2=3_k24=0+identity"])
def test_no_file_lets_an_engine_round_strict_float32(
    root: Path, name: str, math_type: str, warnings_of_store: Callable[[], list[str]]
) -> None:
    problem = make_problem(tf32=False)
    good = Candidate("graph", name, "FMA_MATH", True, 0, time_ms=1.0)
    rejected = replace(good, algorithm="eng1", math_type=math_type, rejected="it may round")
    store.write(problem, [good, rejected])
    assert store.read(problem) == [good, rejected]
    file = root / HERE / _stored.file_name(problem)
    file.write_text(json.dumps(set_in(*FIRST, "math_type", to=math_type)(content_of(file))))
    text = assert_is_a_miss_with_one_warning(warnings_of_store, problem)
    assert "it may round float32 to tf32" in text
    half = make_problem(dtype="float16", tf32=False)
    store.write(half, [replace(good, math_type=math_type)])
    assert store.read(half) == [replace(good, math_type=math_type)]


@pytest.mark.parametrize("math_type", ["DEFAULT_MATH", "TENSOR_OP_MATH_ALLOW_CONVERSION"])
def test_no_file_lets_a_less_precise_candidate_run(
    root: Path, math_type: str, warnings_of_store: Callable[[], list[str]]
) -> None:
    problem = make_problem(tf32=False)
    store.write(problem, [Candidate("legacy", "ALGO_1", "FMA_MATH", True, 0, time_ms=1.0)])
    file = root / HERE / _stored.file_name(problem)
    file.write_text(json.dumps(set_in(*FIRST, "math_type", to=math_type)(content_of(file))))
    assert "it may round" in assert_is_a_miss_with_one_warning(warnings_of_store, problem)


def a_link(file: Path) -> None:
    copy = file.with_name("elsewhere")
    os.replace(file, copy)
    file.symlink_to(copy)


def a_dangling_link(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.with_name("nowhere"))


def a_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def a_link_to_a_device(file: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [a_link, a_dangling_link, a_fifo, a_folder, a_link_to_a_device])
def test_what_is_not_a_regular_file_is_a_miss(
    root: Path, make: Callable[[Path], None], warnings_of_store: Callable[[], list[str]]
) -> None:
    make(written(root))
    text = assert_is_a_miss_with_one_warning(warnings_of_store)
    assert ("symbolic links" if "link" in make.__name__ else "not a regular file") in text
    assert store.list() == []


def test_a_file_that_cannot_be_opened_is_a_miss(
    root: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    file = written(root)
    refuse(monkeypatch, "open", errno.EACCES, lambda path: path == file)
    assert_is_a_miss_with_one_warning(warnings_of_store)


def test_a_file_replaced_by_another_nfs_client_is_a_silent_miss(
    root: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    file = written(root)
    refuse(monkeypatch, "open", errno.ESTALE, lambda path: path == file)
    assert store.read(make_problem()) is None
    assert warnings_of_store() == []


def test_the_log_level_of_the_environment_shows_the_warning(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = []
    monkeypatch.setattr(store.log, "_configure", lambda: configured.append(True))
    spoiled(root, b"")
    store.read(make_problem())
    assert configured == [True]


# Fuzzing

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=5,
)


def places(value: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if type(value) is dict else enumerate(value)
    found = [place] if place else []
    if type(value) in (dict, list):
        for key, each in inner:
            found += places(each, (*place, key)) if type(each) in (dict, list) else [(*place, key)]
    return found


SAFE_ENGINE = "eng[0-9]+(_k[0-9]+=[0-9]+)*"


def assert_is_well_formed(candidates: list[Candidate] | None, biased: bool = False) -> None:
    """Whatever was done to a file, what is read from it can be worked with."""
    assert candidates is None or 0 < len(candidates) <= 256
    for each in candidates or []:
        if each.provider == "legacy":
            assert each.algorithm in _loader.require().legacy_algorithms("dgrad")
            assert each.bias != "fused"
        else:
            assert each.provider == "graph"
            named = re.fullmatch(rf"{SAFE_ENGINE}(\+identity)?", each.algorithm)
            assert named or (each.algorithm.startswith("engines") and each.rejected)
        assert (each.bias is not None) is biased
        assert each.bias in (None, "fused", "add") or re.fullmatch(SAFE_ENGINE, each.bias)
        assert type(each.deterministic) is bool
        assert type(each.skipped) is bool
        assert type(each.workspace_bytes) is int
        assert each.workspace_bytes >= 0
        assert each.time_ms is None or (type(each.time_ms) is float and 0 < each.time_ms < 1e7)
        assert each.rejected is None or (each.rejected.isprintable() and each.rejected)
        assert each.out_of_memory is False


@pytest.mark.parametrize("biased", [False, True])
def test_json_changed_anywhere_never_raises(root: Path, biased: bool) -> None:
    problem = make_problem(bias=biased)
    file = written(root, problem)
    whole = file.read_text()
    all_places = places(json.loads(whole))

    @EXAMPLES
    @given(st.sampled_from(all_places), st.booleans(), JSON)
    def check(place: tuple[Any, ...], remove: bool, value: Any) -> None:
        change = without(*place) if remove else set_in(*place, to=value)
        changed = change(json.loads(whole))
        file.write_text(json.dumps(changed))
        read = store.read(problem)
        assert_is_well_formed(read, biased)
        if read is not None:  # nothing was dropped or repaired in silence
            store.write(problem, read)
            assert content_of(file) == changed

    check()


def test_bytes_changed_anywhere_never_raise(root: Path) -> None:
    file = written(root)
    whole = file.read_bytes()

    @EXAMPLES
    @given(st.integers(0, len(whole)), st.integers(0, 5), st.binary(max_size=5))
    def check(at: int, removed: int, added: bytes) -> None:
        file.write_bytes(whole[:at] + added + whole[at + removed :])
        assert_is_well_formed(store.read(make_problem()))

    check()


def test_an_export_changed_anywhere_raises_value_error_or_loads(root: Path, tmp_path: Path) -> None:
    written(root)
    exported = tmp_path / "export.json"
    store.export(exported)
    whole = exported.read_text()
    all_places = places(json.loads(whole))

    @EXAMPLES
    @given(st.sampled_from(all_places), st.booleans(), JSON)
    def check(place: tuple[Any, ...], remove: bool, value: Any) -> None:
        change = without(*place) if remove else set_in(*place, to=value)
        exported.write_text(json.dumps(change(json.loads(whole))))
        store.forget()
        try:
            loaded = store.load(exported)
        except ValueError:
            loaded = 0
        assert len(store.list()) == loaded
        assert not [file for file in tmp_path.iterdir() if file not in (root, exported)]

    check()


# Folders that cannot be used


def refuse(
    monkeypatch: pytest.MonkeyPatch, call: str, error: int, when: Callable[[Any], bool]
) -> None:
    """Let a call of ``os`` fail for some paths, as a file system would."""
    real = getattr(os, call)

    def failing(path: Any, *arguments: Any, **options: Any) -> Any:
        if when(path):
            raise OSError(error, os.strerror(error), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, call, failing)


def assert_costs_one_warning(warnings_of_store: Callable[[], list[str]]) -> None:
    for number in range(1, 4):
        store.write(numbered(number), CANDIDATES)
        assert store.read(numbered(number)) is None
    (text,) = warnings_of_store()
    assert str(store.path()) in text


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("call", ["open", "replace", "mkdir"])
def test_a_folder_that_cannot_be_written_costs_one_warning(
    root: Path,
    call: str,
    error: int,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of_store: Callable[[], list[str]],
) -> None:
    with monkeypatch.context() as patch:
        refuse(patch, call, error, lambda path: str(path).endswith(".tmp") or call == "mkdir")
        assert_costs_one_warning(warnings_of_store)
    assert [file for file in root.rglob("*") if not file.is_dir()] == []


def test_a_full_disk_costs_one_warning_and_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    real = os.open

    def open_full(path: Any, flags: int, *arguments: Any) -> int:
        descriptor = real(path, flags, *arguments)
        if flags & os.O_CREAT:
            full = real("/dev/full", os.O_WRONLY)
            os.dup2(full, descriptor)  # every write to it says that no space is left
            os.close(full)
        return descriptor

    monkeypatch.setattr(os, "open", open_full)
    assert_costs_one_warning(warnings_of_store)
    assert "No space left" in warnings_of_store()[0]
    assert [*(root / HERE).iterdir()] == []


@pytest.mark.parametrize(
    "path", ["/proc/none", "/sys/none", "/dev/null/none", "/" + "x" * 300, "/proc/self/status"]
)
def test_a_path_where_no_folder_can_be_costs_one_warning(
    path: str, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    monkeypatch.setenv("DGRAD_STORE", path)
    assert_costs_one_warning(warnings_of_store)


def test_a_file_in_place_of_a_folder_costs_one_warning(
    root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    root.touch()
    assert_costs_one_warning(warnings_of_store)


def test_a_dangling_link_in_place_of_the_folder_costs_one_warning(
    root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    root.symlink_to(root.with_name("nowhere"))
    assert store.read(make_problem()) is None
    assert warnings_of_store() == []
    assert_costs_one_warning(warnings_of_store)


@pytest.mark.parametrize("which", ["root", "leaf"])
def test_a_link_to_a_folder_of_the_users_own_is_followed(
    root: Path, which: str, warnings_of_store: Callable[[], list[str]]
) -> None:
    written(root)
    link = root if which == "root" else root / HERE
    aside = root.with_name("aside")
    os.replace(link, aside)
    link.symlink_to(aside)
    assert store.read(make_problem()) == CANDIDATES
    store.write(numbered(1), CANDIDATES)
    assert len(store.list()) == 2
    assert warnings_of_store() == []


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make another user the owner of ``path``; where that is not allowed, say that it is so."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
        return
    inode = path.stat().st_ino

    def pretend(real: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
        def call(*arguments: Any, **options: Any) -> os.stat_result:
            result = real(*arguments, **options)
            values = [
                12345 if i == 4 and result.st_ino == inode else v for i, v in enumerate(result)
            ]
            return os.stat_result(values)

        return call

    for name in ("stat", "fstat"):
        monkeypatch.setattr(os, name, pretend(getattr(os, name)))


@pytest.mark.parametrize("which", ["root", "leaf"])
def test_a_folder_of_another_user_is_refused_with_one_warning(
    root: Path,
    which: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of_store: Callable[[], list[str]],
) -> None:
    file = written(root)
    before = file.read_bytes()
    exported = tmp_path / "export.json"
    store.export(exported)
    give_away(root if which == "root" else root / HERE, monkeypatch)
    for _ in range(2):
        assert store.read(make_problem()) is None
        store.write(make_problem(), CANDIDATES[:2])
        store.write(numbered(1), CANDIDATES)
    assert store.list() == []
    assert store.forget() == 0
    with pytest.raises(PermissionError, match="belongs to user 12345"):
        store.load(exported)
    assert [*(root / HERE).iterdir()] == [file]
    assert file.read_bytes() == before
    assert len(warnings_of_store()) == 1
    assert "belongs to user 12345" in warnings_of_store()[0]


def test_a_new_folder_is_not_made_in_the_root_of_another_user(
    root: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    root.mkdir()
    give_away(root, monkeypatch)
    store.write(make_problem(), CANDIDATES)
    assert [*root.iterdir()] == []
    assert len(warnings_of_store()) == 1


def test_a_file_of_another_user_is_a_miss(
    root: Path, monkeypatch: pytest.MonkeyPatch, warnings_of_store: Callable[[], list[str]]
) -> None:
    give_away(written(root), monkeypatch)
    assert "12345" in assert_is_a_miss_with_one_warning(warnings_of_store)


# The user's commands


def test_list_says_what_is_stored_and_the_fastest(root: Path) -> None:
    file = written(root)
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


def test_list_says_how_the_bias_is_added(root: Path) -> None:
    written(root, make_problem(bias=True))
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


def test_nothing_is_listed_before_anything_is_stored(root: Path) -> None:
    assert store.list() == []
    assert store.forget() == 0
    assert not root.exists()


def test_foreign_files_in_the_store_are_left_alone(root: Path) -> None:
    file = written(root)
    for name in ("README", ".hidden", "0.json", file.name + ".bak"):
        (root / HERE / name).write_text("mine")
    (root / "mine").mkdir()
    (root / "mine" / file.name).write_text("mine")
    assert len(store.list()) == 1
    assert store.forget() == 1
    assert len([*root.rglob("*")]) == 7


def test_exports_of_several_machines_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exports = []
    for number, folder in enumerate((HERE, OTHER_GPU, OTHER_CUDNN)):
        monkeypatch.setenv("DGRAD_STORE", str(tmp_path / f"machine {number}"))
        monkeypatch.setattr(store, "_folder_name", lambda device, folder=folder: folder)
        times = [replace(CANDIDATES[0], time_ms=1.0 + number), *CANDIDATES[1:]]
        store.write(make_problem(), times)
        store.write(numbered(11 + number), times)
        exports.append(tmp_path / f"{number}.json")
        assert store.export(exports[-1]) == 2

    monkeypatch.setenv("DGRAD_STORE", str(tmp_path / "merged"))
    monkeypatch.setattr(store, "_folder_name", lambda device: HERE)
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


def test_the_bias_tells_candidates_apart_when_an_entry_is_loaded(root: Path) -> None:
    problem = make_problem(bias=True)
    store.write(problem, BIASED)
    exported = root.with_name("export.json")
    store.export(exported)
    store.write(problem, BIASED[1:3])
    store.load(exported)
    assert store.read(problem) == BIASED


def test_two_entries_that_make_none_together_leave_the_loaded_one(tmp_path: Path) -> None:
    stored = [replace(_FIRST, time_ms=1.0), replace(_SECOND, rejected="it failed")]
    loaded = [FAILED, _SECOND]
    assert load_over(tmp_path, stored, loaded) == loaded
    many = [replace(_FIRST, algorithm=f"eng{n}") for n in range(300)]
    assert load_over(tmp_path, many[:200], many[200:]) == many[200:]


def test_a_spoiled_entry_is_replaced_by_the_loaded_one(root: Path, tmp_path: Path) -> None:
    file = written(root)
    store.export(tmp_path / "export.json")
    file.write_bytes(b"{}")
    assert store.load(tmp_path / "export.json") == 1
    assert store.read(make_problem()) == CANDIDATES


def test_an_export_that_cannot_be_finished_leaves_the_old_one(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(root)
    exported = tmp_path / "export.json"
    exported.write_text("of old")
    for call in ("open", "replace"):
        with monkeypatch.context() as patch:
            refuse(patch, call, errno.ENOSPC, lambda path: str(path).endswith(".tmp"))
            with pytest.raises(OSError, match="No space left") as caught:
                store.export(exported)
            assert caught.value.filename == str(exported)
    assert exported.read_text() == "of old"
    assert sorted(tmp_path.iterdir()) == [exported, root]


def test_an_export_may_be_read_as_other_files_of_the_user(root: Path, tmp_path: Path) -> None:
    written(root)
    before = os.umask(0o027)
    try:
        store.export(tmp_path / "export.json")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "export.json").stat().st_mode) == 0o640


def test_an_export_follows_a_link_and_writes_to_a_pipe(root: Path, tmp_path: Path) -> None:
    written(root)
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


def test_an_export_leaves_out_what_is_spoiled(root: Path, tmp_path: Path) -> None:
    spoiled(root, b"{}")
    written(root, numbered(1))
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
    root: Path, tmp_path: Path, folder: str
) -> None:
    entry = content_of(written(root))
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
def test_what_is_no_export_is_refused(root: Path, tmp_path: Path, content: bytes) -> None:
    exported = tmp_path / "bad.json"
    exported.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(exported))):
        store.load(exported)
    assert not root.exists()


def test_a_missing_export_and_a_folder_that_cannot_be_written_raise(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError):
        store.load(tmp_path / "none.json")
    written(root)
    with pytest.raises(FileNotFoundError):
        store.export(tmp_path / "no folder" / "export.json")
    store.export(tmp_path / "export.json")
    monkeypatch.setenv("DGRAD_STORE", "/dev/null/none")
    with pytest.raises(NotADirectoryError):
        store.load(tmp_path / "export.json")


def test_forget_takes_a_part_of_the_problems_text(root: Path) -> None:
    double = make_problem(dtype="float64", tf32=False)
    for problem in (make_problem(), double, numbered(1)):
        store.write(problem, CANDIDATES)
    assert store.forget("float16") == 0
    assert store.forget("float64") == 1
    assert store.read(double) is None
    assert store.forget("x=1x8x") == 1
    assert store.read(make_problem()) == CANDIDATES
    assert store.forget() == 1
    assert store.read(make_problem()) is None


def test_forgetting_everything_takes_spoiled_entries_too(
    root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    file = spoiled(root, b"{}")
    assert store.forget("dgrad") == 0
    assert store.forget() == 1
    assert not file.exists()


def test_a_negative_knob_is_kept() -> None:
    """As in cuDNN 9.19's names of engines for fprop: eng41_k2=0_k12=-1_k13=2."""
    engine = Candidate("graph", "eng41_k2=0_k12=-1_k13=2", "FMA_MATH", True, 0, time_ms=1.0)
    problem = make_problem()
    assert _stored.validated(_stored.decode(_stored.encode(problem, [engine])))[1] == [engine]
