"""On each device: torch.func's transforms, forward-mode AD and parametrizations, as PyTorch's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import dgrad
from operands import on_each_device

# PyTorch's own rules for forward mode are compiled at their first use.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

# of an input, a weight and a bias to a number, made of either conv_transpose2d
Loss = Callable[..., Tensor]
TRANSFORMS: dict[str, Callable[[Loss, tuple[Tensor, ...]], Any]] = {
    "grad": lambda loss, t: grad(loss, argnums=(0, 1, 2))(*t),
    "grad of grad": lambda loss, t: grad(lambda x: grad(loss)(x, *t[1:]).square().sum())(t[0]),
    "vjp": lambda loss, t: vjp(loss, *t)[1](torch.tensor(2.0).to(t[0])),
    "jvp": lambda loss, t: jvp(loss, t, tuple(v.flip(0) for v in t)),
    "jvp of grad": lambda loss, t: jvp(grad(loss, argnums=1), t, t),
    "jacrev": lambda loss, t: jacrev(loss, argnums=(0, 2))(*t),
    "hessian": lambda loss, t: hessian(loss, argnums=2)(*t),
    "vmap": lambda loss, t: vmap(loss, (0, None, None))(t[0].expand(3, *t[0].shape), *t[1:]),
    "vmap of grad": lambda loss, t: vmap(grad(loss, argnums=(0, 1, 2)), (0, None, None))(
        torch.stack([t[0], -t[0]]), *t[1:]
    ),
    "vmap of jvp": lambda loss, t: vmap(
        lambda tangent: jvp(lambda w: loss(t[0], w), t[1:2], tangent)
    )((torch.stack([t[1], -t[1]]),)),
    "grad of vmap": lambda loss, t: grad(
        lambda w: vmap(lambda scale: loss(scale * t[0], w))(t[2]).square().sum()
    )(t[1]),
}


def tensors(device: str) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    sizes = ((2, 4, 3, 5), (4, 3, 3, 2), (6,))
    return tuple(
        torch.randn(size, generator=draw, dtype=torch.float64).to(device) for size in sizes
    )


@on_each_device
@forward_mode
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_pytorchs_values(name: str, device: str) -> None:
    results = []
    for function in (dgrad.conv_transpose2d, F.conv_transpose2d):

        def loss(x: Tensor, w: Tensor, b: Any = None, run: Any = function) -> Tensor:
            y: Tensor = run(x, w, b, (2, 1), 1, (1, 0), 2)
            return y.pow(3).sum()

        results.append(TRANSFORMS[name](loss, tensors(device)))
    torch.testing.assert_close(*results)


@on_each_device
@forward_mode
def test_forward_mode_gives_pytorchs_tangents(device: str) -> None:
    x, w, b = tensors(device)
    with torch.autograd.forward_ad.dual_level():
        x, w, b = (torch.autograd.forward_ad.make_dual(t, t.flip(0)) for t in (x, w, b))
        found, expected = (
            torch.autograd.forward_ad.unpack_dual(run(x, w, b, groups=2))
            for run in (dgrad.conv_transpose2d, F.conv_transpose2d)
        )
        torch.testing.assert_close(found, expected)


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(4, 6, 4, 2, 1), nn.Tanh(), nn.ConvTranspose2d(6, 2, 3, groups=2)
    ).double()


@on_each_device
def test_gradients_of_each_sample_are_pytorchs(device: str) -> None:
    """As for differential privacy."""
    plain = model().to(device)
    converted = copy.deepcopy(plain)
    assert len(dgrad.convert(converted)) == 2
    x = tensors(device)[0]

    def each(module: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
            output: Tensor = functional_call(module, parameters, (sample.unsqueeze(0),))
            return output.square().sum()

        parameters = {name: p.detach() for name, p in module.named_parameters()}
        found: dict[str, Tensor] = vmap(grad(loss), (None, 0))(parameters, x)
        return found

    found = each(converted)
    torch.testing.assert_close(found, each(plain))
    alone = torch.autograd.grad(converted(x[:1]).square().sum(), [*converted.parameters()])
    torch.testing.assert_close([gradients[0] for gradients in found.values()], [*alone])


@on_each_device
def test_an_ensemble_runs_in_one_call(device: str) -> None:
    members = [model().to(device) for _ in range(3)]
    for member in members:
        dgrad.convert(member)
    parameters, buffers = stack_module_state(members)
    x = tensors(device)[0]
    found = vmap(lambda p, b: functional_call(members[0], (p, b), (x,)))(parameters, buffers)
    torch.testing.assert_close(found, torch.stack([member(x) for member in members]))


@pytest.mark.gpu
@forward_mode
@pytest.mark.parametrize("name", TRANSFORMS)
def test_after_a_transform_cudnn_runs_again(name: str) -> None:
    def loss(x: Tensor, w: Tensor, b: Any = None) -> Tensor:
        return dgrad.conv_transpose2d(x, w, b, groups=2).pow(3).sum()

    given = tensors("cuda")
    TRANSFORMS[name](loss, given)
    leaves = [t.requires_grad_() for t in given]
    with dgrad.flags(fallback="error"):
        found = torch.autograd.grad(loss(*leaves), leaves)
    expected = torch.autograd.grad(
        F.conv_transpose2d(*leaves, groups=2).pow(3).sum(),
        leaves,  # type: ignore[misc]
    )
    torch.testing.assert_close(found, expected)


# --- parametrizations ---------------------------------------------------------------------------


class Halved(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2


def halved(layer: nn.Module) -> nn.Module:
    """A parametrization of both parameters."""
    for name in ("weight", "bias"):
        nn.utils.parametrize.register_parametrization(layer, name, Halved())
    return layer


NORMS: dict[str, Callable[[Any], nn.Module]] = {
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "older weight_norm": nn.utils.weight_norm,
    "older spectral_norm": nn.utils.spectral_norm,
    "weight and bias": halved,
}


@on_each_device
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_parametrized_layer_trains_as_pytorchs(name: str, cached: bool, device: str) -> None:
    states = []
    for convert in (False, True):
        torch.manual_seed(0)
        trained = model().to(device)
        for layer in (trained[0], trained[2]):
            NORMS[name](layer)
        if convert:
            assert dgrad.convert(trained) == ["0", "2"]
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
        x = tensors(device)[0]
        for _ in range(3):
            optimizer.zero_grad()
            if cached:
                with nn.utils.parametrize.cached():
                    loss = trained(x).square().mean() + trained(-x).square().mean()
            else:
                loss = trained(x).square().mean()
            loss.backward()
            optimizer.step()
        states.append({**trained.state_dict(), "loss": loss.detach()})
    plain, converted = states
    assert plain.keys() == converted.keys()
    torch.testing.assert_close(converted, plain)


@on_each_device
def test_a_trace_that_begins_before_autograd_sees_pytorchs_operator(device: str) -> None:
    x = torch.randn(2, 4, 5, 5, device=device, dtype=torch.float64)
    w = torch.randn(4, 3, 3, 3, device=device, dtype=torch.float64)

    def call(x: Tensor) -> Tensor:
        return dgrad.conv_transpose2d(x, w) * 2

    wanted = call(x)
    call(x)  # known by now
    traced = make_fx(call, pre_dispatch=True)(x)
    assert torch.ops.aten.conv_transpose2d.input in [node.target for node in traced.graph.nodes]
    for given in (x, -x):
        torch.testing.assert_close(traced(given), call(given))
    torch.testing.assert_close(call(x), wanted)
    with dgrad.flags(fallback="error"), pytest.raises(dgrad.NotSupportedError, match="at work"):
        make_fx(call, pre_dispatch=True)(x)
