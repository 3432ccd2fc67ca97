"""The policy: which candidate runs, what is said of the others, and what is remembered.

cuDNN's part is played by a fake: its answers are the premise here, not what is tested.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dgrad
from dgrad import _runner, config
from dgrad._geometry import Geometry, Pair, output_size
from dgrad._runner import Runner
from dgrad.exceptions import TorchOutOfMemoryError, cudnn_error
from dgrad.planner import preference
from dgrad.selection import ADD, Candidate, Selection, format_bytes, reasons_table, reproduction
from fake_cudnn import (
    HEURISTIC,
    MIB,
    STREAM,
    FakeEngine,
    FakeProblem,
    FakeResult,
    Start,
    W,
    X,
    Y,
    fake_times,
    names,
    refused,
    run,
    starting,
)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    yield from starting(monkeypatch)


def test_the_first_in_cudnns_order_runs(start: Start) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("ALGO_0"), FakeResult("GEMM"))
    run()
    pointers = (X.data_ptr(), W.data_ptr(), Y.data_ptr())
    assert core.ran == [("ALGO_1", *pointers, 0, STREAM)]
    assert core.planned == [("ALGO_1", "DEFAULT_MATH")]


def test_a_workspace_is_had_from_the_allocator(start: Start) -> None:
    core = start(FakeResult("ALGO_1", workspace_bytes=MIB))
    run()
    assert names(core) == ["ALGO_1"]


def test_a_runner_plans_once_and_runs_often(start: Start) -> None:
    core = start(FakeResult("ALGO_1"))
    runner = Runner(FakeProblem(), HEURISTIC)
    for _ in range(3):
        runner.run(X, W, Y)
    assert len(core.planned) == 1
    assert len(core.ran) == 3


def test_the_plan_that_was_timed_is_the_one_that_runs(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*THREE)
    fake_times(core, monkeypatch, {"ALGO_1": 1.0, "ALGO_0": 2.0, "GEMM": 3.0})
    run(selection="measure")
    assert names(core)[-1] == "ALGO_1"
    assert len(core.planned) == len(set(core.planned)) == 3
    # The others are gone: another thread's, or another choice, is made anew.
    run(selection="measure", algorithm="legacy:GEMM")
    assert names(core)[-1] == "GEMM"
    assert len(core.planned) == 4


def test_cudnn_is_asked_once_for_each_problem(start: Start) -> None:
    core = start(FakeResult("ALGO_1"))
    problem = FakeProblem(dtype="float64", tf32=False)
    for _ in range(3):
        run(problem)
        run(problem, deterministic=True)
    assert core.heuristics == 1
    run(replace(problem, groups=2))
    assert core.heuristics == 2
    dgrad.plan_cache.clear()
    run(problem)
    assert core.heuristics == 3


def test_what_cudnn_rejects_does_not_run(start: Start) -> None:
    core = start(FakeResult("GEMM", rejected="CUDNN_STATUS_NOT_SUPPORTED"), FakeResult("ALGO_0"))
    run()
    assert names(core) == ["ALGO_0"]


def test_deterministic_forbids_what_is_not(start: Start) -> None:
    core = start(FakeResult("ALGO_0", deterministic=False), FakeResult("ALGO_1"))
    run(deterministic=False)
    run(deterministic=True)
    run(deterministic=False)
    assert names(core) == ["ALGO_0", "ALGO_1", "ALGO_0"]


def test_the_workspace_limit_forbids_what_takes_more(start: Start) -> None:
    core = start(
        FakeResult("GEMM", workspace_bytes=2 * MIB),
        FakeResult("ALGO_1", workspace_bytes=MIB),
        FakeResult("ALGO_0"),
    )
    for limit in (None, 2 * MIB, 2 * MIB - 1, MIB, MIB - 1, 0):
        run(workspace_limit=limit)
    assert names(core) == ["GEMM", "GEMM", "ALGO_1", "ALGO_1", "ALGO_0", "ALGO_0"]


def test_the_limit_holds_for_the_true_workspace_and_not_the_estimate(start: Start) -> None:
    core = start(FakeResult("GEMM", workspace_bytes=10), FakeResult("ALGO_0"))
    core.true_workspace_bytes["GEMM"] = 3 * MIB
    run(workspace_limit=MIB)
    assert names(core) == ["ALGO_0"]
    run(workspace_limit=3 * MIB)
    assert names(core) == ["ALGO_0", "GEMM"]
    text = refused(workspace_limit=MIB, algorithm="legacy:GEMM")
    assert "its workspace of 3.0 MiB is over workspace_limit 1.0 MiB" in text


@pytest.mark.parametrize(
    "math_type", ["DEFAULT_MATH", "TENSOR_OP_MATH", "TENSOR_OP_MATH_ALLOW_CONVERSION"]
)
def test_strict_float32_runs_in_no_other_math_type_than_fma(start: Start, math_type: str) -> None:
    strict = FakeProblem(tf32=False)
    core = start(FakeResult("ALGO_1", math_type), FakeResult("ALGO_0", "FMA_MATH"))
    run(strict)
    assert core.planned == [("ALGO_0", "FMA_MATH")]
    start(FakeResult("ALGO_1", math_type))
    dgrad.plan_cache.clear()
    assert "it may round float32" in refused(strict)


def test_float32_is_never_converted_to_half_precision(start: Start) -> None:
    core = start(
        FakeResult("ALGO_1", "TENSOR_OP_MATH_ALLOW_CONVERSION"),
        FakeResult("ALGO_1", "TENSOR_OP_MATH"),
    )
    run(FakeProblem(tf32=True))
    assert core.planned == [("ALGO_1", "TENSOR_OP_MATH")]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_types_run_in_any_math_type(start: Start, dtype: str) -> None:
    core = start(FakeResult("ALGO_1", "TENSOR_OP_MATH"), FakeResult("ALGO_0", "FMA_MATH"))
    run(FakeProblem(dtype=dtype, tf32=False))
    assert core.planned == [("ALGO_1", "TENSOR_OP_MATH")]


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


def test_the_flags_in_force_are_in_the_snippet(start: Start) -> None:
    start(FakeResult("ALGO_1", workspace_bytes=MIB), FakeResult("ALGO_0", deterministic=False))
    text = refused(deterministic=True, workspace_limit=1000)
    assert "it is not deterministic" in text
    assert "its workspace of 1.0 MiB is over workspace_limit 1000 B" in text
    assert "allow_tf32=True, deterministic=True, workspace_limit=1000, fallback='error'" in text


def test_where_cudnn_offers_nothing_the_error_says_so(start: Start) -> None:
    start()
    assert "(cuDNN offers none)" in refused()


def test_a_failing_heuristic_is_the_reason_of_all(start: Start) -> None:
    core = start()
    core.results = cudnn_error(3000, "cudnnGet returned 3000", "cudnnGet", "")
    text = refused()
    assert text.count("cudnnGet returned 3000") == 2
    assert "legacy:ALGO_0" in text
    assert "legacy:ALGO_1" in text


NOT_SUPPORTED = cudnn_error(3000, "cudnnRun returned 3000: the why\nmore lines", "cudnnRun", "")


@pytest.mark.parametrize("when", ["unplannable", "failing"])
def test_an_algorithm_that_fails_is_not_tried_again(start: Start, when: str) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    getattr(core, when)["GEMM"] = NOT_SUPPORTED
    for _ in range(3):
        run()
        run(deterministic=True)
    assert names(core) == ["ALGO_1"] * 6
    assert core.planned.count(("GEMM", "DEFAULT_MATH")) == 1
    assert core.attempts.count("GEMM") == (when == "failing")
    text = refused(algorithm="legacy:GEMM")
    assert "cudnnRun returned 3000: the why" in text
    assert "more lines" not in text
    assert core.planned.count(("GEMM", "DEFAULT_MATH")) == 1


def test_a_failure_on_one_thread_is_known_to_all(start: Start) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    core.failing["GEMM"] = NOT_SUPPORTED
    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert core.attempts == ["GEMM", "ALGO_1", "ALGO_1"]


def test_an_algorithm_that_fails_later_is_replaced_in_the_same_runner(start: Start) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    runner = Runner(FakeProblem(), HEURISTIC)
    runner.run(X, W, Y)
    core.failing["GEMM"] = NOT_SUPPORTED
    runner.run(X, W, Y)
    assert names(core) == ["GEMM", "ALGO_1"]


def test_an_error_that_is_not_cudnns_is_passed_on(start: Start) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    core.failing["GEMM"] = KeyError("a bug")
    with pytest.raises(KeyError):
        run()


def test_out_of_memory_lets_the_next_one_run(start: Start) -> None:
    core = start(FakeResult("GEMM", workspace_bytes=3 * MIB), FakeResult("ALGO_1"))
    core.free_bytes = MIB
    run()
    run()
    assert names(core) == ["ALGO_1"] * 2
    assert core.planned.count(("GEMM", "DEFAULT_MATH")) == 1


def test_out_of_memory_for_all_is_told_apart(start: Start) -> None:
    core = start(
        FakeResult("GEMM", workspace_bytes=3 * MIB),
        FakeResult("WINOGRAD", rejected="CUDNN_STATUS_NOT_SUPPORTED"),
    )
    core.free_bytes = MIB
    with pytest.raises(dgrad.OutOfMemoryError) as caught:
        run()
    assert isinstance(caught.value, TorchOutOfMemoryError)
    assert isinstance(caught.value, dgrad.NotSupportedError)
    text = str(caught.value)
    assert "dgrad is out of memory for" in text
    assert "out of memory: no room for its workspace of 3.0 MiB: CUDA out of memory" in text
    assert "And so on" not in text
    assert "CUDNN_STATUS_NOT_SUPPORTED" in text


def test_memory_that_was_freed_is_used_again(start: Start) -> None:
    core = start(FakeResult("GEMM", workspace_bytes=3 * MIB))
    core.free_bytes = MIB
    with pytest.raises(dgrad.OutOfMemoryError):
        run()
    core.free_bytes = 4 * MIB
    run()
    assert names(core) == ["GEMM"]


def test_what_the_flags_forbid_is_not_out_of_memory(start: Start) -> None:
    core = start(
        FakeResult("GEMM", workspace_bytes=3 * MIB),
        FakeResult("WINOGRAD", rejected="CUDNN_STATUS_NOT_SUPPORTED"),
        FakeResult("ALGO_0"),
    )
    core.free_bytes = MIB
    run()
    assert names(core) == ["ALGO_0"]
    refused(algorithm="legacy:WINOGRAD")


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno == level and r.name == "dgrad"]


def test_a_selection_is_logged_once_for_each_problem_and_policy(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    start(FakeResult("ALGO_1", workspace_bytes=MIB), FakeResult("ALGO_0", deterministic=False))
    problem = FakeProblem()
    with caplog.at_level(logging.INFO, logger="dgrad"):
        for _ in range(3):
            run(problem)
        (line,) = messages(caplog, logging.INFO)
        for part in (
            "legacy:ALGO_1 (DEFAULT_MATH)", str(problem), "workspace 1.0 MiB", "deterministic",
            "source heuristic", "(1 of 2 in", "cuDNN",
        ):  # fmt: skip
            assert part in line
        run(problem, algorithm="legacy:ALGO_0")
        run(problem, algorithm="legacy:ALGO_0")
        forced = messages(caplog, logging.INFO)[1:]
        assert len(forced) == 1
        assert "legacy:ALGO_0" in forced[0]
        assert "not deterministic, source forced (2 of 2 in" in forced[0]
        run(FakeProblem(groups=2))
        assert len(messages(caplog, logging.INFO)) == 3
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert len(messages(caplog, logging.INFO)) == 3
    assert not messages(caplog, logging.DEBUG)


def test_debug_says_a_line_for_each_candidate(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    core = start(
        FakeResult("GEMM"),
        FakeResult("WINOGRAD", rejected="CUDNN_STATUS_NOT_SUPPORTED"),
        FakeResult("ALGO_0", deterministic=False),
        FakeResult("ALGO_1"),
        FakeResult("DIRECT"),
    )
    core.failing["GEMM"] = NOT_SUPPORTED
    with caplog.at_level(logging.DEBUG, logger="dgrad"):
        run(deterministic=True)
    lines = messages(caplog, logging.DEBUG)
    assert lines[0].startswith("rejected legacy:GEMM (DEFAULT_MATH) for FakeProblem")
    assert lines[1:] == [
        "candidate legacy:GEMM (DEFAULT_MATH): rejected: cudnnRun returned 3000: the why",
        "candidate legacy:WINOGRAD (DEFAULT_MATH): rejected: cuDNN's heuristic says "
        "CUDNN_STATUS_NOT_SUPPORTED",
        "candidate legacy:ALGO_0 (DEFAULT_MATH): rejected: it is not deterministic, and "
        "deterministic algorithms are asked for",
        "candidate legacy:ALGO_1 (DEFAULT_MATH): chosen",
        "candidate legacy:DIRECT (DEFAULT_MATH): later in cuDNN's order",
    ]


def test_nothing_is_formatted_where_nobody_listens(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(FakeResult("ALGO_1"))
    monkeypatch.setattr(Selection, "__str__", lambda self: pytest.fail("it was formatted"))
    run()


CHOSEN = Candidate("legacy", "ALGO_1", "TENSOR_OP_MATH", True, 5 * MIB)
OTHER = Candidate("legacy", "FFT", "DEFAULT_MATH", True, 0, rejected="it is broken")


def test_a_selection_is_plain_data() -> None:
    selection = Selection(FakeProblem(), (OTHER, CHOSEN), 1, ("it is broken", None), "forced")  # type: ignore[arg-type]
    data = json.loads(json.dumps(selection.to_dict()))
    assert data["problem"]["x"] == list(FakeProblem().x)
    assert data["chosen"] == 1
    assert data["candidates"][1]["workspace_bytes"] == 5 * MIB
    assert [entry["verdict"] for entry in data["candidates"]] == [
        "rejected: it is broken", "chosen",
    ]  # fmt: skip
    assert data["source"] == "forced"
    assert selection == replace(selection)


def test_a_replaced_candidate_is_announced(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    runner = Runner(FakeProblem(), HEURISTIC)
    with caplog.at_level(logging.INFO, logger="dgrad"):
        runner.run(X, W, Y)
        core.failing["ALGO_1"] = cudnn_error(3000, "no longer", "cudnnConvolution", "")
        runner.run(X, W, Y)
    assert [line.split()[1] for line in messages(caplog, logging.INFO)] == [
        "legacy:ALGO_1", "legacy:ALGO_0",
    ]  # fmt: skip
    ((selection, _),) = dgrad.selections()
    assert selection.candidate.name == "legacy:ALGO_0"


def uses() -> dict[str, int]:
    return {selection.candidate.name: count for selection, count in dgrad.selections()}


def test_each_selection_has_a_count_of_its_own(start: Start) -> None:
    start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    run()
    for _ in range(9):
        run(algorithm="legacy:ALGO_0")
    assert uses() == {"legacy:ALGO_1": 1, "legacy:ALGO_0": 9}
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert uses() == {"legacy:ALGO_1": 2, "legacy:ALGO_0": 9}


def test_what_native_code_runs_is_counted_for_its_selection(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    native = SimpleNamespace(
        UseCount=lambda: SimpleNamespace(count=0), ReadyCall=lambda **fields: fields
    )
    monkeypatch.setattr(_runner, "_loader", SimpleNamespace(require=lambda: native))
    forced = config.policy(dgrad.Flags(selection="heuristic", algorithm="legacy:ALGO_0"))
    calls: list[Any] = []
    for policy in (HEURISTIC, forced, forced):
        runner = Runner(FakeProblem(), policy)  # type: ignore[arg-type]
        runner.run(X, W, Y)
        calls.append(runner.ready(lambda: X, None))
    for call, count in zip(calls, (3, 20, 100), strict=True):
        call["uses"].count += count
    assert uses() == {"legacy:ALGO_1": 4, "legacy:ALGO_0": 122}


def test_what_takes_the_place_of_a_candidate_is_counted_anew(start: Start) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    runner = Runner(FakeProblem(), HEURISTIC)  # type: ignore[arg-type]
    for _ in range(3):
        runner.run(X, W, Y)
    core.failing["ALGO_1"] = NOT_SUPPORTED
    runner.run(X, W, Y)
    assert uses() == {"legacy:ALGO_0": 1}


def test_a_cudnn_that_does_not_start_is_no_fault_of_the_candidates(start: Start) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("ALGO_0"))
    failure = cudnn_error(1001, "cudnnCreate returned 1001", "cudnnCreate", "")
    core.unplannable = {"ALGO_1": failure, "ALGO_0": failure}
    with pytest.raises(dgrad.CudnnNotInitializedError):
        run()
    core.unplannable = {}
    run()
    assert names(core) == ["ALGO_1"]


@pytest.mark.parametrize(
    "flags",
    [{"deterministic": True}, {"allow_tf32": False}, {"workspace_limit": 0}, {"algorithm": "a:b"}],
    ids=str,
)
def test_what_a_flag_asks_for_is_not_left_to_pytorch(flags: dict[str, Any]) -> None:
    assert not config.commands("dgrad")
    with dgrad.flags(**flags):
        assert config.commands("dgrad")
    assert config.commands("dgrad", dgrad.Flags(**flags))
    assert config.commands("wgrad", dgrad.Flags(**flags)) is ("algorithm" not in flags)


def test_a_profiler_sees_what_was_selected(start: Start) -> None:
    core = start(FakeResult("ALGO_1"))
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
        run()
    ranges = [event.name for event in profile.events() if event.name.startswith("dgrad::")]
    assert ranges == ["dgrad::dgrad legacy:ALGO_1 (DEFAULT_MATH)"] * 2
    assert names(core) == ["ALGO_1"] * 3


# --- measured times -----------------------------------------------------------------------------


THREE = (
    FakeResult("ALGO_1", workspace_bytes=2 * MIB),
    FakeResult("ALGO_0", deterministic=False),
    FakeResult("GEMM", workspace_bytes=MIB),
)


def test_the_fastest_runs(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    core = start(*THREE)
    measured = fake_times(core, monkeypatch, {"ALGO_1": 2.0, "ALGO_0": 3.0, "GEMM": 1.0})
    run(selection="measure")
    assert measured == [["ALGO_1", "ALGO_0", "GEMM"]]
    assert names(core) == ["GEMM"]
    ((selection, count),) = dgrad.selections()
    assert count == 1
    assert selection.source == "measured"
    assert selection.verdicts() == ["100.0 % slower", "200.0 % slower", "chosen"]
    assert "next legacy:ALGO_1 (DEFAULT_MATH) 100.0 % slower" in str(selection)


@pytest.mark.parametrize(
    ("others", "chosen"),
    [((1.004, 1.008), "GEMM"), ((1.012, 1.012), "ALGO_0")],
    ids=["within a percent the deterministic and then the smaller", "beyond it the fastest"],
)
def test_what_wins_within_the_noise_and_beyond(
    start: Start, monkeypatch: pytest.MonkeyPatch, others: tuple[float, float], chosen: str
) -> None:
    core = start(*THREE)
    fake_times(core, monkeypatch, {"ALGO_1": others[0], "ALGO_0": 1.0, "GEMM": others[1]})
    run(selection="measure")
    assert names(core) == [chosen]


def timed(*times: tuple[float, float | None], workspace_bytes: int = 0) -> list[Candidate]:
    """Candidates with a time back to back and one on the device."""
    return [
        Candidate("graph", f"eng{i}", "FMA_MATH", True, workspace_bytes, t, device_ms)
        for i, (t, device_ms) in enumerate(times)
    ]


def first_choice(candidates: list[Candidate]) -> int:
    return preference(candidates, "dgrad", config.policy(dgrad.Flags(selection="measure")))[0]


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ([(0.030, 0.015), (0.031, 0.013)], 1),  # as close as the host can tell
        ([(0.030, 0.015), (0.046, 0.013)], 0),  # slower for who replays nothing
        ([(0.030, 0.015), (0.031, None)], 0),  # not timed there: it was far behind
        ([(0.031, 0.015), (0.030, None)], 1),  # not known: the time back to back decides
        ([(0.031, 0.0151), (0.030, 0.0150), (0.033, 0.0150)], 1),  # alike on the device
        ([(0.030, None), (0.031, 0.013)], 0),
    ],
)
def test_the_device_tells_apart_what_the_host_makes_alike(
    times: list[tuple[float, float | None]], chosen: int
) -> None:
    assert first_choice(timed(*times)) == chosen


def test_what_costs_the_host_more_must_be_as_much_faster_on_the_device() -> None:
    by_cudnn, by_pytorch = timed((0.0160, 0.0109), (0.0218, 0.0101))
    by_cudnn, by_pytorch = replace(by_cudnn, bias="eng1"), replace(by_pytorch, bias=ADD)
    assert first_choice([by_pytorch, by_cudnn]) == 1
    assert first_choice([replace(by_pytorch, device_ms=0.0070), by_cudnn]) == 0
    # Where the device takes longer than the host, that does not count.
    assert first_choice([replace(by_pytorch, device_ms=0.0220), by_cudnn]) == 1
    slow, slower = timed((0.0300, 0.0281), (0.0330, 0.0290))
    assert first_choice([replace(slower, bias=ADD, device_ms=0.0270), slow]) == 1
    assert first_choice([replace(slower, bias=ADD, time_ms=0.0280), slow]) == 0
    # Neither does what the host's share varies by between runs of one way.
    legacy, *graphs = timed((0.024, 0.0081), (0.020, 0.0090), (0.023, 0.0080))
    assert first_choice([replace(legacy, provider="legacy"), *graphs]) == 2


def test_alike_on_the_device_and_for_the_host_the_smaller_workspace_wins() -> None:
    large, small = timed((0.0300, 0.0150), (0.0305, 0.0151))
    assert first_choice([replace(large, workspace_bytes=MIB), small]) == 1


def test_both_times_are_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, other = timed((0.030, 0.010), (0.027, 0.015))
    selection = Selection(FakeProblem(), (chosen, other), 0, (None, None), "measured")  # type: ignore[arg-type]
    verdict = "50.0 % slower on the device, 10.0 % faster with the host's share"
    assert selection.verdicts() == ["chosen", verdict]
    assert f"next graph:eng1 (FMA_MATH) {verdict}" in str(selection)


@pytest.mark.parametrize(
    ("factor", "words"),
    [(0.5, "50.0 % faster"), (10.9, "990.0 % slower"), (11.0, "11 times slower")],
)
def test_what_is_far_behind_is_so_many_times_slower(factor: float, words: str) -> None:
    times = timed((1.0, 1.0), (2.0 * factor, factor), (factor, None))
    selection = Selection(FakeProblem(), tuple(times), 0, (None,) * 3, "measured")  # type: ignore[arg-type]
    _, on_device, back_to_back = selection.verdicts()
    assert on_device.startswith(f"{words} on the device, ")
    assert back_to_back == words
    line = str(replace(selection, candidates=(times[0], times[2]), objections=(None, None)))
    assert f"next graph:eng2 (FMA_MATH) {words}, workspace" in line


def test_flags_choose_among_known_times_without_measuring(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*THREE)
    measured = fake_times(core, monkeypatch, {"ALGO_1": 1.0, "ALGO_0": 2.0, "GEMM": 3.0})
    run(selection="measure")
    run(selection="measure", workspace_limit=MIB)
    run(selection="measure", workspace_limit=MIB, deterministic=True)
    run(selection="heuristic")
    assert len(measured) == 1
    assert names(core) == ["ALGO_1", "ALGO_0", "GEMM", "ALGO_1"]
    limited = dgrad.selections()[1][0]
    assert limited.verdicts()[0].endswith("(50.0 % faster)")
    words = "with 2.0 MiB of workspace legacy:ALGO_1 (DEFAULT_MATH) would be 50.0 % faster"
    assert str(limited).endswith(f"; {words}")


@pytest.mark.parametrize(
    ("limited", "words"),
    [
        ([(0.031, 0.77)], "with 1.5 MiB of workspace graph:eng1 (FMA_MATH) would be 23.0 % faster"),
        ([(0.027, 1.1)], None),  # the device decides, and there it is slower
        ([(0.027, None)], "with 1.5 MiB of workspace graph:eng1 (FMA_MATH) would be 10.0 % faster"),
        ([(0.031, None)], None),
        ([(0.030, 0.99999)], None),  # it would read 0.0 %
        (
            [(0.020, 0.9), (0.031, 0.8)],
            "with 1.5 MiB of workspace graph:eng2 (FMA_MATH) would be 20.0 % faster",
        ),
    ],
)
def test_what_a_larger_workspace_would_bring_is_told_by_the_time_that_decides(
    limited: list[tuple[float, float | None]], words: str | None
) -> None:
    candidates = timed((0.030, 1.0), *limited, workspace_bytes=3 * MIB // 2)
    objections = (None, *["its workspace is over workspace_limit 1.0 MiB"] * len(limited))
    selection = Selection(FakeProblem(), tuple(candidates), 0, objections, "measured")  # type: ignore[arg-type]
    _, _, told = str(selection).partition("; ")
    assert told == (words or "")


def test_a_larger_limit_measures_what_the_smaller_left_out(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*THREE)
    measured = fake_times(core, monkeypatch, {"ALGO_1": 1.0, "ALGO_0": 2.0, "GEMM": 3.0})
    run(selection="measure", workspace_limit=MIB)
    run(selection="measure")
    assert measured == [["ALGO_0", "GEMM"], ["ALGO_1"]]
    assert names(core) == ["ALGO_0", "ALGO_1"]


def test_what_the_budget_left_out_is_timed_by_exhaustive_only(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*THREE)
    times: dict[str, float | None] = {"ALGO_1": 2.0, "ALGO_0": 3.0, "GEMM": None}
    measured = fake_times(core, monkeypatch, times)
    run(selection="measure")
    assert dgrad.selections()[0][0].verdicts()[2] == "not timed: the budget was spent"
    run(selection="measure", deterministic=True)
    assert len(measured) == 1
    times["GEMM"] = 1.0
    run(selection="exhaustive")
    assert measured[1] == ["GEMM"]
    assert names(core) == ["ALGO_1", "ALGO_1", "ALGO_1", "GEMM"]  # ALGO_1 for the check of GEMM


def test_one_usable_candidate_is_not_timed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("GEMM", rejected="CUDNN_STATUS_NOT_SUPPORTED"))
    measured = fake_times(core, monkeypatch, {})
    run(selection="exhaustive")
    assert measured == []
    assert dgrad.selections()[0][0].source == "heuristic"


def test_a_table_of_reasons_is_aligned() -> None:
    lines = reasons_table([(CHOSEN, "too slow"), (OTHER, "it is broken")]).splitlines()
    assert lines == [
        "  legacy:ALGO_1 (TENSOR_OP_MATH)  too slow",
        "  legacy:FFT (DEFAULT_MATH)       it is broken",
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        (MIB, "1.0 MiB"),
        (2**30, "1.0 GiB"),
        (4 * 2**30, "4.0 GiB"),
        (2**40, "1024.0 GiB"),
    ],
)
def test_bytes_are_written_as_people_read_them(count: int, text: str) -> None:
    assert format_bytes(count) == text


@st.composite
def problems(draw: st.DrawFn) -> FakeProblem:
    def two(least: int, most: int) -> Pair:
        return draw(st.tuples(st.integers(least, most), st.integers(least, most)))

    stride, dilation, padding, size, kernel = two(1, 3), two(1, 3), two(0, 2), two(1, 4), two(1, 3)
    # What the planner sees has output_padding < stride.
    extra = (draw(st.integers(0, stride[0] - 1)), draw(st.integers(0, stride[1] - 1)))
    groups, batch = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    channels = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
    large = output_size(size, kernel, Geometry(padding, stride, dilation, groups), extra)
    assume(min(large) >= 1)
    dtype = draw(st.sampled_from(["float32", "float64", "bfloat16"]))
    direction = draw(st.sampled_from(["dgrad", "fprop", "wgrad"]))
    return FakeProblem(
        direction=direction,
        dtype=dtype,
        tf32=False,
        layout=draw(st.sampled_from(["nchw", "nhwc"])),
        x=(batch, channels[1] * groups, *large),
        w=(channels[0] * groups, channels[1], *kernel),
        y=(batch, channels[0] * groups, *size),
        padding=padding,
        stride=stride,
        dilation=dilation,
        groups=groups,
        bias=direction == "dgrad" and draw(st.booleans()),
        device=draw(st.integers(0, 3)),
    )


@settings(deadline=None, max_examples=50)
@given(problems())
def test_the_snippet_makes_the_same_call(problem: FakeProblem) -> None:
    snippet = reproduction(problem, {"deterministic": True, "workspace_limit": 5})  # type: ignore[arg-type]
    assert f'device="cuda:{problem.device}"' in snippet
    assert "with dgrad.flags(deterministic=True, workspace_limit=5):" in snippet
    assert ("backward()" in snippet) is (problem.direction != "dgrad")
    # There is no GPU here, so the same lines run on the CPU.
    variables: dict[str, Any] = {}
    exec(snippet.replace(f"cuda:{problem.device}", "cpu"), variables)
    x, w, b, y = (variables[name] for name in "xwby")
    assert tuple(x.shape) == problem.y
    assert tuple(w.shape) == problem.w
    assert tuple(y.shape) == problem.x
    assert y.dtype is getattr(torch, problem.dtype)
    assert (b is not None) is problem.bias
    if problem.layout == "nhwc":
        assert x.is_contiguous(memory_format=torch.channels_last)
    geometry = Geometry(problem.padding, problem.stride, problem.dilation, problem.groups)
    least = output_size(problem.y[2:], problem.w[2:], geometry, (0, 0))
    extra = (problem.x[2] - least[0], problem.x[3] - least[1])
    padding, stride, dilation, groups = geometry
    assert torch.equal(y, F.conv_transpose2d(x, w, b, stride, padding, extra, groups, dilation))
