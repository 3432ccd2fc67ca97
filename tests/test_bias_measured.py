"""The ways to add a bias, timed with their convolutions; the plans are a fake's."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import dgrad
from biased import BIASED, LEGACY, NOT_SUPPORTED, biased
from dgrad import config
from dgrad._runner import Runner
from fake_cudnn import BIAS, FakeCore, FakeEngine, Start, W, X, Y, compute, fake_times, names, run

PASSES = [FakeEngine("eng50"), FakeEngine("eng51")]
CONVOLUTIONS = [FakeEngine("eng1"), FakeEngine("eng2")]
TIMES: dict[str, float | None] = {  # without a pass, PyTorch adds
    "convolution:eng1": 4.0,
    "convolution:eng2": 3.0,
    "convolution:eng1 + bias_rows:eng50": 3.8,
    "ALGO_1": 3.5,
    "convolution_bias:eng30": 2.5,
    "convolution:eng1 + bias_rows:eng51": 3.2,
    "convolution:eng2 + bias_rows:eng51": 2.2,
}


def all_ways(start: Start) -> FakeCore:
    core = start(
        LEGACY,
        convolution=CONVOLUTIONS,
        convolution_bias=[FakeEngine("eng30")],
        bias_rows=PASSES,
    )
    compute(core, X)
    return core


def test_the_fastest_convolution_and_the_fastest_pass_are_timed_together(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = all_ways(start)
    measured = fake_times(core, monkeypatch, TIMES)
    run(BIASED, BIAS, selection="measure")
    run(BIASED, BIAS, selection="exhaustive")
    assert measured == [[*TIMES][:6], ["convolution:eng2 + bias_rows:eng51"]]
    assert names(core) == ["convolution:eng2 + bias_rows:eng51"] * 2
    selection = dgrad.selections()[0][0]
    assert str(selection.candidate) == "graph:eng2 (FMA_MATH) + bias eng51"
    assert selection.source == "measured"
    assert "next graph:eng30 (FMA_MATH) with bias 13.6 % slower" in str(selection)
    assert len(selection.candidates) == 7


def test_a_fused_engine_wins_where_it_is_faster(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = all_ways(start)
    fake_times(core, monkeypatch, TIMES | {"convolution_bias:eng30": 1.0})
    run(BIASED, BIAS, selection="measure")
    assert names(core) == ["convolution_bias:eng30"]
    assert str(dgrad.selections()[0][0].candidate) == "graph:eng30 (FMA_MATH) with bias"


def test_pytorchs_addition_wins_where_it_is_faster(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = all_ways(start)
    times = TIMES | {"convolution:eng1": 3.1, "convolution:eng2": 1.0}
    measured = fake_times(core, monkeypatch, times)
    run(BIASED, BIAS, selection="measure")
    assert measured == [[*TIMES][:6]]
    assert names(core) == ["convolution:eng2"]
    assert str(dgrad.selections()[0][0].candidate) == "graph:eng2 (FMA_MATH) + PyTorch's bias"
    assert torch.equal(X, biased(X))


@pytest.mark.parametrize(
    ("way", "before", "after"),
    [
        ("graph", "convolution:eng2 + bias_rows:eng51", "convolution:eng2 + bias_rows:eng51"),
        ("legacy", "ALGO_1", "ALGO_1"),
        ("legacy:ALGO_1", "ALGO_1", "ALGO_1"),
        ("graph:eng30", "convolution_bias:eng30", "convolution_bias:eng30"),
        ("graph:eng1", "convolution:eng1", "convolution:eng1 + bias_rows:eng51"),
    ],
)
def test_a_forced_convolution_still_gets_its_bias(
    start: Start, monkeypatch: pytest.MonkeyPatch, way: str, before: str, after: str
) -> None:
    core = all_ways(start)
    fake_times(core, monkeypatch, TIMES | {"convolution_bias:eng30": 2.7})
    run(BIASED, BIAS, selection="measure", algorithm=way)
    assert names(core) == [before]
    run(BIASED, BIAS, selection="measure")
    run(BIASED, BIAS, selection="measure", algorithm=way)
    assert names(core)[2] == after


def test_forbidding_tf32_needs_no_new_measuring_of_a_biased_problem(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = all_ways(start)
    core.engines["convolution"] = [FakeEngine("eng1"), FakeEngine("eng2", ["TENSOR_CORE"])]
    measured = fake_times(core, monkeypatch, TIMES)
    run(BIASED, BIAS, selection="measure")
    assert names(core) == ["convolution:eng2 + bias_rows:eng51"]
    measured.clear()
    run(replace(BIASED, tf32=False), BIAS, selection="measure")
    assert measured == []
    assert names(core)[1] == "convolution_bias:eng30"
    times = {str(c): c.time_ms for c in dgrad.selections()[1][0].candidates if not c.rejected}
    assert times == {
        "graph:eng1 (FMA_MATH) + PyTorch's bias": 4.0,
        "graph:eng1 (FMA_MATH) + bias eng50": 3.8,
        "graph:eng30 (FMA_MATH) with bias": 2.5,
        "graph:eng1 (FMA_MATH) + bias eng51": 3.2,
        "legacy:ALGO_1 (FMA_MATH) + PyTorch's bias": 3.5,
    }


def test_a_combination_that_fails_leaves_the_others(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = all_ways(start)
    fake_times(core, monkeypatch, TIMES)
    core.failing["convolution:eng2 + bias_rows:eng51"] = NOT_SUPPORTED
    run(BIASED, BIAS, selection="measure")
    run(BIASED, BIAS, selection="exhaustive")
    assert names(core) == ["convolution_bias:eng30"] * 2
    assert core.attempts.count("convolution:eng2 + bias_rows:eng51") == 1


def test_threads_that_meet_a_biased_problem_at_once_measure_it_once(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = all_ways(start)
    measured = fake_times(core, monkeypatch, TIMES)
    ready = threading.Barrier(4)

    def work() -> None:
        ready.wait()
        Runner(BIASED, config.policy(dgrad.Flags(selection="measure"))).run(X, W, Y, BIAS)  # type: ignore[arg-type]

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert measured == [[*TIMES][:6], ["convolution:eng2 + bias_rows:eng51"]]
    assert names(core) == ["convolution:eng2 + bias_rows:eng51"] * 4
    ((selection, uses),) = dgrad.selections()
    assert uses == 4
    assert len(selection.candidates) == 7
