"""What dgrad's operators take, for PyTorch's FLOP counter."""

from __future__ import annotations

import math
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from ._operands import INPUTS, OUTPUT


def tell_counters() -> None:
    """Give the formulas to the counters at work.

    torch.utils.flop_counter takes formulas for all of them, but to import it loads triton, which
    is longer and larger than all of dgrad.
    """
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", mode), "flop_registry", None)
        if registry is not None:
            for operator, formula in _formulas().items():
                registry.setdefault(operator, formula)  # a counter may have its own


@cache
def _formulas() -> dict[Any, Any]:
    return {getattr(torch.ops.dgrad, name): partial(_flops, name) for name in OUTPUT}


def _flops(direction: str, a: Tensor, b: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """Two for each element of y and each of the filter that meets it, as PyTorch counts."""
    first, second = INPUTS[direction]
    shapes = {first: a.shape, second: b.shape, OUTPUT[direction]: out_val.shape}
    images, _channels, *sides = shapes["y"]
    return 2 * images * math.prod(sides) * math.prod(shapes["w"])
