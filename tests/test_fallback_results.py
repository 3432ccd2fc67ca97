"""What PyTorch runs in dgrad's place gives its results, views, subclasses and transforms too."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dgrad
from dgrad import _loader, functional
from fallbacks import BIAS, W, X

pytestmark = pytest.mark.usefixtures("nothing_said_yet")


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
        torch.complex64, torch.complex128, torch.int64,
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_dtype_that_pytorch_runs_gives_its_result_and_strides(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    x = (3 * X).to(dtype).contiguous(memory_format=layout)
    arguments = (x, (3 * W).to(dtype), BIAS.to(dtype), 2, 1, 1)
    found, expected = dgrad.conv_transpose2d(*arguments), F.conv_transpose2d(*arguments)
    assert found.dtype is dtype
    assert found.stride() == expected.stride()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.transpose(2, 3),
        lambda t: t.flip(0)[..., ::2],
        lambda t: t[:, :, :1].expand(-1, -1, 3, -1),
        lambda t: t.to(torch.complex64).conj(),
        lambda t: t.to(torch.complex64).conj().imag,
        lambda t: torch.empty(t.numel() + 1)[1:].view(t.shape).copy_(t),
    ],
    ids=["transposed", "every second", "expanded", "conjugated", "negated", "misaligned"],
)
def test_views_give_pytorchs_result(view: Any) -> None:
    x = view(X)
    w = W.to(x.dtype)
    assert torch.equal(dgrad.conv_transpose2d(x, w), F.conv_transpose2d(x, w))


class Tagged(Tensor):
    """A subclass that keeps its type, as PyTorch's subclasses do by default."""


class Intercepting(Tensor):
    """A subclass with a rule of its own."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.conv_transpose2d:
            return "intercepted"
        return super().__torch_function__(func, types, args, kwargs or {})


class TensorLike:
    """No tensor at all, but something that PyTorch's functions ask."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func.__name__


def test_a_subclass_keeps_its_rules(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dgrad"):
        found = dgrad.conv_transpose2d(X.as_subclass(Tagged), W)
    assert type(found) is Tagged
    assert torch.equal(found.as_subclass(Tensor), F.conv_transpose2d(X, W))
    assert "Tagged is a subclass of Tensor" in caplog.text
    assert dgrad.conv_transpose2d(X, W.as_subclass(Intercepting)) == "intercepted"
    assert dgrad.conv_transpose2d(X, W, BIAS.as_subclass(Intercepting)) == "intercepted"
    assert dgrad.conv_transpose2d(TensorLike(), W) == "conv_transpose2d"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_on_the_cpu_casts_as_pytorch_does(dtype: torch.dtype) -> None:
    layer = dgrad.ConvTranspose2d(4, 2, 3)
    with torch.autocast("cpu", dtype=dtype):
        for x in (X, X.to(dtype)):
            found = layer(x)
            expected = F.conv_transpose2d(x, layer.weight, layer.bias)
            assert found.dtype is expected.dtype is dtype
            assert torch.equal(found, expected)
        with torch.autocast("cpu", enabled=False):
            assert layer(X).dtype is torch.float32
    with pytest.raises(RuntimeError):
        layer(X.to(dtype))


def test_a_cuda_autocast_leaves_cpu_tensors_alone() -> None:
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)  # the context manager refuses without a GPU
    try:
        assert dgrad.conv_transpose2d(X, W).dtype is torch.float32
    finally:
        torch.set_autocast_enabled("cuda", before)


def test_vmap_gives_pytorchs_result() -> None:
    xs, ws = torch.stack([X, 2 * X, -X]), torch.stack([W, -W, 3 * W])
    for in_dims in ((0, 0), (0, None), (None, 0)):
        arguments = (xs if in_dims[0] == 0 else X, ws if in_dims[1] == 0 else W)
        found, expected = (
            torch.func.vmap(function, in_dims)(*arguments)
            for function in (dgrad.conv_transpose2d, F.conv_transpose2d)
        )
        assert torch.equal(found, expected)


# PyTorch's own rules for forward mode are compiled at their first use.
forward_mode = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")


@forward_mode
def test_the_transforms_of_torch_func_give_pytorchs_results() -> None:
    def loss(function: Any) -> Any:
        return lambda w, b: function(X, w, b, 2).pow(2).sum()

    ours, theirs = loss(dgrad.conv_transpose2d), loss(F.conv_transpose2d)
    for transform in (
        lambda f: torch.func.grad(f, argnums=(0, 1))(W, BIAS),
        lambda f: torch.func.jvp(f, (W, BIAS), (W, BIAS)),
        lambda f: torch.func.vjp(f, W, BIAS)[1](torch.tensor(1.0)),
        lambda f: torch.func.jacrev(f)(W, BIAS),
        lambda f: torch.func.hessian(f, argnums=1)(W, BIAS),
        lambda f: torch.func.functionalize(f)(W, BIAS),
        lambda f: torch.func.vmap(torch.func.grad(f), (0, None))(torch.stack([W, -W]), BIAS),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))


@forward_mode
def test_forward_mode_gives_pytorchs_tangent() -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, X + 1)
        found, expected = (
            torch.autograd.forward_ad.unpack_dual(function(dual, W))
            for function in (dgrad.conv_transpose2d, F.conv_transpose2d)
        )
    torch.testing.assert_close(found.tangent, expected.tangent)


def test_a_layer_can_be_called_with_other_parameters() -> None:
    layer = dgrad.ConvTranspose2d(4, 2, 3)
    found = torch.func.functional_call(layer, {"weight": W, "bias": BIAS}, (X,))
    assert torch.equal(found, F.conv_transpose2d(X, W, BIAS))


@pytest.fixture
def cpu_taken_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """CPU tensors are prepared as CUDA tensors are; the list holds the input pointers of calls."""
    unsuitable, pointers = functional._unsuitable, []

    def without_devices(*tensors: Any) -> str | None:
        with monkeypatch.context() as patch:
            if not torch._C._functorch.peek_interpreter_stack():
                patch.setattr(torch.Tensor, "is_cuda", True)
                patch.setattr(_loader, "unavailable_reason", lambda: None)
            return unsuitable(*tensors)

    class Recorder:
        def __init__(self, direction: str, a: Tensor, b: Tensor, *_: Any) -> None:
            pass

        def __call__(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
            pointers.append(a.data_ptr())
            return F.conv_transpose2d(a, b, bias)

        def ready(self, recipe: object) -> None:
            return None  # native code reads CUDA tensors alone

    monkeypatch.setattr(functional, "_unsuitable", without_devices)
    monkeypatch.setattr(functional, "Call", Recorder)
    return pointers


def test_a_call_is_found_again(cpu_taken_for_a_gpu: list[int]) -> None:
    dgrad.conv_transpose2d(X, W)
    dgrad.conv_transpose2d(X, W)
    assert len(cpu_taken_for_a_gpu) == 2


def test_a_call_with_a_bias_gets_it(cpu_taken_for_a_gpu: list[int]) -> None:
    assert torch.equal(dgrad.conv_transpose2d(X, W, BIAS), F.conv_transpose2d(X, W, BIAS))
    assert torch.equal(dgrad.conv_transpose2d(X, W), F.conv_transpose2d(X, W))
    assert len(cpu_taken_for_a_gpu) == 2


@pytest.mark.parametrize("negative", [0, 1, 2])
def test_a_negative_view_is_pytorchs_to_run(negative: int, cpu_taken_for_a_gpu: list[int]) -> None:
    dgrad.conv_transpose2d(X, W, BIAS)  # a remembered call of the same sizes
    tensors = [X, W, BIAS]
    tensors[negative] = tensors[negative]._neg_view()
    assert torch.equal(dgrad.conv_transpose2d(*tensors), F.conv_transpose2d(*tensors))
    assert len(cpu_taken_for_a_gpu) == 1


def test_a_call_inside_a_transform_does_not_send_later_ones_to_pytorch(
    cpu_taken_for_a_gpu: list[int],
) -> None:
    torch.func.vmap(lambda z: z * dgrad.conv_transpose2d(X, W).sum())(torch.ones(2))
    before = len(cpu_taken_for_a_gpu)
    dgrad.conv_transpose2d(X, W)
    assert len(cpu_taken_for_a_gpu) == before + 1


def test_a_remembered_call_gets_no_tensor_without_memory(
    cpu_taken_for_a_gpu: list[int],
) -> None:
    dgrad.conv_transpose2d(X, W)
    torch.func.functionalize(lambda x: dgrad.conv_transpose2d(x, W))(X)
    assert all(cpu_taken_for_a_gpu), "cuDNN would read from a null pointer"


def test_a_remembered_call_with_gradients_works_inside_a_transform(
    cpu_taken_for_a_gpu: list[int],
) -> None:
    w = W.clone().requires_grad_()
    dgrad.conv_transpose2d(X, w)
    one = torch.tensor(1.0)
    gradient = torch.func.grad(lambda z: (z * dgrad.conv_transpose2d(X, w)).sum())(one)
    torch.testing.assert_close(gradient, F.conv_transpose2d(X, w).sum())
