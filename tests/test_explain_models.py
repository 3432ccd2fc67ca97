"""explain and warm_up of models that are compiled, and of ones whose layers are lazy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dgrad
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
