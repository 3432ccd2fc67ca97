"""A stride of 5 and a dilated kernel: two of three output elements receive no tap.

The sizes of problem 81 of KernelBench level 1.
"""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        padding: int,
        dilation: int,
    ) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            bias=False,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.up(x)
        return y


def get_inputs() -> list[torch.Tensor]:
    return [torch.rand(16, 32, 64, 128)]


def get_init_inputs() -> list[object]:
    return [32, 64, 3, 5, 1, 2]
