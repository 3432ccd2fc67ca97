"""How tensors enter a call: as one problem or in parts, copied where cuDNN wants it, with a bias.

The tensors are on the CPU, and PyTorch's operators stand in the place of a runner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

import dgrad
from dgrad import _call, _loader, _ops, config, functional
from dgrad._call import Call, call_for
from dgrad._geometry import Geometry, Pair
from dgrad._refusal import failed
from dgrad.exceptions import cudnn_error

GEOMETRY = Geometry((1, 0), (2, 1), (1, 2), 2)
LAYOUTS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


class ByPyTorch:
    """A runner that says what it is given, and fails if told to."""

    made: list[ByPyTorch]
    given: list[tuple[Tensor | None, ...]]
    error: Exception | None

    def __init__(self, problem: Any, policy: config.Policy) -> None:
        self.problem = problem
        self.policy = policy
        self.made.append(self)

    def run(self, x: Tensor, w: Tensor, y: Tensor, bias: Tensor | None = None) -> None:
        if self.error is not None:
            raise self.error
        problem = self.problem
        for tensor, shape in ((x, problem.x), (w, problem.w), (y, problem.y)):
            assert list(tensor.shape) == shape
            assert tensor.is_contiguous(memory_format=LAYOUTS[problem.layout])
            assert tensor.data_ptr() % problem.alignment == 0
        assert (bias is not None) is problem.bias
        if bias is not None:
            assert bias.shape == (problem.x[1],)
            assert bias.is_contiguous()
            assert bias.data_ptr() % problem.alignment == 0
        self.given.append((x, w, y, bias))
        geometry = (problem.stride, problem.padding, problem.dilation, problem.groups)
        if problem.direction == "dgrad":
            x.copy_(conv2d_input(problem.x, w, y, *geometry))
            if bias is not None:
                x.add_(bias.view(1, -1, 1, 1))
        elif problem.direction == "fprop":
            y.copy_(F.conv2d(x, w, None, *geometry))
        else:
            w.copy_(conv2d_weight(x, problem.w, y, *geometry))

    def failed(self, error: dgrad.CudnnError) -> RuntimeError:
        return failed(error, self.problem, self.policy)


@pytest.fixture(autouse=True)
def runners(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[ByPyTorch]]:
    core, reason = _loader.load()
    if core is None:
        pytest.skip(f"the native module cannot be used: {reason}")
    ByPyTorch.made, ByPyTorch.given, ByPyTorch.error = [], [], None
    monkeypatch.setattr(_call, "Runner", ByPyTorch)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    dgrad.plan_cache.clear()
    yield ByPyTorch
    dgrad.plan_cache.clear()


def at_offset(tensor: Tensor, elements: int) -> Tensor:
    """The same tensor so many elements behind an address that every kernel can read."""
    flat = torch.empty(tensor.numel() + elements, dtype=tensor.dtype)
    moved = flat.as_strided(tensor.shape, tensor.stride(), elements)
    return moved.copy_(tensor)


def tensors(layout: str = "nchw", batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and bias of a transposed convolution."""
    torch.manual_seed(0)
    y, w = torch.randn(batch, 4, 5, 6), torch.randn(4, 3, 3, 2)
    return y.contiguous(memory_format=LAYOUTS[layout]), w, torch.randn(6)


def expected(y: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    padding, stride, dilation, groups = GEOMETRY
    return F.conv_transpose2d(y, w, bias, stride, padding, 0, groups, dilation)


def made(y: Tensor, w: Tensor, bias: Tensor | None, **flags: Any) -> Call:
    height, width = expected(y, w, None).shape[2:]
    return Call(
        "dgrad",
        y,
        w,
        GEOMETRY,
        (height, width),
        config.deciding("dgrad", dgrad.Flags(**flags)),
        bias,
    )


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bias_is_part_of_the_problem_and_of_the_result(
    runners: type[ByPyTorch], layout: str, with_bias: bool
) -> None:
    y, w, bias = tensors(layout)
    given_bias = bias if with_bias else None
    found = made(y, w, given_bias)(y, w, given_bias)
    torch.testing.assert_close(found, expected(y, w, given_bias))
    assert found.is_contiguous(memory_format=LAYOUTS[layout])
    (runner,) = runners.made
    assert runner.problem.bias is with_bias
    assert runner.problem.layout == layout
    ((_, _, used_y, used_bias),) = runners.given
    assert used_y is y
    assert used_bias is given_bias


@pytest.mark.parametrize("copied", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_begins_at_an_odd_address_is_copied(
    runners: type[ByPyTorch], layout: str, copied: int
) -> None:
    given = [*tensors(layout)]
    given[1] = given[1].contiguous(memory_format=LAYOUTS[layout])
    given[copied] = at_offset(given[copied], 1)
    assert given[copied].data_ptr() % 16 == 4
    found = made(*given)(*given)
    torch.testing.assert_close(found, expected(*given))
    assert runners.made[0].problem.alignment == 16
    ((_, w, y, bias),) = runners.given
    for number, (tensor, used) in enumerate(zip(given, (y, w, bias), strict=True)):
        assert (used is tensor) is (number != copied)


@pytest.mark.parametrize(
    "strided",
    [
        lambda bias: bias.repeat_interleave(2)[::2],
        lambda bias: torch.stack([bias, -bias], 1)[:, 0],
        lambda bias: bias[:1].expand(6),
    ],
    ids=["every second", "column", "expanded"],
)
def test_a_strided_bias_is_read_right(runners: type[ByPyTorch], strided: Any) -> None:
    y, w, bias = tensors()
    bias = strided(bias)
    assert not bias.is_contiguous()
    torch.testing.assert_close(made(y, w, bias)(y, w, bias), expected(y, w, bias))


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("per_call", [1, 2, 3])
def test_each_part_of_a_large_batch_gets_the_bias(
    runners: type[ByPyTorch],
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    per_call: int,
    with_bias: bool,
) -> None:
    y, w, bias = tensors(layout, batch=5)
    given_bias = bias if with_bias else None
    result = expected(y, w, given_bias)
    monkeypatch.setattr(_call, "MAX_ELEMENTS", per_call * result[0].numel() + 1)
    found = made(y, w, given_bias)(y, w, given_bias)
    torch.testing.assert_close(found, result)
    sizes = {1: [1] * 5, 2: [2, 2, 1], 3: [3, 2]}[per_call]
    assert [len(x) for x, *_ in runners.given if x is not None] == sizes
    assert all(runner.problem.bias is with_bias for runner in runners.made)
    assert all(used is given_bias for *_, used in runners.given)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_parts_of_a_weights_gradient_are_summed_in_float32(
    runners: type[ByPyTorch], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    digits = torch.finfo(dtype).eps ** -1
    # Summed in the half type, each of the ones would be lost.
    x = torch.tensor([2 * digits, 1, 1, 1, 1], dtype=dtype).view(-1, 1, 1, 1)
    monkeypatch.setattr(_call, "MAX_ELEMENTS", 1)
    call = Call("wgrad", x, torch.ones_like(x), Geometry((0, 0), (1, 1), (1, 1), 1), (1, 1))
    found = call(x, torch.ones_like(x))
    assert len(runners.given) == 5
    assert found.dtype is dtype
    assert found.item() == 2 * digits + 4


def test_parts_know_the_alignment_that_they_begin_at(
    runners: type[ByPyTorch], monkeypatch: pytest.MonkeyPatch
) -> None:
    y, w, bias = torch.randn(3, 4, 3, 3), torch.randn(4, 1, 1, 1), torch.randn(1)
    monkeypatch.setattr(_call, "MAX_ELEMENTS", y[0].numel())
    call = Call("dgrad", y, w, Geometry((0, 0), (1, 1), (1, 1), 1), (3, 3), None, bias)
    torch.testing.assert_close(call(y, w, bias), F.conv_transpose2d(y, w, bias))
    # an image of x has 36 bytes, one of y 144
    assert {runner.problem.alignment for runner in runners.made} == {4}


@pytest.mark.parametrize("direction", ["fprop", "wgrad"])
def test_a_gradients_problem_has_no_bias(runners: type[ByPyTorch], direction: str) -> None:
    y, w, _ = tensors()
    x = expected(y, w, None)
    a, b, size = (x, w, y.shape[2:]) if direction == "fprop" else (x, y, w.shape[2:])
    Call(direction, a, b, GEOMETRY, (size[0], size[1]))(a, b)
    assert [runner.problem.bias for runner in runners.made] == [False]


def test_where_nothing_can_run_pytorch_adds_the_bias_too(runners: type[ByPyTorch]) -> None:
    y, w, bias = tensors()
    call = made(y, w, bias)
    runners.error = dgrad.NotSupportedError("no candidate")
    for _ in range(2):
        torch.testing.assert_close(call(y, w, bias), expected(y, w, bias))
    strict = made(y, w, bias, fallback="error")
    with pytest.raises(dgrad.NotSupportedError, match="no candidate"):
        strict(y, w, bias)


def test_want_of_memory_is_not_pytorchs_to_solve(runners: type[ByPyTorch]) -> None:
    y, w, bias = tensors()
    runners.error = dgrad.OutOfMemoryError("no room")
    with pytest.raises(dgrad.OutOfMemoryError, match="no room"):
        made(y, w, bias)(y, w, bias)


def assert_says_how_to_reproduce(error: Exception) -> None:
    _, lines = str(error).split("\nTo reproduce:\n\n")
    compile(lines, "pasted", "exec")
    assert "dgrad.conv_transpose2d(x, w, b" in lines


def test_a_cudnn_that_has_no_memory_to_start_is_asked_again(
    runners: type[ByPyTorch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    y, w, bias = tensors()
    call = made(y, w, bias)
    runners.error = cudnn_error(4004, "cudnnCreate returned 4004", "cudnnCreate", "")
    with pytest.raises(dgrad.OutOfMemoryError, match="cudnnCreate returned 4004") as caught:
        call(y, w, bias)
    assert_says_how_to_reproduce(caught.value)
    runners.error = None
    torch.testing.assert_close(call(y, w, bias), expected(y, w, bias))


def test_a_cudnn_that_cannot_start_in_a_capture_says_what_to_do(
    runners: type[ByPyTorch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    y, w, bias = tensors()
    runners.error = cudnn_error(4004, "cudnnCreate returned 4004", "cudnnCreate", "")
    match = r"4004; .* before the capture"
    with pytest.raises(dgrad.CudnnNotInitializedError, match=match) as caught:
        made(y, w, bias)(y, w, bias)
    assert_says_how_to_reproduce(caught.value)
    assert (caught.value.status, caught.value.call) == (4004, "cudnnCreate")


def biases() -> Sequence[Tensor | None]:
    bias = tensors()[2]
    wide = torch.zeros(12)
    wide[::2] = bias
    return None, bias, at_offset(bias, 1), wide[::2], bias[:1].expand(6)


def test_a_call_made_for_one_bias_is_not_used_for_another_kind(runners: type[ByPyTorch]) -> None:
    y, w, _ = tensors()
    height, width = expected(y, w, None).shape[2:]
    kinds = biases()
    for _ in range(2):
        for bias in (*kinds, *reversed(kinds)):
            call = call_for("dgrad", y, w, GEOMETRY, (height, width), None, bias)
            torch.testing.assert_close(call(y, w, bias), expected(y, w, bias))
    assert len(runners.made) <= len(kinds)


# --- numbers that cuDNN cannot take -------------------------------------------------------------

LARGEST = 2**31 - 1  # of cuDNN's descriptors
ONE = torch.full((1, 1, 1, 1), 2.0)
# With one pixel and one tap neither stride nor dilation decides anything. The first is named.
WIDE: dict[str, tuple[Tensor, Tensor, dict[str, Pair]]] = {
    "stride": (ONE, ONE, {"stride": (1, LARGEST + 1)}),
    "larger stride": (ONE, ONE, {"stride": (2**40, 2**40)}),
    "dilation": (ONE, ONE, {"dilation": (LARGEST + 1, 1)}),
    "padding": (
        ONE.expand(1, 1, 3, 1),
        torch.ones(1, 1, 3, 1),
        {"padding": (LARGEST + 1, 0), "stride": (LARGEST, 1)},
    ),
    "output padding below a stride": (
        ONE, ONE, {"stride": (2**40, 1), "padding": (2**31, 0), "output_padding": (2**32, 0)},
    ),
    # This much would be as many rows of zeros.
    "output padding below a dilation": (
        ONE, ONE, {"dilation": (2**60, 1), "padding": (2**30, 0), "output_padding": (2**31, 0)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("by_operator", [False, True])
@pytest.mark.parametrize(("y", "w", "named"), WIDE.values(), ids=WIDE.keys())
def test_a_number_that_cudnn_cannot_hold_is_named(
    runners: type[ByPyTorch],
    monkeypatch: pytest.MonkeyPatch,
    y: Tensor,
    w: Tensor,
    named: dict[str, Pair],
    by_operator: bool,
) -> None:
    for module in (functional, _ops):
        monkeypatch.setattr(module, "unsuitable", lambda *_: None)
    monkeypatch.setattr(_loader, "unavailable_reason", lambda: None)
    run = torch.ops.dgrad.conv_transpose2d if by_operator else dgrad.conv_transpose2d
    name, value = next(iter(named.items()))
    for _ in range(2):  # the second call finds what the first one left in the caches
        with pytest.raises(RuntimeError) as caught:
            run(y, w, **named)
        assert type(caught.value) is RuntimeError
        assert f"{name} is {value}, expected at most {LARGEST}" in str(caught.value)
    assert not runners.made


@pytest.mark.parametrize("direction", ["dgrad", "fprop", "wgrad"])
@pytest.mark.parametrize("name", ["stride", "dilation"])
def test_the_largest_number_that_cudnn_holds_is_run(
    runners: type[ByPyTorch], direction: str, name: str
) -> None:
    geometry = Geometry((0, 0), (1, 1), (1, 1), 1)
    found = Call(direction, ONE, ONE, geometry._replace(**{name: (LARGEST, LARGEST)}), (1, 1))
    assert found(ONE, ONE).item() == 4
    with pytest.raises(RuntimeError, match=f"{name} is .* expected at most {LARGEST}"):
        Call(direction, ONE, ONE, geometry._replace(**{name: (LARGEST + 1, 1)}), (1, 1))
