"""The command bench on a real GPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from dgrad.bench._clock import GraphClock
from dgrad.cli import main

pytestmark = [pytest.mark.gpu, pytest.mark.processes]

# Large enough that the floor is far above a launch, small enough for any GPU.
LAYERS: list[dict[str, Any]] = [
    {
        "name": "net/biased",
        "N": 16,
        "C_in": 64,
        "H": 80,
        "W": 80,
        "C_out": 64,
        "kernel": 2,
        "stride": 2,
        "bias": True,
    },
    {"name": "net/dense", "N": 8, "C_in": 64, "H": 64, "W": 64, "C_out": 64, "kernel": [3, 7]},
]


@pytest.mark.alone  # a process beside it slows one contestant and not the next
@pytest.mark.seconds(40)
@pytest.mark.parametrize(
    ("direction", "directions"),
    [("forward", ["dgrad"]), ("training", ["dgrad", "fprop", "wgrad"])],
)
def test_bench_times_all_contestants_and_keeps_to_the_roofline(
    direction: str,
    directions: list[str],
    file: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out.json"
    arguments = ["--suite", file(LAYERS), "--direction", direction, "--json", str(out)]
    arguments += ["--dtype", "float32,bfloat16", "--layout", "nchw,nhwc", "--rounds", "5"]
    arguments += ["--selection", "measure"]
    assert main(["bench", *arguments]) == 0
    printed, err = capsys.readouterr()
    assert err == ""  # nothing failed, and each was captured
    record = json.loads(out.read_text())
    meta, summary = record["meta"], record["summary"]
    assert meta["device"] == torch.cuda.get_device_name()
    assert 5e10 < meta["ceilings"]["copy_bytes_per_s"] < 1e14
    rates = meta["ceilings"]["matmul_flops_per_s"]
    assert 1e12 < rates["float32"] < rates["bfloat16"] < 1e16
    assert summary["cases"] == len(record["cases"]) == 8
    assert (summary["failed"], len(summary["groups"])) == (0, 4)
    for case in record["cases"]:
        assert list(case["contestants"]) == ["torch", "torch-benchmark", "dgrad"]
        for each in case["contestants"].values():
            device = each["device_ms"]
            assert 0 < device["min"] <= device["q1"] <= device["median"] <= device["q3"]
            assert device["runs"] >= 15
            assert each["not_captured"] is None
            # the host can only add to what the device takes
            assert each["eager_ms"] > 0.8 * device["min"]
            assert 1 < each["host_us"] < 1e5
        assert 0.2 < case["ratio"] < 5
        assert 0.2 < case["eager_ratio"] < 5
        assert 0 < case["achieved"] <= 1.15
        ran = [selected["direction"] for selected in case["selected"]]
        assert all(selected["source"] == "stored" for selected in case["selected"])
        assert sorted(ran) == directions
        assert all(selected["candidate"] in printed for selected in case["selected"])
    assert main(["bench", *arguments, "--resume"]) == 0
    assert json.loads(out.read_text()) == record


def test_what_does_not_fit_fails_alone(
    file: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    huge = LAYERS[1] | {"name": "huge", "N": 100_000, "C_in": 1024}
    out = tmp_path / "out.json"
    arguments = ["--suite", file([huge, LAYERS[1]]), "--rounds", "1", "--json", str(out)]
    assert main(["bench", *arguments]) == 1
    err = capsys.readouterr().err
    for name in ("torch", "torch-benchmark", "dgrad"):
        assert f"huge float32 nchw: {name}: OutOfMemoryError: " in err
    failed, timed = json.loads(out.read_text())["cases"]
    assert failed["ratio"] is None
    assert timed["ratio"] > 0


def test_a_sample_goes_round_all_copies() -> None:
    seen: set[int] = set()

    def call(number: int) -> None:
        seen.add(number)
        torch.ones(2**24, device="cuda").sin_()  # long enough for few calls in a sample

    with torch.cuda.stream(torch.cuda.Stream()):
        clock = GraphClock([partial(call, number) for number in range(200)])
        clock.sample()
    assert clock.problem is None
    assert clock.calls >= 200
    assert seen == {*range(200)}
