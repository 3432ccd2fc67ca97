"""Where torch.nn.ConvTranspose2d works, dgrad's does: export, tracing, compiling, checkpoints."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dgrad
from dgrad import log
from operands import on_each_device


def models(device: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model, the same with dgrad's layers, and an input; float64, so that results agree."""
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.ConvTranspose2d(3, 8, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, (3, 5), padding=(1, 2), groups=2, bias=False),
    ).to(device, torch.float64)
    converted = copy.deepcopy(plain)
    assert dgrad.convert(converted) == ["0", "2"]
    return plain, converted, torch.randn(2, 3, 6, 7, device=device, dtype=torch.float64)


def step(model: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """The output and all gradients."""
    leaf = x.clone().requires_grad_()
    output = model(leaf)
    gradients = torch.autograd.grad(output.square().sum(), [leaf, *module.parameters()])
    return [output.detach(), *gradients]


def assert_alike(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@on_each_device
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiling_breaks_no_graph_and_trains(device: str, dynamic: bool) -> None:
    plain, converted, x = models(device)
    torch._dynamo.reset()
    compiled = torch.compile(converted, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in ((2, 3, 6, 7), (2, 3, 8, 5)):
        x = torch.randn(size, device=device, dtype=torch.float64)
        assert_alike(step(compiled, converted, x), step(plain, plain, x))
    torch._dynamo.reset()


@on_each_device
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_of_pytorchs_operators(device: str, strict: bool) -> None:
    plain, converted, x = models(device)
    program = torch.export.export(converted.eval(), (x,), strict=strict)
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("conv_transpose2d" in name or "convolution" in name for name in called)
    assert not [name for name in called if not name.startswith("aten.")]
    torch.testing.assert_close(program.module()(x), plain(x))


@on_each_device
def test_a_traced_model_is_of_pytorchs_operators(device: str) -> None:
    plain, converted, x = models(device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer PyTorch calls tracing deprecated
        traced = torch.jit.trace(converted, x)
    assert "conv" in str(traced.inlined_graph)
    assert "PythonOp" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), plain(x))


@on_each_device
@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_a_scripted_model_is_of_pytorchs_operators(device: str, tmp_path: Path) -> None:
    plain, converted, x = models(device)
    converted[0].flags = dgrad.Flags(selection="heuristic")  # type: ignore[index]
    scripted = torch.jit.script(converted)
    assert str(scripted.inlined_graph).count("aten::conv_transpose2d(") == 2
    scripted.save(tmp_path / "model.pt")
    for model in (scripted, torch.jit.load(tmp_path / "model.pt")):
        assert_alike(step(model, model, x), step(plain, plain, x))
    assert isinstance(converted[0], dgrad.ConvTranspose2d), "the model itself stays as it is"  # type: ignore[index]
    layer = dgrad.ConvTranspose2d(3, 2, 3, stride=2, device=device, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(layer)(x, [14, 15]), layer(x, [14, 15]))


@on_each_device
@pytest.mark.parametrize("called_before", [False, True])
def test_a_symbolic_trace_is_of_pytorchs_operators_alone(
    device: str,
    called_before: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain, converted, x = models(device)
    if called_before:  # where calls are known to native code, which knows none of this one
        nothing = SimpleNamespace(call=lambda *_: None)
        monkeypatch.setattr(dgrad.plan_cache, "ready", nothing)
        monkeypatch.setattr(dgrad.plan_cache, "exchange", object())
    log._told.clear()
    with caplog.at_level(logging.INFO, logger="dgrad"):
        traced = torch.fx.symbolic_trace(converted)
    monkeypatch.undo()
    assert caplog.messages == ["PyTorch's own conv_transpose2d runs: torch.fx is at work"]
    called = [node.target for node in traced.graph.nodes if node.op.startswith("call")]
    assert called == [torch.conv_transpose2d, "1", torch.conv_transpose2d]
    assert_alike(step(traced, converted, x), step(plain, plain, x))


def test_a_symbolic_trace_keeps_a_layer_that_is_asked_for_a_size() -> None:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ModuleList([nn.ConvTranspose2d(3, 3, 3, 2, 1) for _ in range(2)])

        def forward(self, x: Tensor, skip: Tensor) -> Tensor:
            for up, size in zip(self.up, ((8, 7), skip.shape[-2:]), strict=True):
                x = up(x, output_size=size)
            return x

    model = Decoder()
    given = torch.randn(2, 3, 4, 4), torch.randn(1, 1, 16, 13)
    wanted = model(*given)
    dgrad.convert(model)
    traced = torch.fx.symbolic_trace(model)
    kept = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert kept == ["up.0", "up.1"]
    assert type(traced.get_submodule("up.0")) is dgrad.ConvTranspose2d
    torch.testing.assert_close(traced(*given), wanted)


class Shifted(dgrad.ConvTranspose2d):
    def forward(self, input: Tensor, output_size: Any = None) -> Tensor:
        return super().forward(input * 2, output_size) + 1


def hooked(layer: dgrad.ConvTranspose2d) -> dgrad.ConvTranspose2d:
    layer.register_forward_hook(lambda module, given, output: output * 2)
    return layer


@pytest.mark.parametrize("make", [lambda *a: hooked(dgrad.ConvTranspose2d(*a)), Shifted])
def test_a_symbolic_trace_runs_no_hook_and_no_subclass_twice(
    make: Callable[..., nn.Module],
) -> None:
    class Net(nn.Module):
        def __init__(self, size: tuple[int, int] | None) -> None:
            super().__init__()
            self.up, self.size = make(3, 2, 3, 2), size

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=self.size)  # type: ignore[no-any-return]

    x = torch.randn(1, 3, 4, 5)
    model = Net(None)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    with pytest.raises((torch.fx.proxy.TraceError, TypeError)):  # as of PyTorch's own subclass
        torch.fx.symbolic_trace(Net((9, 11)))


def test_a_bias_alone_that_torch_fx_traces_gives_one_call() -> None:
    x, w = torch.randn(1, 3, 4, 5), torch.randn(3, 2, 3, 3)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.x, self.w = x, w

        def forward(self, bias: Tensor) -> Tensor:
            return dgrad.conv_transpose2d(self.x, self.w, bias)

    traced = torch.fx.symbolic_trace(Net())
    assert len([node for node in traced.graph.nodes if node.op.startswith("call")]) == 1
    bias = torch.randn(2)
    torch.testing.assert_close(traced(bias), nn.functional.conv_transpose2d(x, w, bias))


@on_each_device
def test_a_graph_of_proxy_tensors_is_of_pytorchs_operators(
    device: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, converted, x = models(device)
    log._told.clear()
    with caplog.at_level(logging.INFO, logger="dgrad"):
        made = make_fx(converted)(x)
    assert caplog.messages == [
        "PyTorch's own conv_transpose2d runs: the dispatch mode ProxyTorchDispatchMode is at work"
    ]
    assert [str(node.target) for node in made.graph.nodes].count("aten.convolution.default") == 2
    assert "dgrad" not in made.code
    torch.testing.assert_close(made(x), plain(x))


@on_each_device
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.torch.cpu.amp.autocast:FutureWarning")  # PyTorch 2.4's own
def test_checkpoints_give_the_same_gradients(device: str, reentrant: bool) -> None:
    plain, converted, x = models(device)

    def through(leaf: Tensor) -> Tensor:
        output: Tensor = checkpoint(converted, leaf, use_reentrant=reentrant)
        return output

    leaf = x.clone().requires_grad_()
    through(leaf).square().sum().backward()
    wanted = step(plain, plain, x)
    found = [leaf.grad, *(p.grad for p in converted.parameters())]
    assert_alike(found, wanted[1:])  # type: ignore[arg-type]


@on_each_device
def test_operations_are_counted_as_for_pytorch(device: str) -> None:
    plain, converted, x = models(device)
    counts = []
    for model in (plain, converted):
        with FlopCounterMode(display=False) as counter:
            model(x.clone().requires_grad_()).square().sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@on_each_device
def test_saved_tensors_may_be_kept_elsewhere(device: str) -> None:
    plain, converted, x = models(device)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=layout)
        with torch.autograd.graph.save_on_cpu():
            found = step(converted, converted, given)
        assert_alike(found, step(plain, plain, given))


@on_each_device
def test_backward_hooks_see_pytorchs_gradients(device: str) -> None:
    seen: dict[str, list[Any]] = {}
    for name, model in zip(("plain", "dgrad"), models(device), strict=False):
        seen[name] = []
        for module in model.children():
            module.register_full_backward_hook(
                lambda _, grad_in, grad_out, to=seen[name]: to.extend((*grad_in, *grad_out))
            )
        step(model, model, models(device)[2])
    assert len(seen["plain"]) == 6
    assert_alike(seen["dgrad"], seen["plain"])


@on_each_device
def test_a_frozen_weight_gets_no_gradient(device: str) -> None:
    plain, converted, x = models(device)
    for model in (plain, converted):
        model[0].weight.requires_grad_(False)  # type: ignore[index]
    found, wanted = (
        torch.autograd.grad(
            model(x).square().sum(), [p for p in model.parameters() if p.requires_grad]
        )
        for model in (converted, plain)
    )
    assert_alike([*found], [*wanted])


def test_the_function_is_traced_with_sizes_that_are_not_known() -> None:
    def decoder(function: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, w: function(x, w, None, w.shape[2] // 2, (w.shape[2] // 2, 0))

    try:
        torch.fx.symbolic_trace(decoder(nn.functional.conv_transpose2d))
    except TypeError:
        pytest.skip("this PyTorch does not trace its own function either")
    decode = decoder(dgrad.conv_transpose2d)
    x, w = torch.randn(2, 3, 5, 5), torch.randn(3, 2, 4, 4)
    traced = torch.fx.symbolic_trace(decode)
    torch.testing.assert_close(traced(x, w), decode(x, w))


def test_a_layer_itself_is_not_traced_with_a_size_as_with_pytorchs() -> None:
    for layer in (nn.ConvTranspose2d(3, 2, 3), dgrad.ConvTranspose2d(3, 2, 3)):
        with pytest.raises(torch.fx.proxy.TraceError):
            torch.fx.symbolic_trace(layer, concrete_args={"output_size": (7, 7)})


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_tools_that_know_exact_classes_know_a_restored_model() -> None:
    fuse = torch.ao.quantization.fuse_modules
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    wanted = model(x)
    dgrad.convert(model)
    with pytest.raises(AssertionError, match="fuser method"):
        fuse(model, [["0", "1"]])
    dgrad.restore(model)
    fused = fuse(model, [["0", "1"]])
    assert type(fused[1]) is nn.Identity
    torch.testing.assert_close(fused(x), wanted)
