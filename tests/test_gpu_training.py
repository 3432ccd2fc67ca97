"""Training, autocast and gradient scaling on the GPU."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

import dgrad
from reference import Case, arguments, assert_close, expected, pytorch, pytorch_results, results

pytestmark = pytest.mark.gpu


# --- training -----------------------------------------------------------------------------------


def generator() -> nn.Module:
    """DCGAN's, small: the transposed convolutions before a norm have no bias."""
    return nn.Sequential(
        nn.ConvTranspose2d(16, 16, 4, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, (3, 5), stride=(2, 3), padding=(1, 2), groups=4, dilation=(2, 1)),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 3, 2, stride=2, output_padding=1),
        nn.Tanh(),
    )


def train(model: nn.Module, steps: int) -> list[float]:
    draw = torch.Generator("cuda").manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        noise = torch.randn(4, 16, 1, 1, device="cuda", dtype=torch.float64, generator=draw)
        image = model(noise)
        loss = (image - 0.3).square().mean()
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [float(loss) for loss in losses]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_generator_trains_as_with_pytorch(memory_format: torch.memory_format) -> None:
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(3)
    theirs = generator().to("cuda", torch.float64).to(memory_format=memory_format)
    ours = copy.deepcopy(theirs)
    assert len(dgrad.convert(ours)) == 4
    wanted = train(theirs, 20)
    with dgrad.flags(fallback="error"):
        actual = train(ours, 20)
    assert wanted[-1] < 0.7 * wanted[0], "the training teaches nothing"
    assert actual == pytest.approx(wanted, rel=1e-9)
    for name, parameter in theirs.named_parameters():
        difference = (ours.get_parameter(name) - parameter).abs().max()
        assert difference <= 1e-9, name


# --- autocast and gradient scaling --------------------------------------------------------------


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16", "float64"])
def test_autocast_gives_pytorchs_dtypes_and_values(precision: str, half: torch.dtype) -> None:
    case = Case(n=2, c_in=16, c_out=16, stride=(2, 2), precision=precision)
    given = arguments(case)
    if precision != "float64":  # autocast leaves float64 alone
        given = replace(given, grad_output=given.grad_output.to(half))
    with torch.autocast("cuda", dtype=half):
        theirs = pytorch_results(case, given)
        with dgrad.flags(fallback="error"):
            ours = results(dgrad.conv_transpose2d, case, given)
    rounding = max(2 * torch.finfo(theirs["output"].dtype).eps, 1e-12)
    for name, actual in ours.items():
        assert actual.dtype == theirs[name].dtype, name
        assert actual.stride() == theirs[name].stride(), name
        wanted = theirs[name].double()
        assert (actual.double() - wanted).norm() <= rounding * wanted.norm(), name


def test_autocast_lets_mixed_dtypes_in_as_pytorch_does() -> None:
    x = torch.randn(2, 8, 5, 5, device="cuda", dtype=torch.float16)
    w = torch.randn(8, 4, 3, 3, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual, wanted = dgrad.conv_transpose2d(x, w), pytorch(x, w)
    assert actual.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(actual, wanted, rtol=2e-2, atol=1e-3)


def test_autocast_that_is_off_again_changes_nothing() -> None:
    case = Case(c_in=8, c_out=8)
    given = arguments(case)
    wanted = expected(case, given)
    with torch.autocast("cuda", dtype=torch.float16):
        dgrad.conv_transpose2d(given.input, given.weight)
        with torch.autocast("cuda", enabled=False), dgrad.flags(allow_tf32=False):
            inner = results(dgrad.conv_transpose2d, case, given)
    for name, actual in inner.items():
        assert_close(actual, wanted[name], case.tolerance, name)


def scaled_step(model: nn.Module) -> tuple[float, float]:
    """One step with a GradScaler under autocast; the loss and the scale after it."""
    draw = torch.Generator("cuda").manual_seed(7)
    noise = torch.randn(8, 16, 1, 1, device="cuda", generator=draw)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    with torch.autocast("cuda", dtype=torch.float16):
        image = model(noise)
        loss = (image.float() - 0.3).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return float(loss.detach()), scaler.get_scale()


def test_a_step_with_a_gradient_scaler_is_pytorchs_step() -> None:
    torch.manual_seed(3)
    theirs = generator().to("cuda")
    ours = copy.deepcopy(theirs)
    start = copy.deepcopy(theirs)
    dgrad.convert(ours)
    wanted_loss, wanted_scale = scaled_step(theirs)
    with dgrad.flags(fallback="error"):
        loss, scale = scaled_step(ours)
    assert loss == pytest.approx(wanted_loss, rel=1e-2)
    assert scale == wanted_scale == 1024.0, "a gradient was not finite"
    for name, parameter in theirs.named_parameters():
        before = start.get_parameter(name)
        step, wanted = ours.get_parameter(name) - before, parameter - before
        assert wanted.norm() > 0, name
        assert (step - wanted).norm() <= 0.1 * wanted.norm(), name


def test_a_gradient_that_overflows_skips_the_step() -> None:
    layer = dgrad.ConvTranspose2d(4, 4, 3, device="cuda")
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    with torch.autocast("cuda", dtype=torch.float16):
        loss = layer(torch.ones(1, 4, 8, 8, device="cuda")).float().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(layer.weight, before)
    assert scaler.get_scale() < 2.0**40
