"""explain and warm_up of models that are compiled, and of ones whose layers are lazy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dgrad
from dgrad import log
from operands import compiles

X = torch.randn(2, 3, 5, 5)


# --- compiled -----------------------------------------------------------------------------------


def compiled_model() -> tuple[Any, list[torch.fx.GraphModule]]:
    """A compiled model, and the graphs that it was compiled to."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(
        dgrad.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 3)
    )
    return torch.compile(model, fullgraph=True, backend=keep), graphs


@compiles
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("backward", [True, False])
def test_a_model_compiled_whole_stays_one_graph(backward: bool) -> None:
    model, graphs = compiled_model()
    with torch.set_grad_enabled(backward):
        model(X)
        dgrad.warm_up(model, X, backward=backward)
        dgrad.explain(model, X, backward=backward)
        model(X)
    assert len(graphs) == 1


@compiles
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_is_compiled_in_warm_up_as_it_would_be_later() -> None:
    model, graphs = compiled_model()
    dgrad.warm_up(model, X)
    assert len(graphs) == 1
    model(X)
    assert len(graphs) == 1


# --- lazy ---------------------------------------------------------------------------------------


class Lazy(nn.Module):
    """With a layer that no call uses, and statistics that each call in training changes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.LazyConvTranspose2d(4, 3),
            nn.LazyBatchNorm2d(),
            dgrad.ConvTranspose2d(4, 2, 2),
            nn.LazyInstanceNorm2d(track_running_stats=True),
        )
        self.unused = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.up(x)
        return output


def lazy_model() -> Lazy:
    torch.manual_seed(7)
    return Lazy()


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("rehearse", [dgrad.explain, dgrad.warm_up])
def test_lazy_layers_are_initialized_as_by_a_first_call(
    rehearse: Callable[..., dgrad.Explanation], backward: bool, by_name: bool
) -> None:
    called, rehearsed = lazy_model(), lazy_model()
    state = torch.get_rng_state()
    called(X)
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    call = (lambda x: rehearsed(x)) if by_name else rehearsed
    explanation = rehearse(call, X, backward=backward)
    assert len(explanation.notes) == 1
    assert torch.equal(torch.get_rng_state(), drawn)  # or the next model would get these values
    wanted = dict(called.up.named_parameters())
    assert wanted.keys() == dict(rehearsed.up.named_parameters()).keys()
    for name, value in rehearsed.up.named_parameters():
        assert torch.equal(value, wanted[name])
        assert value.grad is None
    called(X)
    rehearsed(X)
    rehearsed(X)  # which is its second call in training, and all that its statistics know of
    found = dict(rehearsed.up.named_buffers())
    assert int(found["1.num_batches_tracked"]) == 2
    for name, value in called.up.named_buffers():
        torch.testing.assert_close(found[name], value)


def test_a_lazy_model_that_is_initialized_stays_as_it_is() -> None:
    model = lazy_model().up
    model(X)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    dgrad.warm_up(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_lazy_model_whose_first_run_fails_stays_lazy() -> None:
    model = lazy_model()
    with pytest.raises(RuntimeError):
        dgrad.explain(model, torch.randn(2))
    assert isinstance(model.up[1], nn.LazyBatchNorm2d)


# --- what is left as it was ---------------------------------------------------------------------


class Buffered(nn.Module):
    """With buffers that torch.equal does not compare, before one that it does."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sparse", torch.eye(2).to_sparse())
        self.register_buffer("grown", torch.zeros(1))
        self.up = dgrad.ConvTranspose2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        self.grown.resize_(5).fill_(1)
        return self.norm(self.up(x))


def test_buffers_of_every_kind_are_put_back() -> None:
    model = Buffered()
    dgrad.warm_up(model, X)
    assert torch.equal(model.grown, torch.zeros(1))
    assert torch.equal(model.sparse.to_dense(), torch.eye(2))
    assert not model.norm.running_mean.any()
    assert int(model.norm.num_batches_tracked) == 0


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = dgrad.ConvTranspose2d(3, 4, 3)

    def forward(self, x: Any) -> Any:
        return checkpoint(self.up, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:.*autocast:FutureWarning")  # of checkpoint in PyTorch 2.4
def test_a_reentrant_checkpoint_is_a_warning_and_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(log, "_warned", {})
    model = Checkpointed()
    x = X.clone().requires_grad_()
    dgrad.warm_up(model, x)
    [message] = caplog.messages
    assert message.startswith("the gradients of Checkpointed are not selected: a reentrant")
    model(x).sum().backward()
    assert model.up.weight.grad is not None


def test_an_output_that_is_sparse_is_no_error() -> None:
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = dgrad.ConvTranspose2d(3, 4, 3)

        def forward(self, x: Any) -> Any:
            y = self.up(x)
            return y, y.to_sparse()

    dgrad.warm_up(Sparse(), X)


class Late(nn.Module):
    """With a buffer that only a first call fills, one that it registers, and an expanded one."""

    def __init__(self) -> None:
        super().__init__()
        self.base = torch.zeros(3)
        self.register_buffer("wide", self.base.expand(4, 3))
        self.register_buffer("mean", None)
        self.register_buffer("calls", torch.zeros(2))
        self.ready = False
        self.up = dgrad.ConvTranspose2d(3, 4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.base.add_(1)
        self.calls.add_(1)
        if not self.ready:
            self.mean = x.mean()
            self.register_buffer("late", x.mean())
            self.ready = True
        output: torch.Tensor = self.up(x) + self.mean + self.late
        return output


@pytest.mark.parametrize("rehearse", [dgrad.explain, dgrad.warm_up])
def test_buffers_that_come_with_the_call_stay_and_others_are_as_before(
    rehearse: Callable[..., dgrad.Explanation],
) -> None:
    model = Late()
    calls, wide = model.calls, model.wide
    rehearse(model, X, backward=False)
    assert list(model._buffers) == ["wide", "mean", "calls", "late"]
    assert model.calls is calls
    assert model.wide is wide
    assert not calls.any()
    assert not wide.any()
    assert not model.base.any()
    model(X)  # which takes it for ready
