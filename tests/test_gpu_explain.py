"""On a GPU explain tells of autograd's own threads and of no other's, and counts nothing."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import dgrad

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_store")]


def layer(kernel: int) -> tuple[dgrad.ConvTranspose2d, Tensor]:
    x = torch.randn(2, 8, 9, 9, device="cuda", requires_grad=True)
    return dgrad.ConvTranspose2d(8, 8, kernel, device="cuda"), x


def told(explanation: dgrad.Explanation) -> list[tuple[str, int]]:
    """Directions and kernel heights."""
    return sorted((s.problem.direction, s.problem.w[2]) for s in explanation.selections)


def test_what_another_thread_trains_meanwhile_is_not_told_but_counted() -> None:
    (theirs, given), (ours, x) = layer(5), layer(3)
    stop, runs = threading.Event(), 0

    def train() -> None:
        nonlocal runs
        while not stop.is_set() or runs < 5:
            torch.autograd.grad(theirs(given).sum(), (given, theirs.weight))
            runs += 1

    thread = threading.Thread(target=train)
    thread.start()
    try:
        found = [told(dgrad.explain(ours, x, backward=True)) for _ in range(5)]
    finally:
        stop.set()
        thread.join()
    assert found == [[("dgrad", 3), ("fprop", 3), ("wgrad", 3)]] * 5
    counts = {(s.problem.direction, s.problem.w[2]): n for s, n in dgrad.selections()}
    assert counts == {
        **{(direction, 3): 0 for direction in ("dgrad", "fprop", "wgrad")},
        **{(direction, 5): runs for direction in ("dgrad", "fprop", "wgrad")},
    }


def test_what_a_thread_of_the_call_runs_backward_is_told() -> None:
    up, x = layer(3)

    def call() -> None:
        thread = threading.Thread(target=lambda: up(x).sum().backward())
        thread.start()
        thread.join()

    for rehearse in (dgrad.explain, dgrad.warm_up):
        assert told(rehearse(call)) == [("dgrad", 3), ("fprop", 3), ("wgrad", 3)]
    assert [count for _, count in dgrad.selections()] == [0] * 3


def test_two_layers_of_one_shape_and_different_flags_are_both_told() -> None:
    (first, x), (second, _) = layer(3), layer(3)
    second.flags = dgrad.Flags(selection="heuristic", algorithm="legacy:ALGO_1")
    model = torch.nn.Sequential(first, torch.nn.ZeroPad2d(-1), second)
    explanation = dgrad.explain(model, x)
    assert len({s.problem for s in explanation.selections}) == 1
    assert len(explanation.selections) == 2
    assert explanation.selections[1].source == "forced"
    assert "under selection='heuristic', algorithm=('legacy:ALGO_1',)" in str(explanation)
