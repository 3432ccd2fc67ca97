"""The records of bench and its plot, with contestants that are pretended."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import dgrad
from bench_layers import SMALL
from dgrad import _cli_bench
from dgrad.bench.contest import Settings
from dgrad.bench.record import Record, RecordError
from dgrad.bench.suite import Case, cases
from dgrad.cli import main

MACHINE: dict[str, Any] = {
    "device": "a GPU",
    "driver": "1.2",
    "versions": {"torch": "2.0", "cudnn_loaded": "9.1"},
    "tf32": True,
}


class Pretended:
    """Contestants that need no time: dgrad's ratio by the layer's name, or None where it fails."""

    def __init__(self, ratios: dict[str, float | None]) -> None:
        self.ratios = ratios
        self.machine = dict(MACHINE)
        self.ran: list[str] = []
        self.settings: Settings | None = None
        self.interrupted = False
        self.failing_peer: str | None = None

    def __call__(self, asked: Settings) -> Pretended:
        self.settings = asked
        return self

    def __enter__(self) -> Pretended:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def ceilings(self, dtypes: list[str]) -> dict[str, Any]:
        return {"copy_bytes_per_s": 1e9, "matmul_flops_per_s": dict.fromkeys(dtypes, 1e12)}

    def run(self, case: Case) -> dict[str, Any]:
        if self.interrupted and self.ran:
            raise KeyboardInterrupt
        assert self.settings is not None
        self.ran.append(case.label)
        ratio = self.ratios[case.name]
        peers = {"torch": 8.0, "torch-benchmark": 6.0, "torch-compile": 7.0}
        return {
            **case.to_dict(),
            "contestants": {
                **{
                    name: {"error": "died"} if name == self.failing_peer else _times(peers[name])
                    for name in self.settings.against
                },
                "dgrad": {"error": "out of memory"} if ratio is None else _times(6.0 / ratio),
            },
            "selected": [
                {
                    "direction": "dgrad",
                    "candidate": "legacy:ALGO_1 (DEFAULT_MATH)",
                    "source": "measured",
                    "workspace_bytes": 0,
                    "time_ms": 1.0,
                }
            ],
        }


def _times(time_ms: float) -> dict[str, Any]:
    device = {"median": time_ms, "q1": time_ms, "q3": time_ms, "min": time_ms, "runs": 15}
    eager = {"eager_ms": 2 * time_ms, "host_us": 10.0}
    return {"device_ms": device, **eager, "calls": 3, "not_captured": None}


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    contestants = Pretended({"net/up1": 1.5, "net/up2": 0.96})
    monkeypatch.setattr(_cli_bench, "Contest", contestants)
    monkeypatch.setattr(dgrad, "unavailable_reason", lambda: None)
    return contestants


@pytest.fixture
def bench(
    pretended: Pretended, file: Callable[..., str], tmp_path: Path
) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run the command on SMALL; the exit code and the record."""

    def run(*more: str, out: str = "out.json") -> tuple[int, dict[str, Any]]:
        path = tmp_path / out
        code = main(["bench", "--suite", file(SMALL), "--json", str(path), *more])
        return code, json.loads(path.read_text()) if path.exists() else {}

    return run


def test_the_summary_counts_and_names_the_extremes(bench: Any, capsys: Any) -> None:
    code, record = bench("--layout", "nchw,nhwc", "--against", "torch,torch-benchmark")
    assert code == 0
    summary = record["summary"]
    mean = (1.5 * 0.96) ** 0.5
    for each in (summary, *summary["groups"]):
        assert each["cases"] == 2 * each["slower"] == (4 if each is summary else 2)
        assert each["failed"] == 0
        assert each["min_ratio"] == 0.96
        assert each["geomean_ratio"] == each["geomean_eager_ratio"] == pytest.approx(mean, 1e-3)
    assert [group["layout"] for group in summary["groups"]] == ["nchw", "nhwc"]
    assert [each["ratio"] for each in summary["best"]] == [1.5, 1.5, 0.96, 0.96]
    assert summary["worst"][0]["case"].startswith("net/up2 float32 n")
    assert {case["best"] for case in record["cases"]} == {"torch-benchmark"}
    out = capsys.readouterr().out
    assert "a GPU, driver 1.2, PyTorch 2.0, cuDNN 9.1" in out
    assert "copy 0.001 TB/s, matrix product float32 1 TFLOP/s" in out
    assert "legacy:ALGO_1 (DEFAULT_MATH), measured" in out
    assert out.count("1.200") == 6  # geometric means: two groups and all, twice


def test_every_option_reaches_the_contestants(pretended: Pretended, bench: Any) -> None:
    more = ["--against", "torch-compile,torch", "--selection", "measure", "--rounds", "7"]
    pretended.ratios = {"net/up1": None}
    code, record = bench(*more, "--only", "1", "--dtype", "half,bf16", "--direction", "training")
    assert code == 1
    assert pretended.settings == Settings(("torch-compile", "torch"), "measure", 7, "cuda")
    assert pretended.ran == ["net/up1 float16 nchw", "net/up1 bfloat16 nchw"]
    assert record["meta"]["command"] == (
        "python -m dgrad bench --suite what.json --against torch-compile,torch --direction "
        "training --selection measure --rounds 7 --dtype float16,bfloat16 --layout nchw --only 1"
    )


def test_a_failure_is_told_and_tried_again(
    pretended: Pretended, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended.ratios["net/up1"] = None
    code, record = bench()
    assert code == 1
    assert "bench: net/up1 float32 nchw: dgrad: out of memory" in capsys.readouterr().err
    assert record["cases"][0]["ratio"] is None
    assert (record["summary"]["failed"], record["summary"]["min_ratio"]) == (1, 0.96)
    pretended.ratios["net/up1"] = 2.0
    code, record = bench("--resume")
    assert code == 0
    assert pretended.ran == [f"net/up{n} float32 nchw" for n in (1, 2, 1)]
    assert {case["name"]: case["ratio"] for case in record["cases"]} == {
        "net/up1": 2.0,
        "net/up2": 0.96,
    }


def test_a_peer_that_failed_leaves_the_case_unfinished(pretended: Pretended, bench: Any) -> None:
    pretended.failing_peer = "torch-benchmark"
    code, record = bench()
    assert code == 1
    assert record["cases"][0]["ratio"] == 2.0  # over the slower peer
    assert record["summary"]["failed"] == 2
    pretended.failing_peer = None
    code, record = bench("--resume")
    assert (code, record["summary"]["failed"], len(pretended.ran)) == (0, 0, 4)


@pytest.mark.parametrize("first", ["bad", "good"])
def test_of_two_records_the_finished_case_is_taken(
    pretended: Pretended, bench: Any, tmp_path: Path, first: str
) -> None:
    pretended.ratios["net/up1"] = None
    bench(out="bad.json")
    pretended.ratios["net/up1"] = 2.0
    bench(out="good.json")
    names = ("bad", "good") if first == "bad" else ("good", "bad")
    records = [Record.load(tmp_path / f"{name}.json") for name in names]
    records[0].absorb(records[1])
    assert records[0].summary()["failed"] == 0


def test_an_interrupted_run_goes_on_where_it_stopped(
    pretended: Pretended, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended.interrupted = True
    code, record = bench()
    assert code == 130
    assert "interrupted" in capsys.readouterr().err
    assert [case["name"] for case in record["cases"]] == ["net/up1"]
    pretended.interrupted = False
    code, record = bench("--resume", "--layout", "nchw,nhwc")
    assert code == 0
    assert len(pretended.ran) == len(set(pretended.ran)) == len(record["cases"]) == 4
    assert record["meta"]["command"].count("python -m dgrad bench") == 2
    pretended.ran.clear()
    assert bench("--resume")[0] == 0
    assert bench("--resume", "--rounds", "9")[0] == 2  # though nothing is left to time
    assert pretended.ran == []


def test_seconds_end_a_run_between_two_cases(
    pretended: Pretended, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 10.0, 10.1])  # the begin, and before each case
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: next(clock, 10.1))
        code, record = bench("--seconds", "10")
    assert code == 4
    assert len(record["cases"]) == 1
    assert bench("--resume", "--seconds", "1000")[0] == 0


@pytest.mark.parametrize(
    ("change", "more", "words"),
    [
        ({"driver": "1.3"}, [], "driver: '1.2' was recorded, now '1.3'"),
        ({"tf32": False}, [], "tf32: True was recorded, now False"),
        ({"versions": {"torch": "2.1"}}, [], "versions: torch '2.0' was recorded, now '2.1'"),
        ({}, ["--rounds", "9"], "options: rounds 5 was recorded, now 9"),
    ],
)
def test_a_record_of_another_machine_or_setting_is_not_continued(
    pretended: Pretended,
    bench: Any,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    more: list[str],
    words: str,
) -> None:
    _, before = bench("--only", "1")
    pretended.machine.update(change)
    code, after = bench("--resume", *more)
    assert code == 2
    assert words in capsys.readouterr().err
    assert after == before


def test_records_are_merged_printed_and_drawn_without_a_gpu(
    bench: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bench("--only", "1", out="1.json")
    bench("--only", "2", "--dtype", "float32,bfloat16", out="2.json")
    monkeypatch.setattr(dgrad, "unavailable_reason", lambda: "there is none")
    capsys.readouterr()
    paths = [str(tmp_path / name) for name in ("1.json", "2.json", "all.json", "all.png")]
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra 'plot'")
    assert main(["bench", "--from", *paths[:2], "--json", paths[2], "--plot", paths[3]]) == 0
    out, err = capsys.readouterr()
    assert "net/up1" in out
    assert "net/up2" in out
    assert err == ""
    merged = json.loads(Path(paths[2]).read_text())
    assert merged["summary"]["cases"] == 3
    assert set(merged["meta"]["ceilings"]["matmul_flops_per_s"]) == {"float32", "bfloat16"}
    assert Path(paths[3]).read_bytes().startswith(b"\x89PNG")
    assert Record.load(paths[2]).to_dict() == merged
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == []


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"meta": {}, "cases": []}', '{"meta": 1}', '{"cases": [{}]}']
)
def test_a_file_that_is_no_record_is_refused(file: Callable[..., str], content: str) -> None:
    with pytest.raises(RecordError, match=r"what\.json is no record of bench"):
        Record.load(file(content))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record["meta"].update(versions={}),
        lambda record: record["meta"].update(ceilings=[]),
        lambda record: record["cases"][0].update(contestants=[]),
        lambda record: record["cases"][0].pop("selected"),
        lambda record: record["cases"][0]["contestants"]["dgrad"].pop("host_us"),
        lambda record: record["cases"][0]["contestants"]["dgrad"].update(eager_ms=float("nan")),
    ],
)
def test_a_damaged_record_is_refused_by_the_command(
    spoil: Callable[[Any], Any], bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench()
    path = tmp_path / "out.json"
    record = json.loads(path.read_text())
    spoil(record)
    path.write_text(json.dumps(record))
    capsys.readouterr()
    assert main(["bench", "--from", str(path)]) == 2
    assert "out.json is no record of bench" in capsys.readouterr().err


def test_the_record_and_the_plot_are_two_files(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra 'plot'")
    path = str(tmp_path / "both.png")
    assert main(["bench", "--from", path, "--json", path, "--plot", path]) == 2
    assert "expected two files" in capsys.readouterr().err
    assert main(["bench", "--from", path, "--plot", str(tmp_path / "x.pgf")]) == 2
    assert "x.pgf: expected a name that ends in" in capsys.readouterr().err


def test_a_case_of_other_sizes_is_not_finished(bench: Any, tmp_path: Path) -> None:
    bench()
    record = Record.load(tmp_path / "out.json")
    case = next(iter(cases(str(tmp_path / "what.json"))))
    assert record.has(case)
    assert not record.has(replace(case, layer=replace(case.layer, out_channels=4)))
    assert not record.has(replace(case, layer=replace(case.layer, channels_last=True)))


# --- the plot -----------------------------------------------------------------------------------


def test_a_plot_needs_a_ratio(
    pretended: Pretended, bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib, of the extra 'plot'")
    pretended.ratios = {"net/up1": None, "net/up2": None}
    assert bench("--plot", str(tmp_path / "out.svg"))[0] == 2
    assert "bench: there is no case to plot" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named_before_the_run(
    pretended: Pretended,
    bench: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert bench("--plot", "out.png")[0] == 2
    assert "pip install 'dgrad[plot]'" in capsys.readouterr().err
    assert pretended.ran == []
