"""Sizes, strides and padding of a transposed convolution: pure functions of integers."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

from ._words import shown

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """What the three directions of one layer share; output_padding lies in the sizes."""

    padding: Pair
    stride: Pair
    dilation: Pair
    groups: int


def pair(value: object, name: str) -> Pair:
    """``value`` as (vertical, horizontal), accepting what PyTorch's parser accepts.

    Raises:
        TypeError: not an integer or a sequence of integers. A bool is one only as the second of
            two, as in PyTorch.
        RuntimeError: a sequence whose length is not 1 or 2.
    """
    if type(value) is tuple and len(value) == 2:
        if type(value[0]) is int and type(value[1]) is int:
            return value
    elif type(value) is int:
        return value, value
    items = value if isinstance(value, (tuple, list)) else (value,)
    if len(items) not in (1, 2):
        for item in items:  # PyTorch looks at the kinds first
            integer(item, name)
        raise RuntimeError(f"{name} is {shown(value)}, expected one integer or a list of 2 values")
    first = integer(items[0], name)
    if len(items) == 2 and isinstance(items[1], bool):
        return first, int(items[1])
    return first, integer(items[-1], name)


def integer(value: object, name: str) -> int:
    """``value`` as an int; TypeError where PyTorch's parser would raise one."""
    if type(value) is int:  # also what stands for one while compiling
        return value
    if isinstance(value, (bool, float, complex, str)) or not hasattr(value, "__index__"):
        raise _no_integer(value, name)
    try:
        return operator.index(value)
    except Exception as error:  # an array, of several values or of no integer, or somebody's code
        raise _no_integer(value, name) from error


def _no_integer(value: object, name: str) -> TypeError:
    kind = type(value).__name__
    return TypeError(f"{name} is {shown(value)}, expected an integer, not {kind}")


def output_size(
    input_size: Sequence[int],
    kernel_size: Sequence[int],
    geometry: Geometry,
    output_padding: Pair,
) -> Pair:
    """Spatial size (H_out, W_out) of the transposed convolution, by PyTorch's formula:
    ``(H - 1) * stride - 2 * padding + dilation * (kernel - 1) + output_padding + 1``.
    """
    padding, stride, dilation, _ = geometry
    height, width = (
        (input_size[i] - 1) * stride[i]
        - 2 * padding[i]
        + dilation[i] * (kernel_size[i] - 1)
        + output_padding[i]
        + 1
        for i in (0, 1)
    )
    return height, width


def appended_rows(output_padding: Pair, stride: Pair) -> Pair:
    """How many zero rows and columns to append to the input so that output_padding < stride.

    cuDNN takes an output only where the forward convolution of it has exactly the input's size,
    that is output_padding < stride. One more input row adds ``stride`` output rows and, being
    zero, no value: it stands for ``stride`` of the output padding.
    """
    return output_padding[0] // stride[0], output_padding[1] // stride[1]


def is_known(condition: object) -> bool:
    """Whether it holds, and not only for some sizes that the compiler leaves open to the data."""
    if isinstance(condition, torch.SymBool) and not condition.node.has_hint():
        return False
    return bool(condition)


def is_channels_last(size: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether PyTorch reads these strides of a 4-d tensor as channels_last.

    The rule of c10/core/MemoryFormat.h (``is_channels_last_strides_2d``), also where sizes of
    one make the strides ambiguous.
    """
    if len(size) != 4 or stride[1] == 0:
        return False
    least = 0
    for d in (1, 3, 2, 0):
        if is_known(size[d] == 0) or stride[d] < least:
            return False
        if d == 0:
            break
        least = stride[d] * max(size[d], 1)
    return bool(least != stride[1])
