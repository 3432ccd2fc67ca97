"""A kernel and an input, both wider than tall.

The sizes of problem 69 of KernelBench level 1.
"""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int]) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.up(x)
        return y


def get_inputs() -> list[torch.Tensor]:
    return [torch.rand(64, 64, 128, 256)]


def get_init_inputs() -> list[object]:
    return [64, 128, (3, 5)]
