"""The record of the gpu tests: parts are complete and disjoint, and make one record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import in_part
from merge_gpu import main, merged


@given(costs=st.lists(st.floats(0.1, 200), max_size=60), count=st.integers(1, 6))
def test_each_test_is_in_one_part(costs: list[float], count: int) -> None:
    parts = [in_part(costs, number, count) for number in range(1, count + 1)]
    assert all(sum(chosen) == 1 for chosen in zip(*parts, strict=True))


def part(**changes: Any) -> dict[str, Any]:
    fields = {
        "device": "H200",
        "command": "pytest -m gpu --part 1/2",
        "passed": 5,
        "failed": 1,
        "skipped": 2,
        "failures": ["a"],
        "duration_s": 1.25,
        "code_hash": "c0de",
        "date": "2026-01-01",
    }
    return fields | changes


def test_counts_are_added() -> None:
    second = part(passed=7, failures=["b"], command="pytest -m gpu --part 2/2", date="2026-01-02")
    whole = merged([part(), second])
    assert (whole["passed"], whole["failed"], whole["skipped"]) == (12, 2, 4)
    assert whole["failures"] == ["a", "b"]
    assert whole["duration_s"] == 2.5
    assert whole["command"] == "pytest -m gpu --part 1/2 & pytest -m gpu --part 2/2"
    assert (whole["code_hash"], whole["date"]) == ("c0de", "2026-01-02")


def test_parts_of_other_code_are_no_one_record() -> None:
    with pytest.raises(ValueError, match="code_hash is 'c0de' in one part, 'f00d' in another"):
        merged([part(), part(code_hash="f00d")])


def test_a_missing_part_is_named_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gpu.part-2-of-3.json").write_text(json.dumps(part()))
    assert main(tmp_path) == 1
    assert "of 3 parts these are missing: [1, 3]" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_parts_of_each_provider_become_one_file(tmp_path: Path) -> None:
    for name in ("gpu", "gpu-legacy"):
        for number in (1, 2):
            file = tmp_path / f"{name}.part-{number}-of-2.json"
            file.write_text(json.dumps(part(passed=len(name) * number)))
    assert main(tmp_path) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu-legacy.json", "gpu.json"]
    assert json.loads((tmp_path / "gpu-legacy.json").read_text())["passed"] == 30


def test_parts_of_two_runs_are_told_and_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("gpu.part-1-of-1.json", "gpu.part-1-of-2.json", "gpu.part-2-of-2.json"):
        (tmp_path / name).write_text(json.dumps(part()))
    assert main(tmp_path) == 1
    assert "there are parts of two runs" in capsys.readouterr().err
    assert len([*tmp_path.iterdir()]) == 3
