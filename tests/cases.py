"""The problems of the gpu tests as data, and the layouts of their tensors."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "tf32": 2e-3, "float16": 2e-3, "bfloat16": 1e-2}


@dataclass(frozen=True)
class Case:
    """One problem of conv_transpose2d with the layouts of its tensors; JSON and back.

    ``n`` is None for an input without batch. ``layout``, ``weight_layout`` and ``grad_layout``
    are names of LAYOUTS. ``precision`` is a key of TOLERANCES; "tf32" is float32 that may run in
    tf32, "float32" is strict.
    """

    n: int | None = 2
    c_in: int = 4
    c_out: int = 6
    size: Pair = (5, 7)
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    output_padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = True
    precision: str = "float32"
    layout: str = "nchw"
    weight_layout: str = "nchw"
    grad_layout: str = "nchw"
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES["float32" if self.precision == "tf32" else self.precision]

    @property
    def tolerance(self) -> float:
        return TOLERANCES[self.precision]

    @property
    def output_size(self) -> Pair:
        height, width = (
            (self.size[i] - 1) * self.stride[i]
            - 2 * self.padding[i]
            + self.dilation[i] * (self.kernel[i] - 1)
            + self.output_padding[i]
            + 1
            for i in (0, 1)
        )
        return height, width

    @property
    def macs(self) -> int:
        """Multiply-adds of one direction."""
        taps = self.size[0] * self.size[1] * self.kernel[0] * self.kernel[1]
        return (self.n or 1) * self.c_in * (self.c_out // self.groups) * taps

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of conv_transpose2d after the tensors."""
        names = ("stride", "padding", "output_padding", "groups", "dilation")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Case:
        """Raises ValueError for text that is no case."""
        values = json.loads(text)
        known = {field.name for field in fields(Case)}
        if not isinstance(values, dict) or not set(values) <= known:
            raise ValueError(f"expected a JSON object with some of {', '.join(sorted(known))}")
        return Case(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})

    def __str__(self) -> str:
        repro = f"pytest -m gpu --repro {shlex.quote(self.to_json())}"
        return f"{self.to_json()}\nto run it alone, paste: {repro}"


# --- layouts ------------------------------------------------------------------------------------

_CHANNELS_LAST = torch.channels_last


def _embed(value: Tensor, memory_format: torch.memory_format) -> Tensor:
    n, c, h, w = value.shape
    # NaN all around: who reads past the slice shows it.
    frame = torch.full((n + 1, c + 2, h + 2, w + 3), float("nan"), dtype=value.dtype)
    frame = frame.contiguous(memory_format=memory_format)
    view = frame[1:, 1 : c + 1, 2:, 1 : w + 1]
    view.copy_(value)
    return view


def _shift(value: Tensor) -> Tensor:
    """The same strides, one element further in memory than an aligned address."""
    buffer = torch.full((value.numel() + 1,), float("nan"), dtype=value.dtype)
    view = buffer[1:].as_strided(value.shape, value.stride(), 1)
    view.copy_(value)
    return view


def _every_second(value: Tensor) -> Tensor:
    n, c, h, w = value.shape
    view = torch.full((n, c, h, 2 * w), float("nan"), dtype=value.dtype)[..., ::2]
    view.copy_(value)
    return view


# Each takes a contiguous 4-d tensor on the CPU. All but the expanded ones keep its values.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda t: t,
    "channels_last": lambda t: t.contiguous(memory_format=_CHANNELS_LAST),
    "slice": lambda t: _embed(t, torch.contiguous_format),
    "channels_last_slice": lambda t: _embed(t, _CHANNELS_LAST),
    "every_second": _every_second,
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "channels_first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "expanded": lambda t: t[:1].expand(t.shape),
    "expanded_pixel": lambda t: t[:, :, :1, :1].expand(t.shape),
    "shifted": _shift,
    "shifted_channels_last": lambda t: _shift(t.contiguous(memory_format=_CHANNELS_LAST)),
}
