"""What inductor compiles for a GPU: trained as PyTorch's, no slower than eager, autocast."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import dgrad
from operands import compiles

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]


def generator(device: str = "cuda") -> nn.Module:
    """Layers with kernels of the compiler between them."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(16, 32, 4, 2, 1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 8, (3, 5), padding=(1, 2)),
        nn.Tanh(),
    )
    return model.to(device)


def trained(model: nn.Module, compiled: Callable[[Tensor], Tensor], steps: int) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    torch.manual_seed(1)
    x = torch.randn(4, 16, 12, 9, device="cuda")
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = compiled(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().clone())
    return [*losses, *(p.detach().clone() for p in model.parameters())]


@compiles
@pytest.mark.gpu
@pytest.mark.seconds(8)
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # PyTorch's own first one
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_model_trains_as_pytorchs(mode: str, dynamic: bool) -> None:
    dgrad.plan_cache.clear()
    plain = generator()
    converted = copy.deepcopy(plain)
    dgrad.convert(converted)
    compiled = torch.compile(converted, fullgraph=True, dynamic=dynamic, mode=mode)
    with dgrad.flags(allow_tf32=False), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found, wanted = trained(converted, compiled, 6), trained(plain, plain, 6)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        plain.eval()
        converted.eval()
        for size in ((4, 16, 12, 9), (2, 16, 7, 11), (4, 16, 12, 9)):
            x = torch.randn(size, device="cuda")
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), plain(x), rtol=1e-3, atol=1e-4)
    ran = {s.problem.direction for s, _ in dgrad.selections()}
    assert ran == {"dgrad", "fprop", "wgrad"}


@compiles
@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.seconds(4)
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("called", ["module", "function"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_code_is_no_slower_than_eager(
    dynamic: bool, mode: str, called: str, training: bool
) -> None:
    layer = dgrad.ConvTranspose2d(256, 128, 4, 2, 1, device="cuda")
    # So large that the device limits: compiled code costs the host 0.1 ms more, as PyTorch's does.
    x = torch.randn(64, 256, 64, 64, device="cuda", requires_grad=training)
    torch._dynamo.mark_static_address(x)  # else CUDA graphs copy their inputs

    def eager() -> Tensor:
        if called == "module":
            output: Tensor = layer(x)
        else:
            output = dgrad.conv_transpose2d(x, layer.weight, layer.bias, 2, 1)
        return output.square().mean() if training else output

    compiled = torch.compile(eager, fullgraph=True, dynamic=dynamic, mode=mode)

    def milliseconds(call: Callable[[], Tensor]) -> float:
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(20):
            output = call()
            if training:
                torch.autograd.grad(output, (x, *layer.parameters()))
        torch.cuda.synchronize()
        return (time.perf_counter() - begin) / 20 * 1e3

    with torch.set_grad_enabled(training):
        for call in (eager, compiled):
            milliseconds(call)
        rounds = [(milliseconds(compiled), milliseconds(eager)) for _ in range(9)]
    fastest, fastest_eager = map(min, zip(*rounds, strict=True))  # others only slow down
    assert fastest < 1.05 * fastest_eager


@compiles
@pytest.mark.gpu
@pytest.mark.seconds(5)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_compiled_code_casts_under_autocast_as_pytorchs(
    half: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch 2.11 takes what it kept of the other half type, for operators of its own too.
    monkeypatch.setattr(torch._functorch.config, "enable_autograd_cache", False)
    plain = generator()
    converted = copy.deepcopy(plain)
    dgrad.convert(converted)
    compiled = torch.compile(converted, fullgraph=True)
    x = torch.randn(4, 16, 12, 9, device="cuda")

    def trained(call: Callable[[Tensor], Tensor], model: nn.Module) -> list[Tensor]:
        with torch.autocast("cuda", dtype=half):
            output = call(x)
        output.float().square().mean().backward()
        assert output.dtype is half
        return [output, *(p.grad for p in model.parameters())]  # type: ignore[list-item]

    for one, other in zip(trained(compiled, converted), trained(plain, plain), strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=5e-2, atol=5e-3)
