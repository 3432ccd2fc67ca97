"""The operators of torch.library keep its rules and give PyTorch's results and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

import dgrad
from operands import on_each_device, tensors

LAYOUTS = [torch.contiguous_format, torch.channels_last]
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("fresh_compiler"),
]

GEOMETRY = ((1, 1), (2, 1), (1, 1), 2)  # padding, stride, dilation, groups
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], tuple[Any, ...]]] = {
    "dgrad": lambda x, w, y: (y, w, x.sum((0, 2, 3)).detach(), (12, 15), *GEOMETRY),
    "fprop": lambda x, w, y: (x, w, None, (6, 15), *GEOMETRY),
    "wgrad": lambda x, w, y: (x, y, None, (4, 3), *GEOMETRY),
    "conv_transpose2d": lambda x, w, y: (y, w, None, (2, 1), (1, 1), (0, 0), 2),
}


@on_each_device
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_an_operator_keeps_the_rules_of_the_library(
    name: str, layout: torch.memory_format, device: str
) -> None:
    made = [t.contiguous(memory_format=layout) for t in tensors(device)]
    made = [t.requires_grad_() for t in made]
    arguments = CALLS[name](*made)
    if arguments[2] is not None:
        arguments[2].requires_grad_()
    operator = getattr(torch.ops.dgrad, name).default
    found = torch.library.opcheck(operator, arguments)
    assert set(found.values()) == {"SUCCESS"}


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_operator_gives_pytorchs_results_in_the_promised_strides(
    layout: torch.memory_format, dtype: torch.dtype, device: str
) -> None:
    _, w, y = (t.contiguous(memory_format=layout) for t in tensors(device, dtype))
    bias = torch.randn(4, device=device, dtype=dtype)
    out = torch.ops.dgrad.conv_transpose2d(y, w, bias, (2, 1), (1, 1), groups=2)
    wanted = F.conv_transpose2d(y.double(), w.double(), bias.double(), (2, 1), 1, groups=2)
    close = {torch.float64: 1e-12, torch.float32: 1e-2, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(out.double(), wanted, atol=close, rtol=close)
    if dtype is not torch.float64 or layout is torch.contiguous_format:
        assert out.is_contiguous(memory_format=layout)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (y, w, bias)]
        promised = torch.ops.dgrad.conv_transpose2d(*fake, (2, 1), (1, 1), groups=2)
    assert (promised.shape, promised.stride(), promised.dtype) == (out.shape, out.stride(), dtype)


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_of_an_operator_are_those_of_the_function(
    layout: torch.memory_format, device: str
) -> None:
    _, w, y = tensors(device)
    for call in (torch.ops.dgrad.conv_transpose2d, dgrad.conv_transpose2d):
        leaves = [t.detach().contiguous(memory_format=layout).requires_grad_() for t in (y, w)]
        out = call(*leaves, None, (2, 1), (1, 1), (0, 0), 2)
        found = torch.autograd.grad(out.square().sum(), leaves)
        if call is torch.ops.dgrad.conv_transpose2d:
            first = found
    for one, other in zip(first, found, strict=True):
        torch.testing.assert_close(one, other)
        assert one.stride() == other.stride()


@on_each_device
def test_gradients_of_gradients_are_right(device: str) -> None:
    _, w, y = tensors(device)
    leaves = [y[:1, :, :3, :2].clone(), w[:, :, :2, :2].clone(), torch.randn_like(w[0, :, 0, 0])]
    leaves[2] = leaves[2].repeat(2)

    def call(*given: Tensor) -> Tensor:
        output: Tensor = torch.ops.dgrad.conv_transpose2d(*given, (2, 1), groups=2)
        return output

    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradgradcheck(call, leaves, fast_mode=True, nondet_tol=1e-10)


@on_each_device
@pytest.mark.parametrize("name", ["dgrad", "fprop", "wgrad"])
def test_an_operator_without_a_rule_for_tangents_refuses_them(name: str, device: str) -> None:
    first, second, *rest = CALLS[name](*tensors(device))
    operator = getattr(torch.ops.dgrad, name)

    def run(a: Tensor, b: Tensor) -> Any:
        return operator(a, b, *rest)

    with pytest.raises(NotImplementedError, match="no rule for forward-mode AD"):
        torch.func.jvp(run, (first, second), (first, second))
    with forward_ad.dual_level():
        for tensor in (first, first.clone().requires_grad_()):
            with pytest.raises(NotImplementedError, match="no rule for forward-mode AD"):
                run(forward_ad.make_dual(tensor, first), second)
        torch.testing.assert_close(run(first, second), operator(first, second, *rest))


@on_each_device
@pytest.mark.parametrize(
    "unfit",
    [
        lambda y, w, bias: (y, w, bias[:1]),
        lambda y, w, bias: (y, w, bias.half()),
        lambda y, w, bias: (y, w.double(), None),
        lambda y, w, bias: (y[0], w[0], None),
    ],
)
def test_operands_that_do_not_fit_are_refused(unfit: Callable[..., Any], device: str) -> None:
    x, w, y = tensors(device, torch.float32)
    given = unfit(y, w, torch.zeros(x.shape[1], device=device))
    with pytest.raises(RuntimeError):
        torch.ops.dgrad.dgrad(*given, (12, 15), *GEOMETRY)


@on_each_device
@pytest.mark.usefixtures("taken")
def test_operators_are_counted_as_pytorchs(device: str) -> None:
    def counted(function: Callable[..., Tensor], *given: Tensor, **named: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            output = function(*given, **named)
            if output.requires_grad:
                output.sum().backward()
        total: int = counter.get_total_flops()
        return total

    _, w, y = tensors(device)
    ours, theirs = torch.ops.dgrad.conv_transpose2d, F.conv_transpose2d
    once = counted(theirs, y, w, stride=(2, 2))
    assert counted(ours, y, w, stride=(2, 2)) == once > 0
    with torch.inference_mode():
        assert counted(ours, y, w, stride=(2, 2)) == counted(theirs, y, w, stride=(2, 2))
    assert counted(ours, y, w, stride=(2, 2), groups=2) == counted(theirs, y, w, stride=2, groups=2)
    leaves = [t.requires_grad_() for t in (y, w)]
    assert counted(ours, *leaves, stride=(2, 2)) == counted(theirs, *leaves, stride=2) == 3 * once


@on_each_device
@pytest.mark.parametrize("name", ["fprop", "wgrad"])
def test_a_direction_without_a_bias_refuses_one(name: str, device: str) -> None:
    first, second, _, *rest = CALLS[name](*tensors(device))
    with pytest.raises(RuntimeError, match=f"bias is given, expected None: {name} adds none"):
        getattr(torch.ops.dgrad, name)(first, second, torch.ones(6, device=device), *rest)


def test_a_size_that_is_not_the_results_is_refused() -> None:
    x, w = torch.ones(1, 2, 9, 9), torch.ones(3, 2, 3, 3)
    geometry = ([0, 0], [2, 2], [1, 1], 1)
    assert torch.ops.dgrad.fprop(x, w, None, [4, 4], *geometry).shape == (1, 3, 4, 4)
    with pytest.raises(RuntimeError, match=r"size is \(9, 9\), expected \(4, 4\)"):
        torch.ops.dgrad.fprop(x, w, None, [9, 9], *geometry)


@pytest.mark.parametrize("name", ["dgrad", "fprop"])
def test_an_operator_keeps_its_types_under_autocast(name: str) -> None:
    a = torch.randn(1, 2, 5, 5)
    w = torch.randn((2, 3, 3, 3) if name == "dgrad" else (3, 2, 3, 3))
    size = [7, 7] if name == "dgrad" else [3, 3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = getattr(torch.ops.dgrad, name)(a, w, None, size, [0, 0], [1, 1], [1, 1], 1)
    assert found.dtype is torch.float32
