"""The policy: which candidate runs, what is said of the others, and what is remembered.

cuDNN's part is played by a fake: its answers are the premise here, not what is tested.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest

import dgrad
from dgrad import _runner
from dgrad._runner import Runner
from dgrad.exceptions import TorchOutOfMemoryError, cudnn_error
from fake_cudnn import (
    HEURISTIC,
    MIB,
    REFUSED,
    STREAM,
    THREE,
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
)


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


@pytest.mark.parametrize("when", ["unplannable", "failing"])
def test_an_algorithm_that_fails_is_not_tried_again(start: Start, when: str) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    getattr(core, when)["GEMM"] = REFUSED
    for _ in range(3):
        run()
        run(deterministic=True)
    assert names(core) == ["ALGO_1"] * 6
    assert core.planned.count(("GEMM", "DEFAULT_MATH")) == 1
    assert core.attempts.count("GEMM") == (when == "failing")
    text = refused(algorithm="legacy:GEMM")
    assert "cudnnFinalize returned 3000: the why" in text
    assert "more lines" not in text
    assert core.planned.count(("GEMM", "DEFAULT_MATH")) == 1


def test_a_plan_that_cannot_be_made_in_a_capture_rejects_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    capturing = True
    cuda = vars(_runner)["torch"].cuda
    monkeypatch.setattr(cuda, "is_current_stream_capturing", lambda: capturing)
    core.unplannable["GEMM"] = cudnn_error(4000, "not in a capture", "cudnnBackendFinalize", "")
    run()
    assert names(core) == ["ALGO_1"]
    core.unplannable["ALGO_1"] = core.unplannable["GEMM"]
    with pytest.raises(dgrad.CudnnError, match="not in a capture"):
        run(deterministic=True)
    capturing = False
    core.unplannable.clear()
    run()
    assert names(core)[-1] == "GEMM"


@pytest.mark.parametrize("status", [3000, 4003, 5000])
@pytest.mark.parametrize("broken", ["legacy", "graph"])
def test_a_heuristic_that_fails_leaves_the_other_provider(
    start: Start, broken: str, status: int
) -> None:
    error = cudnn_error(status, "cudnnGet failed", "cudnnGet", "")
    if broken == "legacy":
        core = start(convolution=[FakeEngine("eng1")])
        core.results = error
    else:
        core = start(FakeResult("ALGO_1"), convolution=error)
    run()
    assert names(core) == ["ALGO_1" if broken == "graph" else "convolution:eng1"]
    reasons = [c.rejected for c in dgrad.selections()[0][0].candidates if c.rejected]
    passing = "cuDNN could not be asked this time: " if status > 4000 else ""
    assert set(reasons) == {f"{passing}cudnnGet failed"}


def test_a_failure_on_one_thread_is_known_to_all(start: Start) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    core.failing["GEMM"] = REFUSED
    run()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert core.attempts == ["GEMM", "ALGO_1", "ALGO_1"]


def test_an_algorithm_that_fails_later_is_replaced_in_the_same_runner(start: Start) -> None:
    core = start(FakeResult("GEMM"), FakeResult("ALGO_1"))
    runner = Runner(FakeProblem(), HEURISTIC)
    runner.run(X, W, Y)
    core.failing["GEMM"] = REFUSED
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
