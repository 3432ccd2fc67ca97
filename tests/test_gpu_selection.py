"""Choosing on a real GPU: measured, commanded, and without a trace."""

from __future__ import annotations

import json
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dgrad
from dgrad import _measuring
from dgrad.measure import CLOSE, measure
from dgrad.planner import decisive_ms
from gpu_layers import SUITE, held_bytes, relative_error, tensors

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_store")]


def only_selection() -> dgrad.Selection:
    [(selection, _)] = dgrad.selections()
    return selection


def test_every_candidate_that_can_run_gets_a_time_and_the_fastest_wins() -> None:
    x, w = tensors()
    with dgrad.flags(selection="exhaustive"):
        y = dgrad.conv_transpose2d(x, w)
    selection = only_selection()
    times = {
        i: candidate.time_ms
        for i, candidate in enumerate(selection.candidates)
        if selection.objections[i] is None
    }
    assert selection.source == "measured"
    assert len(times) >= 2
    assert all(value is not None and value > 0 for value in times.values())
    best = min(value for value in times.values() if value is not None)
    chosen = times[selection.chosen]
    assert chosen is not None
    assert chosen <= best * CLOSE
    decides = decisive_ms(selection.candidates, times)
    assert decides[selection.chosen] <= min(decides.values()) * 1.01
    assert relative_error(y, F.conv_transpose2d(x.double(), w.double())) < 2e-3


def test_measuring_leaves_no_trace() -> None:
    x, w = tensors()
    x0, w0 = x.clone(), w.clone()
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    host, device = torch.get_rng_state(), torch.cuda.get_rng_state()
    dgrad.conv_transpose2d(*tensors((1, 4, 4, 4), (4, 4, 3, 3)))  # loads what stays loaded
    torch.cuda.synchronize()
    torch.set_rng_state(host)
    torch.cuda.set_rng_state(device)
    before = held_bytes()
    y = dgrad.conv_transpose2d(x, w)
    size = y.untyped_storage().nbytes()
    assert held_bytes() - before == size
    assert torch.equal(x, x0)
    assert torch.equal(w, w0)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.get_rng_state(), host)
    assert torch.equal(torch.cuda.get_rng_state(), device)


@pytest.mark.seconds(20)
def test_the_workspaces_that_were_tried_are_given_back() -> None:
    slack = 64 * 2**20
    given_back = 0
    for shape, kernel, tf32 in (
        ((16, 64, 128, 128), (64, 64, 3, 5), True),
        ((16, 64, 128, 128), (64, 64, 3, 5), False),
        ((64, 3, 256, 256), (3, 16, 5, 5), True),
        ((32, 128, 64, 64), (128, 128, 1, 1), True),
    ):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            dgrad.plan_cache.clear()
            x, w = (t.to(memory_format=memory_format) for t in tensors(shape, kernel))
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            with dgrad.flags(selection="exhaustive", allow_tf32=tf32):
                y = dgrad.conv_transpose2d(x, w)
            selection = only_selection()
            tried = max(c.workspace_bytes for c in selection.candidates if c.time_ms is not None)
            used = y.untyped_storage().nbytes() + selection.candidate.workspace_bytes
            assert torch.cuda.memory_reserved() - before < used + slack
            given_back += y.untyped_storage().nbytes() + tried > used + slack
    assert given_back, "no problem tried a workspace that is much larger than the chosen one's"


def test_two_threads_that_meet_the_same_problem_measure_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def counted(*arguments: object) -> None:
        calls.append(1)
        measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_measuring, "measure", counted)
    x, w = tensors()
    expected = F.conv_transpose2d(x.double(), w.double())
    torch.cuda.synchronize()
    barrier = threading.Barrier(4)
    results: list[Tensor] = []

    def work() -> None:
        barrier.wait()
        results.append(dgrad.conv_transpose2d(x, w))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(calls) == 1
    assert len(results) == 4
    assert all(relative_error(y, expected) < 2e-3 for y in results)


def test_another_limit_determinism_or_precision_needs_no_new_measuring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w = tensors((8, 64, 128, 128), (64, 64, 3, 3))
    with dgrad.flags(selection="exhaustive"):
        dgrad.conv_transpose2d(x, w)
        monkeypatch.setattr(_measuring, "measure", lambda *_: pytest.fail("measured again"))
        with dgrad.flags(deterministic=True):
            dgrad.conv_transpose2d(x, w)
        with dgrad.flags(workspace_limit=0):
            dgrad.conv_transpose2d(x, w)
        with dgrad.flags(allow_tf32=False):
            dgrad.conv_transpose2d(x, w)
    chosen = [selection.candidate for selection, _ in dgrad.selections()]
    assert len(chosen) == 4
    assert chosen[3].math_type == "FMA_MATH"
    assert chosen[1].deterministic
    assert chosen[2].workspace_bytes == 0


@pytest.mark.parametrize("direction", ["dgrad", "fprop", "wgrad"])
def test_allowing_tf32_needs_no_new_measuring(
    monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    x, w = (t.requires_grad_(direction != "dgrad") for t in tensors((8, 64, 64, 64)))

    def call() -> Tensor:
        y = dgrad.conv_transpose2d(x, w)
        if direction == "dgrad":
            return y
        (gradient,) = torch.autograd.grad(y, x if direction == "fprop" else w, torch.ones_like(y))
        return gradient

    with dgrad.flags(measure_budget=0.3):
        with dgrad.flags(allow_tf32=False):
            strict = call().detach()
        monkeypatch.setattr(_measuring, "measure", lambda *_: pytest.fail("measured again"))
        call()
        dgrad.plan_cache.clear()  # as another process
        call()
    leaves = [t.detach().double().requires_grad_() for t in (x, w)]
    y = F.conv_transpose2d(*leaves)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    expected = {"dgrad": y.detach(), "fprop": gradients[0], "wgrad": gradients[1]}[direction]
    assert relative_error(strict, expected) < 5e-5  # tf32 errs by 3e-4


def test_a_limit_that_costs_time_says_how_much() -> None:
    x, w = tensors((8, 64, 256, 256), (64, 64, 3, 3))
    with dgrad.flags(selection="exhaustive"):
        dgrad.conv_transpose2d(x, w)
        free = only_selection().candidate
        assert free.workspace_bytes > 0
        with dgrad.flags(workspace_limit=free.workspace_bytes - 1):
            dgrad.conv_transpose2d(x, w)
    limited = dgrad.selections()[1][0]
    assert limited.candidate.workspace_bytes < free.workspace_bytes
    assert "over workspace_limit" in limited.verdicts()[limited.candidates.index(free)]
    if limited.candidate.time_ms > free.time_ms:  # type: ignore[operator]
        assert "of workspace" in str(limited)


def test_the_first_usable_of_a_list_runs() -> None:
    x, w = tensors((2, 8, 16, 16), (8, 8, 3, 3))
    with dgrad.flags(algorithm=["legacy:FFT", "legacy:ALGO_1", "legacy:ALGO_0"]):
        dgrad.conv_transpose2d(x, w)
        assert only_selection().source == "forced"
        assert only_selection().candidate.name == "legacy:FFT"
        # With stride 2 cuDNN has no FFT.
        dgrad.conv_transpose2d(x, w, stride=2)
        assert dgrad.selections()[1][0].candidate.name == "legacy:ALGO_1"


def test_a_layers_flags_hold_for_its_gradients_too() -> None:
    layer = dgrad.ConvTranspose2d(8, 8, 3, device="cuda")
    layer.flags = dgrad.Flags(selection="heuristic", deterministic=True)
    layer(torch.randn(2, 8, 9, 9, device="cuda", requires_grad=True)).sum().backward()
    assert {s.problem.direction for s, _ in dgrad.selections()} == {"dgrad", "fprop", "wgrad"}
    assert all(s.source == "heuristic" for s, _ in dgrad.selections())
    assert all(s.candidate.deterministic for s, _ in dgrad.selections())


@pytest.mark.parametrize("selection", ["measure", "exhaustive"])
def test_strict_float32_never_runs_tf32(selection: str) -> None:
    for x_size, w_size, options, _ in SUITE:
        x, w = tensors(x_size, w_size)
        with dgrad.flags(allow_tf32=False, selection=selection):
            y = dgrad.conv_transpose2d(x, w, **options)  # type: ignore[arg-type]
        expected = F.conv_transpose2d(x.double(), w.double(), **options)
        error = relative_error(y, expected)
        assert error < 5e-6, (x_size, error, str(dgrad.selections()[-1][0]))
    assert all(s.candidate.math_type == "FMA_MATH" for s, _ in dgrad.selections())


def test_explain_disturbs_nothing_and_says_why() -> None:
    layer = dgrad.ConvTranspose2d(8, 8, 3, device="cuda")
    x = torch.randn(2, 8, 9, 9, device="cuda", requires_grad=True)
    host, device = torch.get_rng_state(), torch.cuda.get_rng_state()
    explanation = dgrad.explain(layer, x, backward=True)
    assert x.grad is None
    assert layer.weight.grad is None
    assert torch.equal(torch.get_rng_state(), host)
    assert torch.equal(torch.cuda.get_rng_state(), device)
    assert explanation.selections[0].problem.direction == "dgrad"
    assert len(explanation.selections) == 3
    text = str(explanation)
    assert "chosen" in text
    assert "rejected: " in text
    json.dumps(explanation.to_dict(), allow_nan=False)


def test_the_snippet_of_an_error_makes_the_same_error_when_pasted() -> None:
    x, w = tensors((2, 8, 16, 16), (8, 8, 3, 3))
    x = x.to(memory_format=torch.channels_last)
    with (
        dgrad.flags(algorithm="legacy:FFT", workspace_limit=64, allow_tf32=False),
        pytest.raises(dgrad.NotSupportedError) as error,
    ):
        dgrad.conv_transpose2d(x, w, None, 2, 1, 1)
    message = str(error.value)
    snippet = message.split("To reproduce:\n")[1]
    with pytest.raises(dgrad.NotSupportedError) as again:
        exec(snippet, {})
    assert str(again.value) == message


@pytest.mark.alone
def test_selecting_takes_about_its_budget() -> None:
    x, w = tensors((8, 64, 512, 512), (64, 64, 3, 7))
    dgrad.conv_transpose2d(*tensors((1, 4, 4, 4), (4, 4, 3, 3)))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with dgrad.flags(measure_budget=0.05):
        dgrad.conv_transpose2d(x, w)
    torch.cuda.synchronize()
    # The candidate under way when the budget ends is finished, and plans are built besides.
    assert time.perf_counter() - begin < 1.0
