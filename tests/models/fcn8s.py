"""The upsampling half of FCN-8s for the 21 classes of PASCAL VOC.

Long, Shelhamer and Darrell, "Fully Convolutional Networks for Semantic Segmentation" (2015), with
the layers and crops of wkentaro/pytorch-fcn. The inputs are what its VGG16, which pads the image
by 100, makes of one of 500 x 500: the maps after pool3 and pool4, and the scores.
"""

import torch
from torch import nn


def _crop(x: torch.Tensor, first: int, rows: int, columns: int) -> torch.Tensor:
    return x[:, :, first : first + rows, first : first + columns]


class Model(nn.Module):
    def __init__(self, classes: int, c_pool3: int, c_pool4: int) -> None:
        super().__init__()
        self.score_pool3 = nn.Conv2d(c_pool3, classes, 1)
        self.score_pool4 = nn.Conv2d(c_pool4, classes, 1)
        self.upscore2 = nn.ConvTranspose2d(classes, classes, 4, stride=2, bias=False)
        self.upscore_pool4 = nn.ConvTranspose2d(classes, classes, 4, stride=2, bias=False)
        self.upscore8 = nn.ConvTranspose2d(classes, classes, 16, stride=8, bias=False)

    def forward(
        self, pool3: torch.Tensor, pool4: torch.Tensor, score: torch.Tensor
    ) -> torch.Tensor:
        x = self.upscore2(score)
        x = x + _crop(self.score_pool4(pool4), 5, *x.shape[2:])
        x = self.upscore_pool4(x)
        x = x + _crop(self.score_pool3(pool3), 9, *x.shape[2:])
        # Pooling rounds up: a pool3 of 88 is of an image of 499 to 506, here of 500.
        rows, columns = (8 * size - 204 for size in pool3.shape[2:])
        return _crop(self.upscore8(x), 31, rows, columns).contiguous()


def get_inputs() -> list[torch.Tensor]:
    return [torch.rand(1, 256, 88, 88), torch.rand(1, 512, 44, 44), torch.rand(1, 21, 16, 16)]


def get_small_inputs() -> list[torch.Tensor]:
    return [torch.rand(1, 256, 32, 36), torch.rand(1, 512, 16, 18), torch.rand(1, 21, 2, 3)]


def get_init_inputs() -> list[object]:
    return [21, 256, 512]
