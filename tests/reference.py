"""What the gpu tests compare with: random problems, a float64 oracle on the CPU, tolerances.

Note [How results are compared]
The oracle is PyTorch's own operator in float64 on the CPU, given the very values that the GPU
gets. An error is measured against the size that a result has under random signs,
sqrt(sum of the squared products), where the result itself is smaller: a sum that happens to
cancel says nothing about the precision it was computed with. Two numbers must both be small:
the norm of the difference over the norm of that size, and the largest single difference over the
largest size, so that one wrong element among many right ones is seen.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cases import LAYOUTS, TOLERANCES, Case, Pair

# One element may differ by this many tolerances.
_SINGLE = 8
# Algorithms that compute in another domain lose digits there.
_TRANSFORMS = {"WINOGRAD": 10, "FFT": 10}
NAMES = ("output", "grad_input", "grad_weight", "grad_bias")


@dataclass(frozen=True)
class Arguments:
    """The tensors of a case on a device."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    grad_output: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (self.input, self.weight, self.bias) if t is not None]


@dataclass(frozen=True)
class Expected:
    """A float64 result on the CPU, and the size to measure the error of each element with."""

    value: Tensor
    size: Tensor


def _to_device(tensor: Tensor, device: str) -> Tensor:
    """A copy on the device with the same strides and offset, also where elements overlap."""
    span = torch.as_strided(tensor, (_span(tensor) + tensor.storage_offset(),), (1,), 0)
    return span.to(device).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _span(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def arguments(case: Case, device: str = "cuda") -> Arguments:
    """Random tensors of a case: the same on every machine and device."""
    generator = torch.Generator().manual_seed(case.seed)
    images = 1 if case.n is None else case.n

    def draw(shape: Sequence[int], layout: str) -> Tensor:
        value = torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype)
        return _to_device(LAYOUTS[layout](value), device)

    x = draw((images, case.c_in, *case.size), case.layout)
    grad = draw((images, case.c_out, *case.output_size), case.grad_layout)
    weight = draw((case.c_in, case.c_out // case.groups, *case.kernel), case.weight_layout)
    bias = draw((1, 1, 1, case.c_out), "nchw")[0, 0, 0] if case.bias else None
    if case.n is None:
        x, grad = x[0], grad[0]
    leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias)]
    assert leaves[0] is not None
    assert leaves[1] is not None
    return Arguments(leaves[0], leaves[1], leaves[2], grad)


# --- oracle -------------------------------------------------------------------------------------


def results(
    function: Callable[..., Tensor], case: Case, given: Arguments, grad: bool = True
) -> dict[str, Tensor]:
    """The output of ``function`` and the gradients for all leaves, by name."""
    output = function(given.input, given.weight, given.bias, **case.options)
    found = [output.detach()]
    if grad:
        found += torch.autograd.grad(output, given.leaves, given.grad_output)
    return dict(zip(NAMES, found, strict=False))


def expected(case: Case, given: Arguments) -> dict[str, Expected]:
    """The oracle's results for the same tensors, see Note [How results are compared]."""

    def run(change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        def enter(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            return change(tensor.detach().cpu().double()).contiguous().requires_grad_()

        x, weight, bias = enter(given.input), enter(given.weight), enter(given.bias)
        grad = enter(given.grad_output)
        assert x is not None
        assert weight is not None
        assert grad is not None
        changed = Arguments(x, weight, bias, grad.detach())
        return results(F.conv_transpose2d, case, changed)

    values = run(lambda t: t)
    squares = run(torch.square)
    return {
        name: Expected(value, torch.maximum(value.abs(), squares[name].sqrt()))
        for name, value in values.items()
    }


def errors(actual: Tensor, expected: Expected) -> tuple[float, float]:
    """The relative norm and the largest relative error; infinite where NaN should not be."""
    if actual.numel() == 0:
        return 0.0, 0.0
    difference = (actual.detach().cpu().double() - expected.value).abs()
    if not bool(difference.isfinite().all()):
        return float("inf"), float("inf")
    norm, largest = (
        float(measure(difference)) / max(float(measure(expected.size)), 1e-300)
        for measure in (torch.linalg.vector_norm, torch.max)
    )
    return norm, largest


def assert_close(
    actual: Tensor, expected: Expected, tolerance: float, what: object = "result"
) -> None:
    """Shape and values agree, see Note [How results are compared]."""
    assert actual.shape == expected.value.shape, f"{what}: shape {tuple(actual.shape)}"
    norm, largest = errors(actual, expected)
    assert norm <= tolerance and largest <= _SINGLE * tolerance, (  # noqa: PT018
        f"{what}: relative norm of the error {norm:.3g} (at most {tolerance:g}), "
        f"largest relative error {largest:.3g} (at most {_SINGLE * tolerance:g})"
    )


def algorithm_tolerance(case: Case, algorithm: str) -> float:
    """What an algorithm may differ by: FFT and Winograd lose about a digit."""
    factors = [factor for name, factor in _TRANSFORMS.items() if algorithm.startswith(name)]
    return case.tolerance * max(factors, default=1)


# --- PyTorch and the GPU ------------------------------------------------------------------------


def pytorch(*arguments: Any, **options: Any) -> Tensor:
    """PyTorch's own operator on the same device; a cuDNN plan that fails there only warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return F.conv_transpose2d(*arguments, **options)


def pytorch_results(case: Case, given: Arguments) -> dict[str, Tensor]:
    """Output and gradients of PyTorch's own operator on the same device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return results(F.conv_transpose2d, case, given)


def set_pytorch_tf32(allowed: bool) -> None:
    """PyTorch's switch for tf32 in convolutions, by the newest of its two interfaces."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(conv, "fp32_precision"):
        conv.fp32_precision = "tf32" if allowed else "ieee"
    else:
        torch.backends.cudnn.allow_tf32 = allowed


def pytorch_tf32() -> bool:
    """What PyTorch's switch for tf32 in convolutions says."""
    conv = getattr(torch.backends.cudnn, "conv", None)
    if hasattr(conv, "fp32_precision"):
        return bool(conv.fp32_precision == "tf32")
    return torch.backends.cudnn.allow_tf32


@contextmanager
def nan_in_free_memory(shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Iterator[set[int]]:
    """Fill memory that the next allocations of these shapes will get with NaN.

    Yields the poisoned addresses: the caching allocator hands a freed block out again.
    """
    held = [
        torch.full(tuple(shape), float("nan"), dtype=dtype, device="cuda")
        for shape in shapes
        for _ in range(4)
    ]
    held.append(torch.full((1 << 22,), float("nan"), dtype=torch.float32, device="cuda"))
    addresses = {tensor.data_ptr() for tensor in held}
    held.clear()
    yield addresses


# --- random problems ----------------------------------------------------------------------------

_KERNELS = ((1, 1), (3, 7), (3, 5), (2, 2), (4, 4), (5, 1), (3, 3), (1, 4), (5, 5), (7, 7), (2, 9))
_MAX_MACS = 2_000_000


def random_case(seed: int, index: int) -> Case:
    """Problem number ``index`` of the sweep with this seed."""
    draw = random.Random(f"{seed}/{index}")
    while True:
        case = _draw_case(draw)
        if min(case.output_size) >= 1 and max(case.output_size) <= 96 and case.macs <= _MAX_MACS:
            return case


def _draw_case(draw: random.Random) -> Case:
    def pair(low: int, high: int) -> Pair:
        first = draw.randint(low, high)
        return first, first if draw.random() < 0.4 else draw.randint(low, high)

    n = draw.choice((None, 1, 1, 2, 3, 5))
    grouping = draw.choice(("one", "one", "one", "few", "depthwise", "multiplier", "batch"))
    wide = draw.choice((1, 2, 3, 4, 8, 16, 32, 33))
    c_in, c_out, groups = wide, draw.choice((1, 2, 3, 5, 8, 16, 24, 64)), 1
    if grouping == "few":
        groups = draw.choice((2, 3, 4))
        c_in, c_out = groups * draw.randint(1, 8), groups * draw.randint(1, 8)
    elif grouping == "depthwise":
        c_out = groups = c_in
    elif grouping == "multiplier":
        groups, c_out = c_in, c_in * draw.choice((2, 3))
    elif grouping == "batch":  # StyleGAN2: one image, whose groups are the images of the batch
        groups = draw.choice((2, 4, 8))
        n, c_in, c_out = 1, groups * draw.choice((1, 4, 8)), groups * draw.choice((1, 3, 8))

    size = draw.choice((pair(1, 4), pair(2, 12), pair(2, 12), pair(8, 24)))
    kernel = draw.choice((*_KERNELS, pair(1, 6)))
    stride = draw.choice(((1, 1), (2, 2), pair(1, 3), pair(1, 3)))
    dilation = draw.choice(((1, 1), pair(1, 3)))
    padding = (0, 0)
    if draw.random() < 0.6:
        first, last = (draw.randint(0, dilation[i] * (kernel[i] - 1)) for i in (0, 1))
        padding = (first, last)
    output_padding = (0, 0)
    if draw.random() < 0.5:
        first, last = (draw.randint(0, max(stride[i], dilation[i]) - 1) for i in (0, 1))
        output_padding = (first, last)

    plain = draw.random() < 0.5
    common = ("nchw", "channels_last")
    layouts = common if plain else tuple(LAYOUTS)
    return Case(
        n=n,
        c_in=c_in,
        c_out=c_out,
        size=size,
        kernel=kernel,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        dilation=dilation,
        groups=groups,
        bias=draw.random() < 0.5,
        precision=draw.choice(tuple(TOLERANCES)),
        layout=draw.choice(layouts),
        weight_layout=draw.choice(layouts),
        grad_layout=draw.choice(layouts),
        seed=draw.randrange(2**31),
    )
