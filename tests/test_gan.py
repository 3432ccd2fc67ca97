"""A small GAN in mixed precision, with gradient scaling, comes to where it comes with PyTorch's.

A GAN multiplies differences, also those of rounding: over these few steps by little. Noise of
bfloat16's rounding on the layers' inputs, outputs and gradients moved no compared number by half of
its limit; one layer's gradient upside down, negated or lost moved the losses far beyond it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dgrad

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, LATE, BATCH, NOISE, SIZE = 60, 20, 8, 8, 16
FIRST_SCALE = 1024.0
_on_gpu = (pytest.mark.gpu, pytest.mark.seconds(3))
SETTINGS = [
    ("cpu", torch.bfloat16),
    ("cpu", torch.float16),
    pytest.param("cuda", torch.bfloat16, marks=_on_gpu),
    pytest.param("cuda", torch.float16, marks=_on_gpu),
]
in_each_setting = pytest.mark.parametrize(
    ("device", "dtype"), SETTINGS, ids=lambda value: str(value).removeprefix("torch.")
)


@functools.cache
def blobs() -> Tensor:
    """The data: 256 images of one bright spot, near the middle, on a dark ground."""
    draw = torch.Generator().manual_seed(3)
    place = torch.arange(SIZE) + 0.5
    middle = SIZE / 2 + 1.5 * torch.randn(256, 2, 1, generator=draw)
    width = 2 + torch.rand(256, 1, 1, generator=draw)
    across, down = ((place - m).square() for m in middle.unbind(1))
    distance = down[:, :, None] + across[:, None, :]
    return (2 * torch.exp(-distance / (2 * width.square())) - 1).unsqueeze(1)


def generator() -> nn.Sequential:
    """DCGAN's, small."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.ConvTranspose2d(NOISE, 16, 4, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 8, 4, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 1, 4, stride=2, padding=1),
        nn.Tanh(),
    )


def discriminator() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(256, 1),
    )


@dataclass(frozen=True)
class Run:
    """What came of a training."""

    losses: Tensor  # (step, discriminator's and generator's)
    first: dict[str, Tensor]  # the generator's gradients in the first step
    distances: tuple[float, float]  # of the images from the data, before and after
    scale: float  # of the losses, at the end
    parameters: list[Tensor]


@torch.no_grad()
def distance(model: nn.Module, device: str) -> float:
    """Between images and data: of the mean image and of the deviation in each pixel."""
    draw = torch.Generator().manual_seed(9)
    images = copy.deepcopy(model)(torch.randn(512, NOISE, 1, 1, generator=draw).to(device)).cpu()
    differences = [images.mean(0) - blobs().mean(0), images.std(0) - blobs().std(0)]
    return float(torch.cat(differences).square().mean().sqrt())


def train(model: nn.Module, device: str, dtype: torch.dtype) -> Run:
    judge = discriminator().to(device)
    draw = torch.Generator().manual_seed(5)
    optimizers = [
        torch.optim.Adam(m.parameters(), lr=2e-3, betas=(0.5, 0.999)) for m in (judge, model)
    ]
    scaler = torch.amp.GradScaler(
        device, init_scale=FIRST_SCALE, growth_interval=20, enabled=dtype is torch.float16
    )
    before = distance(model, device)
    losses, first = [], {}
    for _ in range(STEPS):
        real = blobs()[torch.randint(len(blobs()), (BATCH,), generator=draw)].to(device)
        noise = torch.randn(BATCH, NOISE, 1, 1, generator=draw).to(device)
        with torch.autocast(device, dtype=dtype):
            images = model(noise)
            scores = judge(torch.cat([real, images.detach()])).float().chunk(2)
            losses.append(F.softplus(torch.cat([-scores[0], scores[1]])).mean())
        optimizers[0].zero_grad()
        scaler.scale(losses[-1]).backward()
        scaler.step(optimizers[0])
        with torch.autocast(device, dtype=dtype):
            losses.append(F.softplus(-judge(images).float()).mean())
        optimizers[1].zero_grad()
        scaler.scale(losses[-1]).backward()
        scaler.unscale_(optimizers[1])
        if not first:
            first = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        scaler.step(optimizers[1])
        scaler.update()
    return Run(
        torch.stack(losses).detach().cpu().reshape(STEPS, 2),
        first,
        (before, distance(model, device)),
        scaler.get_scale(),
        [*model.parameters(), *judge.parameters()],
    )


@functools.cache
def pytorchs(device: str, dtype: torch.dtype) -> Run:
    return train(generator().to(device), device, dtype)


def assert_alike_at_first(found: Run, wanted: Run) -> None:
    for name, gradient in wanted.first.items():
        assert (found.first[name] - gradient).norm() <= 0.5 * gradient.norm(), name
    torch.testing.assert_close(found.losses[:5], wanted.losses[:5], rtol=5e-3, atol=0)


def assert_alike_at_last(found: Run, wanted: Run) -> None:
    means = (run.losses[-LATE:].mean(0) for run in (found, wanted))
    torch.testing.assert_close(*means, rtol=0.1, atol=0)
    assert found.distances[1] == pytest.approx(wanted.distances[1], abs=0.05)


@in_each_setting
def test_a_gan_trains_in_mixed_precision_as_with_pytorch(device: str, dtype: torch.dtype) -> None:
    model = generator().to(device)
    assert len(dgrad.convert(model)) == 3
    with dgrad.flags(fallback="error" if device == "cuda" else "pytorch"):
        found = train(model, device, dtype)
    wanted = pytorchs(device, dtype)
    assert_alike_at_first(found, wanted)
    assert_alike_at_last(found, wanted)
    for run in (found, wanted):
        assert run.distances[1] < 0.5 * run.distances[0], "the training teaches nothing"
        assert all(p.isfinite().all() for p in run.parameters)
        if dtype is torch.float16:
            assert run.scale >= FIRST_SCALE, "the scale collapses"


@pytest.mark.parametrize(
    "damage",
    [lambda g: g.flip(2), torch.neg, torch.zeros_like],
    ids=["upside down", "negated", "lost"],
)
def test_a_damaged_gradient_of_one_layer_would_be_noticed(
    damage: Callable[[Tensor], Tensor],
) -> None:
    setting = ("cpu", torch.bfloat16)
    model = generator()
    dgrad.convert(model)
    model[3].weight.register_hook(damage)  # type: ignore[operator]
    found, wanted = train(model, *setting), pytorchs(*setting)
    for assert_alike in (assert_alike_at_first, assert_alike_at_last):
        with pytest.raises(AssertionError):
            assert_alike(found, wanted)
