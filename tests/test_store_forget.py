"""What is forgotten: the entries of whole words, as many as can be, and everything."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dgrad import Candidate, store
from stored import (
    CANDIDATES,
    HERE,
    MARKS,
    OTHER_GPU,
    a_folder,
    make_problem,
    numbered,
    refuse,
    spoiled,
    written,
)

pytestmark = MARKS


@pytest.mark.parametrize(
    ("words", "count"),
    [
        ("float16", 1),
        ("bfloat16", 1),
        ("float32", 2),
        ("float", 0),
        ("tf32", 2),
        ("float32/tf32 nchw", 2),
        ("dgrad", 4),
        ("dgrad+bias", 1),
        ("bias", 1),
        ("grad", 0),
        ("x=2x8x17x17", 4),
        ("x=2x8x17x1", 0),
        ("2x8x17x17", 0),
        ("stride=2,2", 4),
        ("stride=2", 0),
        ("groups=1 alignment=16", 4),
        ("groups=1 align", 0),
        ("alignment=1", 0),
        ("x=.*", 0),
        ("", 0),
        (" ", 0),
    ],
)
def test_forget_takes_whole_words_of_the_problems_text(words: str, count: int) -> None:
    problems = [make_problem(), make_problem(bias=True)]
    problems += [make_problem(dtype=dtype, tf32=False) for dtype in ("float16", "bfloat16")]
    for problem in problems:
        candidates = [each for each in CANDIDATES if each.provider == "graph"]
        store.write(problem, [_with_bias(each, problem.bias) for each in candidates])
    assert len(store.list()) == 4
    assert store.forget(words) == count
    assert len(store.list()) == 4 - count


def _with_bias(candidate: Candidate, bias: bool) -> Candidate:
    return replace(candidate, bias="add") if bias else candidate


def test_forgetting_everything_takes_spoiled_entries_too(store_root: Path) -> None:
    file = spoiled(store_root, b"{}")
    assert store.forget("dgrad") == 0
    assert store.forget() == 1
    assert not file.exists()


@pytest.mark.parametrize("words", [None, "dgrad"])
def test_what_cannot_be_removed_is_told_at_the_end_and_the_rest_is_gone(
    store_root: Path, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = sorted(written(store_root, numbered(number)) for number in range(1, 6))
    stay = [files[0], files[3]]
    refuse(monkeypatch, "unlink", errno.EACCES, lambda path: path in stay)
    with pytest.raises(OSError, match="removed 3 entries, with 2 errors: ") as caught:
        store.forget(words)
    assert all(str(file) in str(caught.value) for file in stay)
    assert sorted((store_root / HERE).iterdir()) == stay


def test_a_folder_that_cannot_be_listed_keeps_no_other_from_being_emptied(
    store_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(store_root)
    (store_root / OTHER_GPU).mkdir(mode=0o700)
    os.replace(file, store_root / OTHER_GPU / file.name)
    refuse(monkeypatch, "listdir", errno.EACCES, lambda path: path == store_root / HERE)
    with pytest.raises(OSError, match="removed 1 entries, with 1 errors: "):
        store.forget()
    assert [*(store_root / OTHER_GPU).iterdir()] == []


def test_a_folder_in_the_place_of_an_entry_stays(
    store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    file = written(store_root)
    a_folder(file)
    assert store.forget("dgrad") == 0
    with pytest.raises(OSError, match="removed 0 entries, with 1 errors: "):
        store.forget()
    assert len(warnings_of_store()) == 1
