"""The U-Net of unet.py on a batch of eight square images."""

import torch
from unet import Model, get_init_inputs, get_small_inputs

__all__ = ["Model", "get_init_inputs", "get_inputs", "get_small_inputs"]


def get_inputs() -> list[torch.Tensor]:
    return [torch.rand(8, 3, 512, 512)]
