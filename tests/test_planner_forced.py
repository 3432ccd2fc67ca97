"""The policy where an algorithm or a provider is asked for: what runs, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest

import dgrad
from dgrad.exceptions import cudnn_error
from fake_cudnn import (
    FakeEngine,
    FakeProblem,
    FakeResult,
    Start,
    fake_times,
    names,
    refused,
    run,
)


def test_a_forced_algorithm_runs(start: Start) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    run(algorithm="legacy:ALGO_0")
    assert names(core) == ["ALGO_0"]


def test_a_forced_algorithm_holds_for_its_direction_alone(start: Start) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    run(FakeProblem(direction="wgrad"), algorithm="legacy:ALGO_0")
    run(FakeProblem(direction="wgrad"), algorithm={"wgrad": "legacy:ALGO_0"})
    assert names(core) == ["ALGO_1", "ALGO_0"]


def test_a_forced_algorithm_that_is_not_usable_raises_with_all_reasons(start: Start) -> None:
    core = start(
        FakeResult("ALGO_1"),
        FakeResult("GEMM", rejected="CUDNN_STATUS_NOT_SUPPORTED"),
        FakeResult("ALGO_0", deterministic=False, math_type="TENSOR_OP_MATH"),
    )
    problem = FakeProblem()
    text = refused(problem, algorithm="legacy:GEMM")
    assert core.ran == []
    assert f"no usable candidate for {problem}" in text
    reasons = {line.split()[0]: line for line in text.splitlines() if "legacy:" in line[:10]}
    assert set(reasons) == {"legacy:ALGO_1", "legacy:GEMM", "legacy:ALGO_0"}
    assert "algorithm='legacy:GEMM' is asked for" in reasons["legacy:ALGO_1"]
    assert "algorithm='legacy:GEMM' is asked for" in reasons["legacy:ALGO_0"]
    assert "cuDNN's heuristic says CUDNN_STATUS_NOT_SUPPORTED" in reasons["legacy:GEMM"]
    snippet = text.partition("To reproduce:\n\n")[2]
    compile(snippet, "snippet", "exec")
    assert "algorithm={'dgrad': 'legacy:GEMM'}" in snippet
    assert "fallback='error'" in snippet
    run(problem)
    assert names(core) == ["ALGO_1"]


ENGINES = [FakeEngine("eng1", ["TENSOR_CORE"]), FakeEngine("eng2_k2=3")]


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("graph", "convolution:eng1"),
        ("legacy", "ALGO_1"),
        (["legacy", "graph"], "ALGO_1"),
        (["graph:eng2_k2=3", "legacy"], "convolution:eng2_k2=3"),
        (["legacy:ALGO_9", "graph"], "convolution:eng1"),
        ("graph:eng2_k2=3", "convolution:eng2_k2=3"),
    ],
    ids=str,
)
def test_a_forced_provider_runs_in_the_order_asked_for(
    start: Start, algorithm: Any, expected: str
) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("ALGO_0"), convolution=ENGINES)
    run(algorithm=algorithm)
    assert names(core) == [expected]
    ((selection, _),) = dgrad.selections()
    by_name = algorithm == "graph:eng2_k2=3"
    assert selection.source == ("forced" if by_name else "heuristic")


@pytest.mark.parametrize(
    ("algorithm", "measured", "ran"),
    [
        ("graph", [["convolution:eng1", "convolution:eng2_k2=3"]], "convolution:eng2_k2=3"),
        ("legacy", [["ALGO_1", "ALGO_0"]], "ALGO_0"),
        (
            ["legacy", "graph"],
            [["convolution:eng1", "convolution:eng2_k2=3", "ALGO_1", "ALGO_0"]],
            "ALGO_0",
        ),
        (["graph:eng1", "legacy"], [["convolution:eng1", "ALGO_1", "ALGO_0"]], "convolution:eng1"),
        (["graph:eng1", "graph:eng2_k2=3"], [], "convolution:eng1"),
        ("legacy:ALGO_1", [], "ALGO_1"),
    ],
    ids=str,
)
def test_a_forced_provider_is_measured_and_a_forced_name_is_not(
    start: Start,
    monkeypatch: pytest.MonkeyPatch,
    algorithm: Any,
    measured: list[list[str]],
    ran: str,
) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("ALGO_0"), convolution=ENGINES)
    times: dict[str, float | None] = {
        "convolution:eng1": 2.0, "convolution:eng2_k2=3": 1.0, "ALGO_1": 4.0, "ALGO_0": 3.0,
    }  # fmt: skip
    found = fake_times(core, monkeypatch, times)
    run(selection="measure", algorithm=algorithm)
    assert found == measured
    assert names(core) == [ran]
    assert dgrad.selections()[0][0].source == ("measured" if measured else "forced")


def test_what_a_forced_provider_left_out_is_measured_without_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("ALGO_0"), convolution=ENGINES)
    times: dict[str, float | None] = {
        "convolution:eng1": 2.0, "convolution:eng2_k2=3": 1.0, "ALGO_1": 4.0, "ALGO_0": 0.5,
    }  # fmt: skip
    measured = fake_times(core, monkeypatch, times)
    run(selection="measure", algorithm="graph")
    run(selection="measure")
    assert measured == [["convolution:eng1", "convolution:eng2_k2=3"], ["ALGO_1", "ALGO_0"]]
    # The first engine ran once more: what is timed later is held against its result too.
    assert names(core) == ["convolution:eng2_k2=3", "convolution:eng1", "ALGO_0"]


def test_a_forced_provider_that_has_nothing_raises_with_all_reasons(start: Start) -> None:
    core = start(FakeResult("ALGO_1"), convolution=cudnn_error(3000, "no such graph", "f", ""))
    text = refused(algorithm="graph")
    assert core.ran == []
    assert "graph:engines (DEFAULT_MATH)" in text
    assert "no such graph" in text
    assert "algorithm='graph' is asked for" in text
    assert "algorithm={'dgrad': 'graph'}" in text.partition("To reproduce:")[2]
    run()
    assert names(core) == ["ALGO_1"]


@pytest.mark.parametrize("fft", ["FFT", "FFT_TILING"])
@pytest.mark.parametrize("flags", [{}, {"algorithm": "legacy"}], ids=["any", "legacy"])
def test_fft_runs_only_where_it_is_named(
    start: Start, fft: str, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(FakeResult(fft), FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    measured = fake_times(core, monkeypatch, {fft: 0.1, "ALGO_1": 2.0, "ALGO_0": 1.0})
    run(**flags)
    run(selection="exhaustive", **flags)
    assert measured == [["ALGO_1", "ALGO_0"]]
    run(selection="exhaustive", algorithm=["legacy:" + fft, "legacy"])
    assert names(core) == ["ALGO_1", "ALGO_0", fft]
    reasons = [selection.verdicts()[0] for selection, _ in dgrad.selections()]
    words = "rejected: it spreads NaN and infinity over the image, which PyTorch's choice does not"
    assert reasons[0].startswith(f"{words}; algorithm='legacy:{fft}' lets it run")
    assert reasons[1].startswith(words)
    assert reasons[2] == "chosen"


def test_fft_alone_is_not_enough(start: Start) -> None:
    start(FakeResult("FFT"))
    assert "algorithm='legacy:FFT' lets it run" in refused()


def test_an_unknown_algorithm_raises_with_those_there_are(start: Start) -> None:
    start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    text = refused(algorithm="graph:eng17")
    assert "legacy:ALGO_1" in text
    assert "legacy:ALGO_0" in text
