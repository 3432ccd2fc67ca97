"""A capture of a CUDA graph measures nothing, and dgrad.warm_up chooses before it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dgrad
from dgrad import _for_graphs, _measuring, log
from dgrad._runner import Runner
from dgrad.planner import plan_cache
from dgrad.selection import FUSED, IDENTITY, Candidate
from fallbacks import run_python
from gpu_layers import relative_error, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_store")]


def test_a_capture_measures_nothing_and_names_warm_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dgrad.conv_transpose2d(*tensors((1, 4, 4, 4), (4, 4, 3, 3)))  # the thread has its handle
    torch.cuda.synchronize()
    x, w = tensors()
    monkeypatch.setattr(log, "_warned", {})  # it is told of the first such problem alone
    caplog.set_level(logging.INFO, "dgrad")
    real = _measuring.measure
    monkeypatch.setattr(_measuring, "measure", lambda *_: pytest.fail("measured in a capture"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dgrad.conv_transpose2d(x, w)
    assert "dgrad.warm_up" in caplog.text
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert relative_error(y, F.conv_transpose2d(x.double(), w.double())) < 2e-3
    # After the capture the problem is measured like any other.
    monkeypatch.setattr(_measuring, "measure", real)
    dgrad.conv_transpose2d(x, w)
    assert dgrad.selections()[-1][0].source == "measured"


def test_a_capture_in_which_cudnn_cannot_start_names_warm_up() -> None:
    # In a process of its own: a capture that failed leaves PyTorch's allocator in it.
    ran = run_python("""
        import torch, dgrad
        x, w = (torch.randn(2, 2, 3, 3, device="cuda") for _ in "xw")
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                try:
                    dgrad.conv_transpose2d(x, w)
                except dgrad.CudnnError as error:
                    print(error, flush=True)
        except RuntimeError:  # of the capture
            pass
    """)
    assert "call dgrad.warm_up(model, *inputs) on this thread before the capture" in ran.stdout, ran
    assert "To reproduce:" in ran.stdout


def another(
    candidates: Sequence[Candidate], direction: str, policy: object, chosen: int
) -> int | None:
    """In the place of what is faster on the device, which may be the chosen one: any other, and
    one that cuDNN compiles if there is one."""
    others = [i for i, c in enumerate(candidates) if c.rejected is None and i != chosen]
    compiled = (
        i
        for i in others
        if candidates[i].algorithm.endswith(IDENTITY) or candidates[i].bias == FUSED
    )
    timed = (i for i in others if candidates[i].time_ms is not None)
    return next(iter((*compiled, *timed)), None)


def test_a_graph_gets_another_plan_than_calls_of_native_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_for_graphs, "for_graphs", another)
    by_python: list[object] = []
    execute = Runner._execute

    def spy(self: Runner, plan: object, *arguments: Any) -> None:
        by_python.append(plan)
        execute(self, plan, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Runner, "_execute", spy)
    x, w = tensors()

    def call() -> Tensor:
        by_python.clear()
        return dgrad.conv_transpose2d(x, w)

    with torch.no_grad():
        call()
        dgrad.warm_up(call, backward=False)
        other, chosen = by_python
        assert other is not chosen
        call()
        hits = dgrad.plan_cache.hits
        call()
        assert dgrad.plan_cache.hits == hits + 1
        native = plan_cache.ready is not None and plan_cache.exchange is not None
        assert by_python == ([] if native else [chosen])
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        assert by_python == [other]
        call()
        assert by_python == ([] if native else [chosen])
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert relative_error(y, F.conv_transpose2d(x.double(), w.double())) < 2e-3


@pytest.mark.parametrize("gets_another", [False, True])
def test_after_warm_up_a_training_step_is_captured_and_its_replays_stay_right(
    monkeypatch: pytest.MonkeyPatch, gets_another: bool
) -> None:
    places: list[int | None] = []

    def recorded(*arguments: Any) -> int | None:
        places.append(another(*arguments))
        return places[-1]

    if gets_another:
        monkeypatch.setattr(_for_graphs, "for_graphs", recorded)
    torch.manual_seed(0)
    make = [
        dgrad.ConvTranspose2d(16, 32, 4, 2, 1, device="cuda"),
        torch.nn.BatchNorm2d(32, device="cuda"),
        torch.nn.ReLU(),
        dgrad.ConvTranspose2d(32, 3, 4, 2, 1, device="cuda"),
    ]
    model = torch.nn.Sequential(*make)
    x = torch.randn(8, 16, 16, 16, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        explanation = dgrad.warm_up(model, x)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    torch.cuda.current_stream().wait_stream(side)
    # The input needs no gradient, so the first layer has no fprop.
    directions = [s.problem.direction for s in explanation.selections]
    assert sorted(directions) == ["dgrad", "dgrad", "fprop", "wgrad", "wgrad"]

    assert None not in places
    assert len(places) >= 5 * gets_another

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for p in model.parameters():
            p.grad.zero_()  # type: ignore[union-attr]
        loss = model(x).square().mean()
        loss.backward()

    reference = torch.nn.Sequential(
        *(
            torch.nn.ConvTranspose2d(16, 32, 4, 2, 1, device="cuda"),
            torch.nn.BatchNorm2d(32, device="cuda"),
            torch.nn.ReLU(),
            torch.nn.ConvTranspose2d(32, 3, 4, 2, 1, device="cuda"),
        )
    ).double()
    reference.load_state_dict(
        {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    )
    for round_ in range(4):
        x.copy_(torch.randn_like(x))
        for n in range(3):  # other work between the replays, and nothing left in the caches
            dgrad.conv_transpose2d(*tensors((n + 1, 16, 9 + round_, 9), (16, 8, 3, 3)))
        dgrad.plan_cache.clear()
        torch.cuda.empty_cache()
        graph.replay()
        wanted = reference(x.double()).square().mean()
        reference.zero_grad()
        wanted.backward()
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            if theirs.grad.norm() > 1e-9:  # the bias before a batch norm has none
                assert relative_error(mine.grad, theirs.grad) < 2e-2
