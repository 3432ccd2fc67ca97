"""How a bias comes into a result: by the engine, by one of its own, or by PyTorch's addition.

The plans are a fake's; the tensors are real, so that what a kernel would read is what is tested.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from biased import BIASED, LEGACY, NOT_SUPPORTED, biased
from dgrad import config
from dgrad._runner import Runner
from dgrad.selection import Candidate
from fake_cudnn import (
    BIAS,
    MIB,
    VALUE,
    FakeCore,
    FakeEngine,
    FakeProblem,
    FakeResult,
    Start,
    W,
    X,
    Y,
    compute,
    fake_times,
    names,
    refused,
    run,
)

LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


def batch(images: int, layout: str = "nchw") -> tuple[FakeProblem, Tensor]:
    """A problem of so many images, and its x."""
    problem = replace(BIASED, x=(images, 2, 7, 7), y=(images, 4, 3, 3), layout=layout)
    return problem, torch.empty(problem.x).contiguous(memory_format=LAYOUTS[layout])


def test_without_a_bias_none_is_passed(start: Start) -> None:
    core = start(LEGACY, convolution=[FakeEngine("eng1")])
    compute(core, X)
    run(FakeProblem(tf32=False))
    run(FakeProblem(tf32=False), algorithm="legacy")
    assert names(core) == ["convolution:eng1", "ALGO_1"]
    assert [bias for *_, bias, _ in core.ran] == [0, 0]
    assert torch.equal(X, torch.full_like(X, VALUE))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_fused_bias_is_the_engines_alone(start: Start, layout: str, images: int) -> None:
    core = start(convolution_bias=[FakeEngine("eng30")])
    problem, x = batch(images, layout)
    read = compute(core, x)
    measured(problem).run(x, W, Y, BIAS)
    assert names(core) == ["convolution_bias:eng30"]
    assert read == [BIAS.tolist()]
    assert core.ran[0][4] == BIAS.data_ptr()
    assert torch.equal(x, biased(x))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_an_engine_for_it_pytorch_adds_the_bias(
    start: Start, layout: str, images: int
) -> None:
    core = start(LEGACY)
    problem, x = batch(images, layout)
    compute(core, x)
    address, strides = x.data_ptr(), x.stride()
    measured(problem).run(x, W, Y, BIAS)
    assert names(core) == ["ALGO_1"]
    assert torch.equal(x, biased(x))
    assert (x.data_ptr(), x.stride()) == (address, strides)


def of_legacy(start: Start, monkeypatch: pytest.MonkeyPatch, passes: dict[str, float]) -> FakeCore:
    """ALGO_1 and these ways to add the bias to its result, with their times in milliseconds."""
    engines = [FakeEngine(name) for name in passes if name != "add"]
    core = start(LEGACY, bias_rows=engines, bias=engines)
    times: dict[str, float | None] = {"ALGO_1": passes["add"]}
    for operation in ("bias", "bias_rows"):
        times |= {f"ALGO_1 + {operation}:{each.name}": passes[each.name] for each in engines}
    fake_times(core, monkeypatch, times)
    compute(core, X)
    return core


def measured(problem: FakeProblem, **flags: Any) -> Runner:
    return Runner(problem, config.policy(dgrad.Flags(selection="measure", **flags)))  # type: ignore[arg-type]


@pytest.mark.parametrize("images", [1, 2, 5])
def test_an_engine_that_sees_rows_gets_the_bias_once_for_each_image(
    start: Start, monkeypatch: pytest.MonkeyPatch, images: int
) -> None:
    core = of_legacy(start, monkeypatch, {"add": 2.0, "eng50": 1.0})
    problem, x = batch(images)
    read = compute(core, x)
    measured(problem).run(x, W, Y, BIAS)
    assert names(core) == ["ALGO_1 + bias_rows:eng50"]
    assert read[-1] == BIAS.tolist() * images
    assert torch.equal(x, biased(x))


def test_an_engine_that_sees_channels_gets_the_bias_as_it_is(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = of_legacy(start, monkeypatch, {"add": 2.0, "eng50": 1.0})
    problem, x = batch(3, "nhwc")
    compute(core, x)
    measured(problem).run(x, W, Y, BIAS)
    ((name, *_, bias, _),) = core.ran
    assert name == "ALGO_1 + bias:eng50"
    assert bias == BIAS.data_ptr()
    assert torch.equal(x, biased(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["pass", "fused", "add"])
def test_each_run_takes_the_bias_as_it_is_then(
    start: Start, monkeypatch: pytest.MonkeyPatch, way: str, layout: str
) -> None:
    if way == "fused":
        core = start(convolution_bias=[FakeEngine("eng30")])
    else:
        core = of_legacy(start, monkeypatch, {"add": 2.0, "eng50": 1.0 if way == "pass" else 3.0})
    problem, x = batch(2, layout)
    compute(core, x)
    runner = measured(problem)
    first, second = BIAS.clone(), torch.tensor([5.0, 7.0])
    for value in (first, second, first, first):
        runner.run(x, W, Y, value)
        assert torch.equal(x, biased(x, value))
        first += 1  # as an optimizer does, in place
    assert len(names(core)) == 4
    assert len(set(names(core))) == 1


def test_a_pass_that_fails_later_is_replaced_and_the_bias_added_once(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = of_legacy(start, monkeypatch, {"add": 2.0, "eng50": 1.0})
    runner = measured(BIASED)
    runner.run(X, W, Y, BIAS)
    core.failing["ALGO_1 + bias_rows:eng50"] = NOT_SUPPORTED
    for _ in range(2):
        runner.run(X, W, Y, BIAS)
        assert torch.equal(X, biased(X))
    assert names(core) == ["ALGO_1 + bias_rows:eng50", "ALGO_1", "ALGO_1"]


def test_a_pass_that_fails_while_it_is_timed_is_replaced(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = of_legacy(start, monkeypatch, {"add": 3.0, "eng50": 1.0, "eng51": 2.0, "eng52": 0.5})
    core.failing["ALGO_1 + bias_rows:eng50"] = NOT_SUPPORTED
    core.unplannable["bias_rows:eng52"] = NOT_SUPPORTED
    for _ in range(2):
        measured(BIASED).run(X, W, Y, BIAS)
    assert names(core) == ["ALGO_1 + bias_rows:eng51"] * 2
    assert core.planned.count(("bias_rows", "eng52")) == 1
    ((selection, _),) = dgrad.selections()
    assert [c.rejected for c in selection.candidates] == [
        None, "cudnnRun returned 3000", None, "cudnnRun returned 3000",
    ]  # fmt: skip


def test_a_pass_that_gives_another_result_is_found_out(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = of_legacy(start, monkeypatch, {"add": 3.0, "eng50": 1.0, "eng51": 2.0})
    right = core.on_run

    def wrong(name: str, x: int, bias: int) -> None:
        right(name, x, bias)
        if name.endswith("eng50"):
            X[0, 1, 3, 3] += 100

    core.on_run = wrong
    measured(BIASED).run(X, W, Y, BIAS)
    assert names(core) == ["ALGO_1 + bias_rows:eng51"]
    assert torch.equal(X, biased(X))
    ((selection, _),) = dgrad.selections()
    reasons = {c.bias: c.rejected for c in selection.candidates}
    assert str(reasons.pop("eng50")).startswith("its result is not that of the first candidate")
    assert reasons == {"add": None, "eng51": None}


def test_a_pass_counts_to_the_workspace(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    core = of_legacy(start, monkeypatch, {"add": 3.0, "eng50": 1.0})
    core.engines["bias_rows"] = [FakeEngine("eng50", workspace_bytes=3 * MIB)]
    measured(BIASED, workspace_limit=MIB).run(X, W, Y, BIAS)
    measured(BIASED, workspace_limit=3 * MIB).run(X, W, Y, BIAS)
    core.free_bytes = MIB
    measured(BIASED).run(X, W, Y, BIAS)
    # The second measuring runs ALGO_1 for the check of the pass.
    assert names(core) == ["ALGO_1", "ALGO_1", "ALGO_1 + bias_rows:eng50", "ALGO_1"]


def test_a_problem_and_its_biased_one_are_two(start: Start) -> None:
    core = start(LEGACY)
    compute(core, X)
    core.failing["ALGO_1"] = NOT_SUPPORTED
    refused(BIASED, BIAS)
    core.failing.clear()
    run(FakeProblem(tf32=False))
    assert names(core) == ["ALGO_1"]


# --- said ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias", "text"),
    [
        (None, "graph:eng5_k2=3 (FMA_MATH)"),
        ("fused", "graph:eng5_k2=3 (FMA_MATH) with bias"),
        ("add", "graph:eng5_k2=3 (FMA_MATH) + PyTorch's bias"),
        ("eng1_k24=4", "graph:eng5_k2=3 (FMA_MATH) + bias eng1_k24=4"),
    ],
)
def test_a_candidates_text_says_how_the_bias_is_added(bias: str | None, text: str) -> None:
    candidate = Candidate("graph", "eng5_k2=3", "FMA_MATH", True, 0, bias=bias)
    assert str(candidate) == text
    assert candidate.name == "graph:eng5_k2=3"
    assert candidate.engine == ("graph", "eng5_k2=3", "FMA_MATH")


def test_the_error_of_a_biased_problem_reproduces_it(start: Start) -> None:
    start(FakeResult("ALGO_1", "FMA_MATH", deterministic=False))
    text = refused(BIASED, BIAS, deterministic=True)
    assert "legacy:ALGO_1 (FMA_MATH) + PyTorch's bias" in text
    assert 'b = torch.randn(2, dtype=torch.float32, device="cuda:0")' in text
