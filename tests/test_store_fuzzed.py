"""Entries and exports of the store, changed anywhere."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dgrad import Candidate, _loader, store
from stored import MARKS, content_of, make_problem, set_in, without, written

pytestmark = MARKS


EXAMPLES = settings(max_examples=150, deadline=None, database=None)
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
def test_json_changed_anywhere_never_raises(store_root: Path, biased: bool) -> None:
    problem = make_problem(bias=biased)
    file = written(store_root, problem)
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


def test_bytes_changed_anywhere_never_raise(store_root: Path) -> None:
    file = written(store_root)
    whole = file.read_bytes()

    @EXAMPLES
    @given(st.integers(0, len(whole)), st.integers(0, 5), st.binary(max_size=5))
    def check(at: int, removed: int, added: bytes) -> None:
        file.write_bytes(whole[:at] + added + whole[at + removed :])
        assert_is_well_formed(store.read(make_problem()))

    check()


def test_an_export_changed_anywhere_raises_value_error_or_loads(
    store_root: Path, tmp_path: Path
) -> None:
    written(store_root)
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
        assert not [file for file in tmp_path.iterdir() if file not in (store_root, exported)]

    check()
