"""The classic head of ViTPose-B: features of a vision transformer to heatmaps of 17 keypoints.

Xu, Zhang, Zhang and Tao, "ViTPose: Simple Vision Transformer Baselines for Human Pose Estimation"
(2022), for COCO at 256 x 192 in patches of 16, batch 64. The deconvolutions are those of
"Simple Baselines for Human Pose Estimation and Tracking" (Xiao, Wu and Wei, 2018,
microsoft/human-pose-estimation.pytorch), two instead of three.
"""

import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, c_in: int, channels: int, keypoints: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c in (c_in, channels):
            layers += [
                nn.ConvTranspose2d(c, channels, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(channels),
                nn.ReLU(inplace=True),
            ]
        layers.append(nn.Conv2d(channels, keypoints, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        heatmaps: torch.Tensor = self.layers(features)
        return heatmaps


def get_inputs() -> list[torch.Tensor]:
    return [torch.rand(64, 768, 16, 12)]


def get_small_inputs() -> list[torch.Tensor]:
    return [torch.rand(2, 768, 4, 3)]


def get_init_inputs() -> list[object]:
    return [768, 256, 17]
