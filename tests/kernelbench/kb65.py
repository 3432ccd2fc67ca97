"""A kernel wider than tall on a square input.

The sizes of problem 65 of KernelBench level 1.
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
    return [torch.rand(8, 64, 512, 512)]


def get_init_inputs() -> list[object]:
    return [64, 64, (3, 7)]
