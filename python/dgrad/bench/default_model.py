"""What `compare` runs without a FILE: one layer, problem 65 of KernelBench level 1."""

import torch
from torch import nn

_IN_CHANNELS, _OUT_CHANNELS, _KERNEL_SIZE = 64, 64, (3, 7)
FULL_SIZE = (8, _IN_CHANNELS, 512, 512)
SMALL_SIZE = (1, _IN_CHANNELS, 128, 128)


class Model(nn.Module):
    """One transposed convolution without bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int]) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.up(x)
        return y


def get_inputs() -> list[torch.Tensor]:
    """The input at full size, 512 MiB of float32."""
    return [torch.rand(FULL_SIZE)]


def get_small_inputs() -> list[torch.Tensor]:
    """What takes milliseconds instead of seconds on a CPU."""
    return [torch.rand(SMALL_SIZE)]


def get_init_inputs() -> list[object]:
    return [_IN_CHANNELS, _OUT_CHANNELS, _KERNEL_SIZE]
