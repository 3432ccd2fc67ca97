"""Calls on random tensors: of a layer given by its sizes, and of one problem of a record."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from . import config
from ._arguments import check_sizes
from ._autograd import convolution
from ._geometry import Geometry, Pair, integer, pair
from ._operands import INPUTS, OUTPUT
from ._runner import Runner
from .explain import Explanation, explain
from .functional import conv_transpose2d
from .selection import problem_dict

if TYPE_CHECKING:
    from ._core import Problem

DIRECTIONS = tuple(OUTPUT)
DTYPES = {
    name: dtype
    for dtype, names in (
        (torch.float32, ("float32", "fp32", "float")),
        (torch.float16, ("float16", "fp16", "half")),
        (torch.bfloat16, ("bfloat16", "bf16")),
        (torch.float64, ("float64", "fp64", "double")),
    )
    for name in names
}
_A_DTYPE = re.compile(r"(u?int|fp|float|bf|bfloat)\d+")  # others are words about it
_FIELDS = (
    "N", "C_in", "H", "W", "C_out", "kernel", "stride", "padding", "output_padding", "dilation",
    "groups", "bias", "dtype", "layout",
)  # fmt: skip
_ALIGNED = 16
LAYOUTS = {"nchw": False, "contiguous": False, "nhwc": True, "channels_last": True}


@dataclass(frozen=True, slots=True)
class Layer:
    """One call of :func:`dgrad.conv_transpose2d` on random tensors.

    Raises ValueError or RuntimeError, naming the argument, where the sizes do not fit together.
    """

    input: tuple[int, ...]  # (N, C_in, H, W)
    out_channels: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    output_padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    bias: bool = False
    dtype: torch.dtype = torch.float32
    channels_last: bool = False

    def __post_init__(self) -> None:
        if self.groups >= 1 and self.out_channels % self.groups:
            raise ValueError(
                f"out_channels is {self.out_channels}, expected a multiple of groups {self.groups}"
            )
        x, w = (torch.empty(shape, dtype=self.dtype, device="meta") for shape in self.shapes())
        geometry = Geometry(self.padding, self.stride, self.dilation, self.groups)
        check_sizes(x, w, None, geometry, self.output_padding)

    def shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Of the input and of the weight."""
        weight = (self.input[1], self.out_channels // max(self.groups, 1), *self.kernel)
        return self.input, weight

    def explain(self, directions: Sequence[str] = ("dgrad",)) -> Explanation:
        """What runs for it on the current GPU: the forward pass and the wanted gradients."""
        x, w = (_random(shape, self.dtype, self.channels_last) for shape in self.shapes())
        x.requires_grad_("fprop" in directions)
        w.requires_grad_("wgrad" in directions)
        return explain(
            conv_transpose2d,
            x,
            w,
            _random((self.out_channels,), self.dtype) if self.bias else None,
            self.stride,
            self.padding,
            self.output_padding,
            self.groups,
            self.dilation,
            backward=x.requires_grad or w.requires_grad,
        )


def layers(entry: Mapping[str, Any]) -> list[Layer]:
    """The layer of an entry, once for each dtype that it names ("fp32/fp16" names two).

    Raises ValueError, TypeError or RuntimeError, naming the field, for an entry that is no layer.
    """
    missing = [name for name in ("N", "C_in", "H", "W", "C_out", "kernel") if name not in entry]
    if missing:
        raise ValueError(f"the layer lacks {', '.join(missing)}")
    misspelt = [key for key in entry if key not in _FIELDS and _meant(key) in _FIELDS]
    if misspelt:
        raise ValueError(f"the layer has {misspelt[0]!r}, expected {_meant(misspelt[0])!r}")
    words = re.findall(r"[a-z]+\d*", str(entry.get("dtype", "fp32")).lower())
    dtypes = dict.fromkeys(DTYPES[word] for word in words if word in DTYPES)
    if not dtypes or any(_A_DTYPE.fullmatch(word) and word not in DTYPES for word in words):
        raise ValueError(f"dtype is {entry['dtype']!r}, expected one of {', '.join(DTYPES)}")
    layout = str(entry.get("layout", "nchw")).lower()
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {entry['layout']!r}, expected one of {', '.join(LAYOUTS)}")
    pairs = ("kernel", "stride", "padding", "output_padding", "dilation")
    options: dict[str, Any] = {name: pair(entry[name], name) for name in pairs if name in entry}
    return [
        Layer(
            input=tuple(integer(entry[name], name) for name in ("N", "C_in", "H", "W")),
            out_channels=integer(entry["C_out"], "C_out"),
            groups=integer(entry.get("groups", 1), "groups"),
            bias=_flag(entry.get("bias"), "bias"),
            dtype=dtype,
            channels_last=LAYOUTS[layout],
            **options,
        )
        for dtype in dtypes
    ]


def _meant(key: str) -> str:
    """The field that another's word for it means, such as "strides" or "kernel_size"."""
    stem = key.removesuffix("_size").removesuffix("s")
    return stem if stem in _FIELDS else f"{stem}s"


def _flag(value: object, name: str) -> bool:
    if value in (None, False, True):  # 0 and 1 too
        return bool(value)
    raise ValueError(f"{name} is {value!r}, expected true or false")


def run_problem(problem: Problem) -> None:
    """Run exactly this problem on the current GPU, which must be its device.

    Raises RuntimeError where tensors of these sizes make another problem here, for example
    without tf32 because NVIDIA_TF32_OVERRIDE is 0.
    """
    run = _run_part if problem.alignment < _ALIGNED else _run_whole
    with config.flags(allow_tf32=problem.tf32):
        different = run(problem)
    if different:
        raise RuntimeError(f"another problem runs here than the recorded one: {different}")


def _run_part(problem: Problem) -> list[str]:
    """Run a part of split tensors; what would be another here, by name.

    A call copies tensors that begin at such an address, so none comes to this problem.
    """
    if problem.dtype == "float32" and config.tf32_allowed() is not problem.tf32:
        return ["tf32"]
    dtype, nhwc = DTYPES[problem.dtype], problem.layout == "nhwc"
    x, y = (_random(shape, dtype, nhwc, problem.alignment) for shape in (problem.x, problem.y))
    bias = _random((problem.x[1],), dtype) if problem.bias else None
    Runner(problem, config.policy()).run(x, _random(problem.w, dtype, nhwc), y, bias)
    return []


def _run_whole(problem: Problem) -> list[str]:
    shapes = {slot: tuple(getattr(problem, slot)) for slot in "xwy"}
    dtype, nhwc = DTYPES[problem.dtype], problem.layout == "nhwc"
    a, b = (_random(shapes[slot], dtype, nhwc) for slot in INPUTS[problem.direction])
    padding, stride, dilation = (
        cast(Pair, tuple(getattr(problem, name))) for name in ("padding", "stride", "dilation")
    )
    geometry = Geometry(padding, stride, dilation, problem.groups)
    size = cast(Pair, shapes[OUTPUT[problem.direction]][2:])
    bias = _random((problem.x[1],), dtype) if problem.bias else None
    ran = explain(convolution, problem.direction, a, b, geometry, size, bias=bias).selections
    if [selection.problem for selection in ran] == [problem]:
        return []
    wanted = problem_dict(problem).items()
    others = [problem_dict(selection.problem) for selection in ran]
    return [n for n, value in wanted if any(other[n] != value for other in others)] or ["nothing"]


def _random(
    shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False, alignment: int = _ALIGNED
) -> Tensor:
    """A dense tensor on the current GPU whose address has exactly this alignment (16: or more)."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    strides = torch.empty(shape, device="meta", memory_format=layout).stride()
    offset = alignment % _ALIGNED // dtype.itemsize
    flat = torch.randn(math.prod(shape) + offset, dtype=dtype, device="cuda")
    return flat.as_strided(shape, strides, offset)
