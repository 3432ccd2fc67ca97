"""What anybody spoiled in the store is a miss with one warning, and no more."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dgrad import store
from stored import (
    CANDIDATES,
    FIRST,
    HERE,
    MARKS,
    OTHER_GPU,
    assert_is_a_miss_with_one_warning,
    content_of,
    fork,
    make_problem,
    numbered,
    set_in,
    spoiled,
    wait,
    without,
    written,
)

pytestmark = MARKS


def test_a_file_cut_off_anywhere_is_a_miss(
    store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    store.write(make_problem(), CANDIDATES[:1])
    (file,) = (store_root / HERE).iterdir()
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        assert store.read(make_problem()) is None
    assert len(warnings_of_store()) == 1
    store.write(make_problem(), CANDIDATES)
    assert store.read(make_problem()) == CANDIDATES


def test_a_thousand_spoiled_entries_cost_one_warning(
    store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    first = spoiled(store_root, b"{}")
    assert store.read(make_problem()) is None
    for number in range(1000):
        (store_root / HERE / f"{number:032x}.json").write_bytes(b"{}")
    assert store.list() == []
    (text,) = warnings_of_store()
    assert str(first) in text
    assert text.endswith("; this is told of the first one only")
    assert len(store.spoiled()) == 1001


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
    store_root: Path, content: bytes, warnings_of_store: Callable[[], list[str]]
) -> None:
    spoiled(store_root, content)
    assert_is_a_miss_with_one_warning(warnings_of_store)


def test_nothing_that_is_read_is_executed(
    store_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    warnings_of_store: Callable[[], list[str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    harm = Path(f"{store_root}.harm")
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps(Harmful(), protocol)
        spoiled(store_root, pickled)
        assert store.read(make_problem()) is None
        with pytest.raises(ValueError, match="is not an export"):
            store.load(next((store_root / HERE).iterdir()))
        assert not harm.exists()
    assert len(warnings_of_store()) == 1
    pickle.loads(pickled)
    assert harm.exists()  # so it would have been noticed


def test_deep_nesting_is_a_miss_even_where_the_program_allows_deep_recursion(
    store_root: Path,
) -> None:
    def read() -> None:
        import sys

        sys.setrecursionlimit(10**6)
        assert store.read(make_problem()) is None

    for content in (b"[" * 65_536, b'{"a":' * 13_000):
        spoiled(store_root, content)
        assert wait(fork(read)) == 0


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
    store_root: Path, label: str, warnings_of_store: Callable[[], list[str]]
) -> None:
    file = written(store_root)
    file.write_text(json.dumps(WRONG[label](content_of(file))))
    text = assert_is_a_miss_with_one_warning(warnings_of_store)
    assert str(file) in text
    assert ("1 to 256 candidates" in text) == (label in NOT_A_FEW_CANDIDATES)
    assert store.list() == []


@pytest.mark.parametrize("label", WRONG)
def test_an_export_with_something_wrong_is_refused_as_a_whole(
    store_root: Path, tmp_path: Path, label: str
) -> None:
    file = written(store_root)
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
    store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    other, mine = written(store_root, numbered(1)), written(store_root)
    os.replace(other, mine)
    text = assert_is_a_miss_with_one_warning(warnings_of_store)
    assert "is for another problem" in text
    assert store.list() == []


def test_the_log_level_of_the_environment_shows_the_warning(
    store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configured = []
    monkeypatch.setattr(store.log, "_configure", lambda: configured.append(True))
    spoiled(store_root, b"")
    store.read(make_problem())
    assert configured == [True]
