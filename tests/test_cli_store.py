"""The command store, on any machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dgrad import store
from dgrad.cli import main
from pretended import problem, selection

pytestmark = pytest.mark.usefixtures("own_store")


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["store", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    result: dict[str, Any] = json.loads(out)
    return result


@pytest.fixture
def stored(folder: Path) -> Any:
    """A store with one entry, as a pretended GPU would have written it."""
    store.write(problem(), selection(problem()).candidates)
    assert len(store.list()) == 1
    return problem()


def test_store_list_shows_the_fastest(stored: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["store", "list"]) == 0
    header, row, end = capsys.readouterr().out.splitlines()
    assert header.split() == ["problem", "fastest", "time", "folder"]
    assert row.startswith("dgrad float32/tf32 nchw x=2x6x11x13")
    assert "legacy:ALGO_1 (TENSOR_OP_MATH)  0.5 ms  NVIDIA-Pretended-1_sm90_cudnn-" in row
    assert end == f"1 entry, store {store.path()}"
    assert _run(capsys, "list") == {"entries": store.list()}


def test_store_moves_to_another_folder_and_is_forgotten(
    stored: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = str(tmp_path / "moved.json")
    assert _run(capsys, "export", moved) == {"exported": 1}
    assert _run(capsys, "forget") == {"removed": 1}
    assert _run(capsys, "list") == {"entries": []}
    monkeypatch.setenv("DGRAD_STORE", str(tmp_path / "other"))
    assert _run(capsys, "load", moved) == {"loaded": 1}
    assert main(["store", "forget"]) == 0
    assert capsys.readouterr().out == f"1 entry removed, store {tmp_path / 'other'}\n"
    assert main(["store", "load", moved]) == 0
    assert "1 entry loaded" in capsys.readouterr().out
    assert main(["store", "export", moved]) == 0
    assert capsys.readouterr().out == f"1 entry written to {moved}\n"


@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("action", ["list", "export"])
def test_store_names_the_spoiled_entries_among_others(
    stored: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    action: str,
    as_json: bool,
) -> None:
    file = Path(store.list()[0]["file"])
    spoiled = [file.with_name(f"{number:032x}.json") for number in range(3)]
    spoiled[0].write_text("{")
    spoiled[1].write_bytes(file.read_bytes())
    spoiled[2].write_text("[" * 5000)
    arguments = [action, *([str(tmp_path / "all.json")] if action == "export" else [])]
    assert main(["store", *arguments, *(["--json"] if as_json else [])]) == 0
    out, err = capsys.readouterr()
    assert "1 entry" in out or json.loads(out) in ({"exported": 1}, {"entries": store.list()})
    first, *lines = err.splitlines()
    assert first == f"store {action}: left out as spoiled: 3 entries"
    assert [line.partition(": it ")[0] for line in lines] == [f"  {path}" for path in spoiled]
    assert lines[1].endswith(": it is for another problem")
    assert {*store.spoiled()} == {str(path) for path in spoiled}
    assert main(["store", "forget"]) == 0
    assert store.spoiled() == {}


def test_store_says_its_folder_and_that_it_is_empty(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = str(tmp_path / "store")
    assert main(["store", "path"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert _run(capsys, "path") == {"path": folder}
    assert main(["store", "list"]) == 0
    assert capsys.readouterr().out == f"0 entries, store {folder}\n"
    assert _run(capsys, "forget") == {"removed": 0}


def test_store_says_that_it_is_off(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DGRAD_STORE", "off")
    for action, words in (
        ("path", "off"),
        ("list", "0 entries: the store is off"),
        ("forget", "0 entries removed: the store is off"),
    ):
        assert main(["store", action]) == 0
        assert capsys.readouterr().out == f"{words}\n"
    assert _run(capsys, "path") == {"path": None}
    for action in ("export", "load"):
        assert main(["store", action, str(tmp_path / "file.json")]) == 2
        assert f"store {action}: the store is off" in capsys.readouterr().err


def test_store_refuses_a_bad_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text("[1, 2")
    for arguments in (
        ["load", str(bad)],
        ["load", str(tmp_path / "nowhere.json")],
        ["export", str(tmp_path / "no folder" / "file.json")],
    ):
        assert main(["store", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"store {arguments[0]}: ")


@pytest.mark.parametrize("arguments", [[], ["burn"], ["load"], ["forget", "something"]])
def test_store_needs_a_known_action(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["store", *arguments])
    assert caught.value.code == 2
