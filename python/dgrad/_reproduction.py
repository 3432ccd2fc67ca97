"""Lines of Python that make a call again when pasted: errors of calls that are right end so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._geometry import Geometry, Pair, is_channels_last, output_size

if TYPE_CHECKING:
    from ._core import Problem

_RANDOM = (  # what torch.randn makes
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)


def of_problem(problem: Problem, flags: Mapping[str, Any]) -> str:
    """The call that comes to a problem."""
    geometry = Geometry(
        _two(problem.padding), _two(problem.stride), _two(problem.dilation), problem.groups
    )
    options = f'dtype=torch.{problem.dtype}, device="cuda:{problem.device}"'
    layout = ".to(memory_format=torch.channels_last)" if problem.layout == "nhwc" else ""
    x, w = (
        f"torch.randn({tuple(shape)}, {options}){layout}{'.requires_grad_()' * needed}"
        for shape, needed in (
            (problem.y, problem.direction == "fprop"),
            (problem.w, problem.direction == "wgrad"),
        )
    )
    return _lines(
        x,
        w,
        f"torch.randn({problem.x[1]}, {options})" if problem.bias else None,
        geometry,
        _output_padding(problem.x, problem.w, problem.y, geometry),
        flags,
        [] if problem.direction == "dgrad" else ["    y.sum().backward()"],
    )


def of_shapes(
    x: Sequence[int],
    w: Sequence[int],
    y: Sequence[int],
    geometry: Geometry,
    like: Tensor,
    flags: Mapping[str, Any],
) -> str:
    """The call that makes x of y and w, on tensors that take no memory and are otherwise like
    this one."""
    one = f"torch.zeros(1, {_options(like)})"
    shown_y, shown_w = (f"{one}.expand{tuple(shape)}" for shape in (y, w))
    return _lines(shown_y, shown_w, None, geometry, _output_padding(x, w, y, geometry), flags, [])


def of_tensors(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    output_padding: Pair,
    flags: Mapping[str, Any],
) -> str:
    """The call on tensors like these."""
    return _lines(
        _like(input),
        _like(weight),
        None if bias is None else _like(bias),
        geometry,
        output_padding,
        flags,
        [],
    )


def _lines(
    x: str,
    w: str,
    b: str | None,
    geometry: Geometry,
    output_padding: Pair,
    flags: Mapping[str, Any],
    backward: list[str],
) -> str:
    padding, stride, dilation, groups = geometry
    settings = ", ".join(f"{name}={value!r}" for name, value in flags.items())
    enabled = torch.backends.cudnn.enabled
    return "\n".join(
        [
            "import torch, dgrad",
            *([] if enabled else ["torch.backends.cudnn.enabled = False"]),
            f"x = {x}",
            f"w = {w}",
            f"b = {b}",
            f"with dgrad.flags({settings}):",
            f"    y = dgrad.conv_transpose2d(x, w, b, {stride}, {padding}, {output_padding}, "
            f"{groups}, {dilation})",
            *backward,
        ]
    )


def _like(tensor: Tensor) -> str:
    shape, make = tuple(tensor.shape), "randn" if tensor.dtype in _RANDOM else "zeros"
    text = f"torch.{make}({shape}, {_options(tensor)})"
    if is_channels_last(shape, tensor.stride()):
        text += ".to(memory_format=torch.channels_last)"
    return text


def _options(tensor: Tensor) -> str:
    return f'dtype={tensor.dtype}, device="{tensor.device}"'


def _output_padding(
    x: Sequence[int], w: Sequence[int], y: Sequence[int], geometry: Geometry
) -> Pair:
    least = output_size(y[2:], w[2:], geometry, (0, 0))
    return x[2] - least[0], x[3] - least[1]


def _two(values: Sequence[int]) -> Pair:
    first, last = values
    return first, last
