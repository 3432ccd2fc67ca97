"""torch.compile keeps the operators whole, and decides and tells what eager calls do."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dgrad
from dgrad import config
from operands import compiles, on_each_device, tensors

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


def graphs_of(
    function: Callable[..., Any], *arguments: Any, **options: Any
) -> tuple[Any, list[str]]:
    """What a compiled function returns, and the names of all that its graphs call, of the
    backward pass once that has run."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    called: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        called.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    result = torch.compile(function, fullgraph=True, backend=backend, **options)(*arguments)
    return result, called


@compiles
@on_each_device
@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_training_step_is_of_the_three_directions(device: str, dynamic: bool) -> None:
    _, w, y = (t.requires_grad_() for t in tensors(device))

    def step(y: Tensor, w: Tensor) -> Tensor:
        return dgrad.conv_transpose2d(y, w, None, (2, 1), 1, groups=2).square().sum()

    def gradients(y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        loss, called = graphs_of(step, y, w, dynamic=dynamic)
        found = torch.autograd.grad(loss, (y, w))
        ran = sorted(name for name in called if "dgrad." in name or "conv" in name)
        assert ran == ["dgrad.dgrad.default", "dgrad.fprop.default", "dgrad.wgrad.default"]
        return found

    wanted = torch.autograd.grad(step(y, w), (y, w))
    for one, other in zip(gradients(y, w), wanted, strict=True):
        torch.testing.assert_close(one, other)
        assert one.stride() == other.stride()


@compiles
@on_each_device
@pytest.mark.usefixtures("taken")
@pytest.mark.parametrize(
    "arguments",
    [{}, {"dilation": 3, "output_padding": 2}, {"stride": [2], "padding": 1, "output_padding": 1}],
)
def test_compiled_results_are_those_of_the_function(device: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    w = torch.randn(6, 4, 3, 3, device=device, dtype=torch.float64)
    full = torch.randn(2, 6, 5, 7, device=device, dtype=torch.float64)
    for x in (full, full[0], full[:0]):
        wanted = F.conv_transpose2d(x, w, **arguments)
        found = torch.compile(dgrad.conv_transpose2d, fullgraph=True, backend="aot_eager")(
            x, w, **arguments
        )
        torch.testing.assert_close(found, wanted)
        torch._dynamo.reset()


@compiles
@pytest.mark.usefixtures("taken")
def test_the_flags_of_a_layer_reach_its_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = dgrad.ConvTranspose2d(3, 4, 3)
    layer.flags = dgrad.Flags(algorithm=["legacy:ALGO_1", "graph"], workspace_limit="1MiB")
    seen = []
    real = config.from_text

    def from_text(text: str) -> dgrad.Flags | None:
        seen.append(real(text))
        return seen[-1]

    monkeypatch.setattr(config, "from_text", from_text)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(torch.randn(1, 3, 4, 4))
    assert set(seen) == {layer.flags}


@pytest.mark.parametrize(
    "flags",
    [
        dgrad.Flags(),
        dgrad.Flags(selection="exhaustive", measure_budget=1, deterministic=True),
        dgrad.Flags(algorithm={"wgrad": ("graph", "legacy:ALGO_0"), "dgrad": "legacy"}),
        dgrad.Flags(workspace_limit="1.5GB", allow_tf32=False, fallback="error"),
    ],
)
def test_flags_come_back_from_their_text(flags: dgrad.Flags) -> None:
    text = flags.as_text()
    assert config.from_text(text) == flags
    assert config.from_text("") is None
    assert not {'"', "'", "\\"} & set(text)  # it may stand in code that the compiler writes
    assert pickle.loads(pickle.dumps(flags)).as_text() == copy.deepcopy(flags).as_text() == text


@compiles
def test_why_pytorch_runs_is_logged_once_while_compiling(caplog: pytest.LogCaptureFixture) -> None:
    from dgrad import log

    log._told.clear()
    layer = dgrad.ConvTranspose2d(3, 4, 3)
    with caplog.at_level(logging.INFO, logger="dgrad"):
        _, called = graphs_of(layer, torch.randn(1, 3, 4, 4))
    assert len([line for line in caplog.messages if "input is on cpu" in line]) == 1
    assert "aten.convolution.default" in called
    assert not [name for name in called if "dgrad" in name]


@compiles
def test_a_fallback_that_is_forbidden_is_an_error_while_compiling() -> None:
    layer = dgrad.ConvTranspose2d(3, 4, 3)
    layer.flags = dgrad.Flags(fallback="error")
    with pytest.raises(Exception, match="fallback='error' forbids"):
        torch.compile(layer, backend="aot_eager")(torch.randn(1, 3, 4, 4))


@compiles
@on_each_device
@pytest.mark.usefixtures("taken")
def test_bad_arguments_are_told_while_compiling(device: str) -> None:
    _, w, y = tensors(device)
    compiled = torch.compile(dgrad.conv_transpose2d, backend="aot_eager")
    with pytest.raises(Exception, match="groups is 4, expected a divisor"):
        compiled(y, w, groups=4)
    with pytest.raises(TypeError, match=r"stride is 1\.5, expected an integer"):
        compiled(y, w, stride=1.5)
    with pytest.raises(TypeError, match=r"groups is True, expected an integer"):
        compiled(y, w, groups=True)


@on_each_device
@compiles
@pytest.mark.usefixtures("taken")
def test_what_may_change_is_not_decided_while_compiling(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    from dgrad import log

    _, w, y = tensors(device)
    compiled = torch.compile(dgrad.conv_transpose2d, fullgraph=True, backend="aot_eager")
    with torch.backends.cudnn.flags(enabled=False):
        _, called = graphs_of(dgrad.conv_transpose2d, y, w)
        assert "dgrad.dgrad.default" in called
        log._told.clear()
        with caplog.at_level(logging.INFO, logger="dgrad"):
            torch.testing.assert_close(compiled(y, w), F.conv_transpose2d(y, w))
    wanted = "input is on cpu" if device == "cpu" else "torch.backends.cudnn.enabled is False"
    assert wanted in caplog.text


@on_each_device
@pytest.mark.usefixtures("taken")
def test_transforms_inside_compiled_code_give_pytorchs_results(device: str) -> None:
    _, w, y = tensors(device)

    def through(convolve: Callable[..., Tensor]) -> Callable[[Tensor], Any]:
        def call(y: Tensor) -> Any:
            each = torch.func.vmap(lambda t: convolve(t, w, groups=2))(y)
            return each, torch.func.grad(lambda t: convolve(t, w, groups=2).square().sum())(y)

        return call

    found = torch.compile(through(dgrad.conv_transpose2d), fullgraph=True, backend="aot_eager")(y)
    torch.testing.assert_close(found, through(F.conv_transpose2d)(y))
