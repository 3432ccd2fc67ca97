"""The contestants of bench: rehearsed on the CPU, failing, dying, hanging."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench_layers import SMALL
from dgrad.bench import _process, contest
from dgrad.bench.contest import Contest, ContestError, Settings
from dgrad.bench.suite import cases
from dgrad.cli import main


@pytest.fixture
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("direction", ["forward", "training"])
def test_a_rehearsal_on_the_cpu_times_all_contestants(
    direction: str, file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    arguments = ["--suite", file(SMALL), "--direction", direction, "--dtype", "fp32,float64"]
    arguments += ["--rounds", "2", "--device", "cpu", "--json", str(out)]
    assert main(["bench", *arguments]) == 0
    printed, err = capsys.readouterr()
    assert err == ""
    record = json.loads(out.read_text())
    assert [case["name"] for case in record["cases"]] == ["net/up1"] * 2 + ["net/up2"] * 2
    assert [case["dtype"] for case in record["cases"]] == ["float32", "float64"] * 2
    for case in record["cases"]:
        assert case["direction"] == direction
        assert list(case["contestants"]) == ["torch", "torch-benchmark", "dgrad"]
        times = {}
        for name, each in case["contestants"].items():
            device = each["device_ms"]
            assert 0 < device["min"] <= device["q1"] <= device["median"] <= device["q3"]
            assert device["runs"] == 6
            assert each["eager_ms"] > 0
            assert each["host_us"] > 0
            times[name] = device["median"]
        best = min(times["torch"], times["torch-benchmark"])
        assert case["ratio"] == pytest.approx(best / times["dgrad"], rel=1e-3)
        assert case["achieved"] == pytest.approx(case["floor_ms"] / times["dgrad"], rel=1e-3)
        assert case["name"] in printed
    summary = record["summary"]
    assert (summary["cases"], summary["failed"]) == (4, 0)
    assert summary["min_ratio"] == min(case["ratio"] for case in record["cases"])
    meta = record["meta"]
    assert meta["options"]["suite"] == "what.json"
    assert str(tmp_path) not in out.read_text()
    assert meta["versions"]["torch"] == torch.__version__
    assert meta["command"].startswith("python -m dgrad bench --suite what.json ")
    assert set(meta["ceilings"]["matmul_flops_per_s"]) == {"float32", "float64"}


_UNRULY = """
import os, signal, sys
from dgrad.bench import _bench_worker

flag = os.environ["FLAG"]
Contestant = _bench_worker.Contestant
prepare, sample = Contestant.prepare, Contestant.sample

def unruly_prepare(self, case):
    print("a library may print")
    if self._setting == "dgrad" and case["name"] == "net/up2":
        raise RuntimeError("not this one\\nmore words")
    return prepare(self, case)

def unruly_sample(self):
    if self._setting == "torch" and not os.path.exists(flag):
        open(flag, "w").close()
        print("last words", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    return sample(self)

Contestant.prepare, Contestant.sample = unruly_prepare, unruly_sample
sys.exit(_bench_worker.main(sys.argv[1:]))
"""


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], str]:
    """Makes a module of some code, and tells its name."""

    def write(code: str) -> str:
        (tmp_path / "stand_in.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        return "stand_in"

    return write


@pytest.mark.usefixtures("_one_thread")
def test_one_that_fails_or_dies_costs_its_own_times_only(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    file: Callable[..., str],
    module: Callable[[str], str],
) -> None:
    monkeypatch.setattr(contest, "_MODULE", module(_UNRULY))
    monkeypatch.setenv("FLAG", str(tmp_path / "flag"))
    found = cases(file(SMALL))
    with Contest(Settings(rounds=2, device="cpu")) as running:
        died, failed = (running.run(case)["contestants"] for case in found)
    assert died["torch"] == {"error": "its process was killed by SIGKILL: last words"}
    assert died["torch-benchmark"]["device_ms"]["runs"] == 6
    assert died["dgrad"]["device_ms"]["runs"] == 6
    assert failed["dgrad"] == {"error": "RuntimeError: not this one"}
    assert failed["torch"]["device_ms"]["runs"] == 6  # started anew


def test_contestants_hold_a_case_together_and_are_sampled_in_alternating_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    made: list[str] = []

    class Process:
        running = True

        def __init__(self, module: str, name: str, *_: str, **__: Any) -> None:
            self.name = name + "'s selector" * (name in made)
            made.append(self.name)

        def start(self) -> None:
            pass

        def stop(self, kindly: bool = True) -> None:
            asked.append(f"stop {self.name}")

        def ask(self, do: str, **_: Any) -> dict[str, Any]:
            asked.append(f"{do} {self.name}")
            turn = sum(each == f"sample {self.name}" for each in asked)
            # ever faster, but for one that is held up in the last round
            device_ms = [9.0] * 3 if turn == 3 else [3.0 - turn] * 3
            sample = {"device_ms": device_ms, "eager_ms": 5.0 + turn, "host_us": 7.0 - turn}
            return {**sample, "calls": 4, "not_captured": None, "selected": [], "spoiled": False}

    monkeypatch.setattr(contest, "Process", Process)
    (case,) = cases("layers", only="dcgan/G1")
    with Contest(Settings(("torch",), rounds=3)) as running:
        asked.clear()
        times = running.run(case)["contestants"]["torch"]
        names = ["torch", "dgrad"]
        turns = [f"sample {name}" for name in names + names[::-1] + names]
        prepared, released = ([f"{do} {name}" for name in names] for do in ("prepare", "release"))
        selected = [f"{do} dgrad's selector" for do in ("select", "release")]
        assert asked == [prepared[0], *selected, prepared[1], *turns, *released]
    assert asked[-3:] == ["stop torch", "stop dgrad", "stop dgrad's selector"]
    assert times["device_ms"] == {"median": 2.0, "q1": 1.0, "q3": 9.0, "min": 1.0, "runs": 9}
    assert (times["eager_ms"], times["host_us"], times["calls"]) == (7.0, 5.0, 4)


def test_what_the_selector_says_is_told_and_costs_dgrads_times_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def ask(self: object, do: str, **_: Any) -> dict[str, Any]:
        if do == "select":
            raise _process.Failure("RuntimeError: no such engine")
        sample = {"device_ms": [1.0], "eager_ms": 1.0, "host_us": 1.0}
        return {**sample, "calls": 1, "not_captured": None, "selected": [], "spoiled": False}

    for name in ("start", "stop"):
        monkeypatch.setattr(_process.Process, name, lambda *_, **__: None)
    monkeypatch.setattr(_process.Process, "ask", ask)
    (case,) = cases("layers", only="dcgan/G1")
    with Contest(Settings(("torch",), rounds=1)) as running:
        found = running.run(case)["contestants"]
    assert found["dgrad"] == {"error": "RuntimeError: no such engine"}
    assert found["torch"]["device_ms"]["median"] == 1.0


def test_a_process_that_does_not_start_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, module: Callable[[str], str]
) -> None:
    monkeypatch.setattr(contest, "_MODULE", module("raise SystemExit('no such GPU')"))
    with (
        pytest.raises(ContestError, match=r"torch: its process ended .* 1: no such GPU"),
        Contest(Settings()),
    ):
        pass


def test_a_process_that_hangs_is_ended(module: Callable[[str], str]) -> None:
    hanging = _process.Process(module("import time; time.sleep(600)"), patience_s=0.2)
    with pytest.raises(_process.Failure, match="did not answer within"):
        hanging.ask("describe")
    assert not hanging.running
