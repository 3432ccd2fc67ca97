"""The three directions by PyTorch's own operators, for what cuDNN cannot run."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from ._geometry import Geometry, Pair, output_size


def run(direction: str, a: Tensor, b: Tensor, geometry: Geometry, size: Pair) -> Tensor:
    """The same result as a :class:`dgrad._call.Call` for the same arguments."""
    padding, stride, dilation, groups = geometry
    if direction == "dgrad":
        least = output_size(a.shape[2:], b.shape[2:], geometry, (0, 0))
        output_padding = (size[0] - least[0], size[1] - least[1])
        return F.conv_transpose2d(a, b, None, stride, padding, output_padding, groups, dilation)
    if direction == "fprop":
        return F.conv2d(a, b, None, stride, padding, dilation, groups)
    weight_size = (b.shape[1], a.shape[1] // groups, *size)
    grad_weight: Tensor = conv2d_weight(a, weight_size, b, stride, padding, dilation, groups)
    return grad_weight
