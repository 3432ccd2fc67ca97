"""CenterNet's upsampling for DLA-34, by depthwise transposed convolutions.

Zhou, Wang and Krähenbühl, "Objects as Points" (2019), with the sizes of xingyizhou/CenterNet,
pose_dla_dcn.py: COCO at 512 x 512, batch 16 on each GPU. The inputs are the backbone's maps at
1/4, 1/8, 1/16 and 1/32; its deformable 3 x 3 convolutions are plain ones here. The output holds
80 heatmaps, 2 sizes and 2 offsets.
"""

import torch
from torch import nn


def _conv(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)
    )


class _Merge(nn.Module):
    """Bring each map but the first to the first one's size, and add it to the map before."""

    def __init__(self, c_out: int, channels: list[int], factors: list[int]) -> None:
        super().__init__()
        self.projects = nn.ModuleList(_conv(c, c_out) for c in channels)
        self.ups = nn.ModuleList(
            nn.ConvTranspose2d(
                c_out, c_out, 2 * f, stride=f, padding=f // 2, groups=c_out, bias=False
            )
            for f in factors
        )
        self.nodes = nn.ModuleList(_conv(c_out, c_out) for _ in channels)

    def forward(self, maps: list[torch.Tensor]) -> list[torch.Tensor]:
        merged = maps[:1]
        steps = zip(maps[1:], self.projects, self.ups, self.nodes, strict=True)
        for x, project, up, node in steps:
            merged.append(node(up(project(x)) + merged[-1]))
        return merged


class Model(nn.Module):
    def __init__(self, channels: list[int], width: int, outputs: list[int]) -> None:
        super().__init__()
        # From the deepest level up, all maps so far are merged into the next larger one.
        self.merges = nn.ModuleList()
        deeper = channels[-1:]
        for c in reversed(channels[:-1]):
            self.merges.append(_Merge(c, deeper, [2] * len(deeper)))
            deeper = [c] * (len(deeper) + 1)
        # The last map of each but the deepest level is merged into the largest.
        self.last = _Merge(channels[0], channels[1:-1], [2**i for i in range(1, len(channels) - 1)])
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels[0], width, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, c, 1),
            )
            for c in outputs
        )

    def forward(self, *levels: torch.Tensor) -> torch.Tensor:
        maps = [levels[-1]]
        finest: list[torch.Tensor] = []
        for level, merge in zip(reversed(levels[:-1]), self.merges, strict=True):
            maps = merge([level, *maps])
            finest.insert(0, maps[-1])
        x = self.last(finest)[-1]
        return torch.cat([head(x) for head in self.heads], dim=1)


def _levels(batch: int, size: int) -> list[torch.Tensor]:
    return [torch.rand(batch, 64 << i, size >> i, size >> i) for i in range(4)]


def get_inputs() -> list[torch.Tensor]:
    return _levels(16, 128)


def get_small_inputs() -> list[torch.Tensor]:
    return _levels(1, 16)


def get_init_inputs() -> list[object]:
    return [[64, 128, 256, 512], 256, [80, 2, 2]]
