"""The generator of DCGAN: noise to images of 64 x 64.

Radford, Metz and Chintala, "Unsupervised Representation Learning with Deep Convolutional
Generative Adversarial Networks" (2015), with the sizes and the batch of pytorch/examples,
dcgan/main.py.
"""

from itertools import pairwise

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, noise: int, width: int, colours: int) -> None:
        super().__init__()
        channels = [noise, 8 * width, 4 * width, 2 * width, width]
        layers: list[nn.Module] = []
        for i, (c_in, c_out) in enumerate(pairwise(channels)):
            stride, padding = (1, 0) if i == 0 else (2, 1)
            layers += [
                nn.ConvTranspose2d(c_in, c_out, 4, stride, padding, bias=False),
                nn.BatchNorm2d(c_out),
                nn.ReLU(inplace=True),
            ]
        layers += [nn.ConvTranspose2d(width, colours, 4, 2, 1, bias=False), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self.layers(noise)
        return images


def get_inputs() -> list[torch.Tensor]:
    return [torch.randn(64, 100, 1, 1)]


def get_small_inputs() -> list[torch.Tensor]:
    return [torch.randn(2, 100, 1, 1)]


def get_init_inputs() -> list[object]:
    return [100, 64, 3]
