"""A call that works, and what another one raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dgrad

X = torch.arange(36.0).reshape(1, 4, 3, 3) / 36
W = torch.arange(72.0).reshape(4, 2, 3, 3) / 72
BIAS = torch.tensor([1.0, -2.0])

Function = Callable[..., Tensor]


def raised(function: Function, *arguments: Any, **named: Any) -> Exception | None:
    try:
        function(*arguments, **named)
    except Exception as error:
        return error
    return None


def assert_a_good_call_works() -> None:
    for bias in (None, BIAS):
        found = dgrad.conv_transpose2d(X, W, bias, stride=2)
        torch.testing.assert_close(found, F.conv_transpose2d(X, W, bias, stride=2))


def call(input: object = X, weight: object = W, bias: object = None, **named: Any) -> Any:
    return (input, weight, bias), named
