"""CUDA graphs of torch.cuda.make_graphed_callables, and several graphs in one pool of memory."""

from __future__ import annotations

import copy
import gc
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgrad
from dgrad._knowledge import knowledge_of
from gpu_layers import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_store"), pytest.mark.seconds(2)]

SIZES = ((8, 16, 12, 12), (3, 16, 7, 20))
ROUNDS = 4
LOSS_SCALE = 1024.0  # float16's gradients of the mean alone would round to zero


def models() -> tuple[nn.Sequential, nn.Sequential]:
    """With PyTorch's layers in float64, and the same in float32 with dgrad's; none has corners."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.Tanh(),
        nn.ConvTranspose2d(32, 16, (3, 5), padding=1, groups=4),
        nn.Tanh(),
        nn.ConvTranspose2d(16, 3, 3, stride=2, output_padding=1),
    ).cuda()
    converted = copy.deepcopy(plain)
    assert len(dgrad.convert(converted)) == 3
    return plain.double(), converted


def chosen() -> dict[str, str]:
    return {str(s.problem): str(s.candidate) for s, _ in dgrad.selections()}


def other_work(number: int) -> None:
    """Another shape, forward and backward; then nothing is left in the caches, and whatever
    memory is free is written over."""
    x = torch.randn(number + 1, 16, 9 + number, 9, device="cuda", requires_grad=True)
    w = torch.randn(16, 8, 3, 3, device="cuda", requires_grad=True)
    dgrad.conv_transpose2d(x, w).square().sum().backward()
    dgrad.plan_cache.clear()
    torch.cuda.empty_cache()
    torch.full((1 << 24,), math.nan, device="cuda")


def test_graphed_inference_stays_right_after_other_work(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dgrad")
    plain, model = (m.eval().requires_grad_(False) for m in models())
    x = torch.randn(SIZES[0], device="cuda")
    with dgrad.flags(allow_tf32=False, fallback="error"):
        dgrad.warm_up(model, x)
        before = chosen()
        pool = torch.cuda.graph_pool_handle()
        graphed = torch.cuda.make_graphed_callables(model, (x,), pool=pool)
    assert len(before) == 3
    assert chosen() == before, "something was chosen after warm_up"
    assert "dgrad.warm_up" not in caplog.text
    for number in range(ROUNDS):
        given = torch.randn(SIZES[0], device="cuda")
        other_work(number)
        assert relative_error(graphed(given), plain(given.double())) < 1e-4
    # What the graph was not made for runs as ever.
    other = torch.randn(SIZES[1], device="cuda")
    model.train()
    with dgrad.flags(allow_tf32=False):
        assert relative_error(model(other), plain.train()(other.double())) < 1e-4


# PyTorch's own, from 2.10: the captured graph keeps nodes of the stream that it was captured on.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
@pytest.mark.parametrize(
    ("parts", "half", "limit"), [(1, None, 1e-4), (2, None, 1e-4), (1, torch.float16, 1e-2)]
)
def test_graphed_training_stays_right_after_other_work(
    parts: int, half: torch.dtype | None, limit: float, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "dgrad")
    plain, model = models()
    sample = torch.randn(SIZES[0], device="cuda", requires_grad=True)
    autocast = torch.autocast(
        "cuda", dtype=half or torch.float16, enabled=half is not None, cache_enabled=False
    )
    with autocast, dgrad.flags(allow_tf32=False, fallback="error"):
        split: tuple[nn.Module, ...] = (model,) if parts == 1 else (model[:3], model[3:])
        samples = [sample]
        for part in split:
            dgrad.warm_up(part, samples[-1])
            samples.append(part(samples[-1]).detach().requires_grad_())
        before = chosen()
        graphed = torch.cuda.make_graphed_callables(
            split, tuple((s,) for s in samples[:-1]), pool=torch.cuda.graph_pool_handle()
        )
    assert len(before) == 9  # three layers, in three directions each
    assert chosen() == before, "something was chosen after warm_up"
    assert "dgrad.warm_up" not in caplog.text

    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01 / LOSS_SCALE) for m in (model, plain)]
    for number in range(ROUNDS):
        x = torch.randn(SIZES[0], device="cuda", requires_grad=True)
        exact = x.detach().double().requires_grad_()
        other_work(number)
        y: Tensor = x
        for part in graphed:
            y = part(y)
        other_work(number + ROUNDS)
        (y.float().square().mean() * LOSS_SCALE).backward()
        wanted = plain(exact)
        (wanted.square().mean() * LOSS_SCALE).backward()
        assert relative_error(y.detach(), wanted.detach()) < limit
        for mine, theirs in zip(
            [x, *model.parameters()], [exact, *plain.parameters()], strict=True
        ):
            assert mine.grad is not None
            assert theirs.grad is not None
            assert relative_error(mine.grad, theirs.grad) < limit
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def test_graphs_of_several_shapes_share_a_pool() -> None:
    plain, model = (m.eval().requires_grad_(False) for m in models())
    pool = torch.cuda.graph_pool_handle()
    inputs = [torch.randn(size, device="cuda") for size in SIZES]
    graphs, outputs = [], []
    with dgrad.flags(allow_tf32=False, fallback="error"):
        for x in inputs:
            dgrad.warm_up(model, x)
        for x in inputs:
            graphs.append(torch.cuda.CUDAGraph())
            torch.cuda.synchronize()
            with torch.cuda.graph(graphs[-1], pool=pool):
                outputs.append(model(x))
    for number in range(ROUNDS):
        for x in inputs:
            x.copy_(torch.randn_like(x))
        for graph in graphs:  # in the order of the captures, as what shares a pool must
            other_work(number)
            graph.replay()
        for x, y in zip(inputs, outputs, strict=True):
            assert relative_error(y, plain(x.double())) < 1e-4


@pytest.mark.seconds(15)
@pytest.mark.parametrize("kind", ["one graph", "fused", "pass"])
def test_what_cudnn_compiled_goes_on_in_a_graph_after_its_plan_is_gone(kind: str) -> None:
    torch.manual_seed(0)
    x, w = (
        torch.randn(size, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        for size in ((4, 32, 8, 10), (32, 16, 2, 2))
    )
    b = None if kind == "one graph" else torch.randn(16, device="cuda", dtype=torch.bfloat16)
    with dgrad.flags(selection="heuristic", algorithm="graph"):
        dgrad.conv_transpose2d(x, w, b, 2)
    (found, _), *_ = dgrad.selections()
    wanted = {
        "one graph": lambda c: "+identity" in c.algorithm,
        "fused": lambda c: c.bias == "fused",
        "pass": lambda c: c.bias not in (None, "add", "fused"),
    }[kind]
    chosen = next(c for c in found.candidates if c.rejected is None and wanted(c))
    for _ in range(2):  # the second time its kernels are restored
        use_only(found.problem, chosen)
        with dgrad.flags(selection="heuristic", algorithm="graph", fallback="error"):
            for _ in range(3):
                dgrad.conv_transpose2d(x, w, b, 2)
            assert str(dgrad.selections()[-1][0].candidate) == str(chosen)
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                out = dgrad.conv_transpose2d(x, w, b, 2)
        for number in range(ROUNDS):
            other_work(number)
            gc.collect()
            x.normal_()
            graph.replay()
            right = F.conv_transpose2d(
                x.double(), w.double(), None if b is None else b.double(), stride=2
            )
            assert relative_error(out, right) < 1e-2


def use_only(problem: Any, candidate: dgrad.Candidate) -> None:
    """Let nothing but this candidate run a problem."""
    dgrad.plan_cache.clear()
    knowledge = knowledge_of(problem)
    for index, each in enumerate(knowledge.candidates):
        if (each.engine, each.bias) != (candidate.engine, candidate.bias):
            knowledge.update(index, rejected="the test wants another")


@pytest.mark.seconds(5)
def test_a_plan_may_go_while_its_work_is_queued() -> None:
    x = torch.randn(4, 32, 8, 10, device="cuda", dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last)
    w = torch.randn(32, 16, 2, 2, device="cuda", dtype=torch.bfloat16)
    with dgrad.flags(selection="heuristic", algorithm="graph"):
        dgrad.conv_transpose2d(x, w, None, 2)
        (found, _), *_ = dgrad.selections()
        compiled = next(c for c in found.candidates if "+identity" in c.algorithm)
        use_only(found.problem, compiled)
        wanted = dgrad.conv_transpose2d(x, w, None, 2)
        assert str(dgrad.selections()[-1][0].candidate) == str(compiled)
        torch.cuda._sleep(200_000_000)
        found_later = dgrad.conv_transpose2d(x, w, None, 2)
        dgrad.plan_cache.clear()
        gc.collect()
        other_work(0)
    assert torch.equal(found_later, wanted)
