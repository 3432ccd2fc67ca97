"""What is told of selections: the log's lines, counts, tables of reasons, snippets.

cuDNN's part is played by a fake.
"""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dgrad
from dgrad import config
from dgrad._geometry import Geometry, Pair, output_size
from dgrad._reproduction import of_problem
from dgrad._runner import Runner
from dgrad.exceptions import cudnn_error
from dgrad.selection import Candidate, Selection, format_bytes, reasons_table
from fake_cudnn import (
    HEURISTIC,
    MIB,
    REFUSED,
    FakeProblem,
    FakeResult,
    Start,
    W,
    X,
    Y,
    names,
    run,
)


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
    core.failing["GEMM"] = REFUSED
    with caplog.at_level(logging.DEBUG, logger="dgrad"):
        run(deterministic=True)
    lines = messages(caplog, logging.DEBUG)
    assert lines[0].startswith("rejected legacy:GEMM (DEFAULT_MATH) for FakeProblem")
    assert lines[1:] == [
        "candidate legacy:GEMM (DEFAULT_MATH): rejected: cudnnFinalize returned 3000: the why",
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


def test_a_workspace_that_is_not_known_is_not_0() -> None:
    engine = Candidate("graph", "eng1", "FMA_MATH", True, 0)
    candidates = (engine, replace(engine, time_ms=1.0), CHOSEN)
    selection = Selection(FakeProblem(), candidates, 2, (None,) * 3, "heuristic")  # type: ignore[arg-type]
    sizes = [candidate["workspace_bytes"] for candidate in selection.to_dict()["candidates"]]
    assert sizes == [None, 0, 5 * MIB]
    assert [row[2] for row in selection.table()[1:]] == ["not known", "0 B", "5.0 MiB"]


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
    replaced, selection = (selection for selection, _ in dgrad.selections())
    assert replaced.candidate.name == "legacy:ALGO_1"
    assert replaced.verdicts()[0] == "chosen; rejected since: no longer"
    assert selection.candidate.name == "legacy:ALGO_0"


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
    [
        {"deterministic": True},
        {"allow_tf32": False},
        {"workspace_limit": 0},
        {"algorithm": "legacy:a"},
    ],
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
    snippet = of_problem(problem, {"deterministic": True, "workspace_limit": 5})  # type: ignore[arg-type]
    assert f'device="cuda:{problem.device}"' in snippet
    assert "with dgrad.flags(deterministic=True, workspace_limit=5):" in snippet
    assert ("backward()" in snippet) is (problem.direction != "dgrad")
    needed = [line[0] for line in snippet.splitlines() if "requires_grad_()" in line]
    assert needed == {"dgrad": [], "fprop": ["x"], "wgrad": ["w"]}[problem.direction]
    # There is no GPU here, so the same lines run on the CPU, where oneDNN crashes in some gradients
    # (one column wide, channels last: float32 in PyTorch 2.4, bfloat16 in 2.13). It takes no
    # float64; all else runs without values.
    device = "cpu" if problem.dtype == "float64" else "meta"
    variables: dict[str, Any] = {}
    exec(snippet.replace(f"cuda:{problem.device}", device), variables)
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
    wanted = F.conv_transpose2d(x, w, b, stride, padding, extra, groups, dilation)
    assert y.shape == wanted.shape
    assert device == "meta" or torch.equal(y, wanted)
