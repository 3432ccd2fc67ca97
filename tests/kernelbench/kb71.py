"""A square kernel on a wide input.

The sizes of problem 71 of KernelBench level 1.
"""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(in_channels, out_channels, kernel_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.up(x)
        return y


def get_inputs() -> list[torch.Tensor]:
    return [torch.rand(8, 32, 512, 1024)]


def get_init_inputs() -> list[object]:
    return [32, 32, 3]
