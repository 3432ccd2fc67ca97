"""The generator of CycleGAN with nine residual blocks, on images of 256 x 256.

Zhu, Park, Isola and Efros, "Unpaired Image-to-Image Translation using Cycle-Consistent
Adversarial Networks" (2017), with the sizes of junyanz/pytorch-CycleGAN-and-pix2pix.
"""

import torch
from torch import nn


def _norm(channels: int) -> list[nn.Module]:
    return [nn.InstanceNorm2d(channels), nn.ReLU(inplace=True)]


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            *_norm(channels),
            nn.ReflectionPad2d(1),
            nn.Conv2d(channels, channels, 3),
            nn.InstanceNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = x + self.layers(x)
        return y


class Model(nn.Module):
    def __init__(self, colours: int, width: int, blocks: int) -> None:
        super().__init__()
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(colours, width, 7), *_norm(width)]
        for c in (width, 2 * width):
            layers += [nn.Conv2d(c, 2 * c, 3, stride=2, padding=1), *_norm(2 * c)]
        layers += [_Residual(4 * width) for _ in range(blocks)]
        for c in (2 * width, width):
            layers += [
                nn.ConvTranspose2d(2 * c, c, 3, stride=2, padding=1, output_padding=1),
                *_norm(c),
            ]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, colours, 7), nn.Tanh()]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        translated: torch.Tensor = self.layers(image)
        return translated


def get_inputs() -> list[torch.Tensor]:
    return [torch.rand(1, 3, 256, 256)]


def get_small_inputs() -> list[torch.Tensor]:
    return [torch.rand(1, 3, 16, 20)]


def get_init_inputs() -> list[object]:
    return [3, 64, 9]
