"""A capture of a CUDA graph measures nothing, and dgrad.warm_up chooses before it."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

import dgrad
from dgrad import _measuring, log
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


def test_after_warm_up_a_training_step_is_captured_and_its_replays_stay_right() -> None:
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
