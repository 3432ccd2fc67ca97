"""U-Net with transposed convolutions, on half-size Carvana photographs of odd width.

Ronneberger, Fischer and Brox, "U-Net: Convolutional Networks for Biomedical Image Segmentation"
(2015), with the sizes of milesial/Pytorch-UNet: batch 1, images scaled by 0.5.
"""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F


def _double_conv(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_out, c_out, 3, padding=1),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


class _Up(nn.Module):
    """Twice the size, padded to the skip's size and joined with it."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(c_in, c_out, 2, stride=2)
        self.conv = _double_conv(2 * c_out, c_out)

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        x = self.up(x)
        rows, columns = (skip.shape[i] - x.shape[i] for i in (2, 3))
        x = F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))
        y: torch.Tensor = self.conv(torch.cat([skip, x], dim=1))
        return y


class Model(nn.Module):
    def __init__(self, colours: int, classes: int, width: int) -> None:
        super().__init__()
        channels = [width << i for i in range(5)]
        pairs = list(pairwise(channels))
        self.first = _double_conv(colours, width)
        self.downs = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), _double_conv(c_in, c_out)) for c_in, c_out in pairs
        )
        self.ups = nn.ModuleList(_Up(c_in, c_out) for c_out, c_in in reversed(pairs))
        self.last = nn.Conv2d(width, classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        maps = [self.first(image)]
        for down in self.downs:
            maps.append(down(maps[-1]))
        x = maps.pop()
        for up in self.ups:
            x = up(x, maps.pop())
        scores: torch.Tensor = self.last(x)
        return scores


def get_inputs() -> list[torch.Tensor]:
    return [torch.rand(1, 3, 640, 959)]


def get_small_inputs() -> list[torch.Tensor]:
    return [torch.rand(1, 3, 32, 47)]


def get_init_inputs() -> list[object]:
    return [3, 2, 64]
