"""Tensors of another layout, device, type or value: PyTorch's error, or its result."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import dgrad
from dgrad._arguments import check_tensors
from good_call import BIAS, W, X, assert_a_good_call_works, call, raised


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_a_nested_tensor_raises_pytorchs_class(name: str) -> None:
    tensors = {"input": X, "weight": W, "bias": BIAS}
    tensors[name] = torch.nested.nested_tensor(list(tensors[name][None]))
    expected = raised(F.conv_transpose2d, **tensors)
    assert expected is not None
    for _ in range(2):
        found = raised(dgrad.conv_transpose2d, **tensors)
        assert isinstance(found, type(expected)), f"{found!r} in place of {expected!r}"
        assert f"{name} is a nested tensor, expected a dense tensor" in str(found)
    assert_a_good_call_works()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("device", "others"), [("cpu", "cpu"), ("meta", "meta"), ("meta", "cpu")])
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_a_sparse_tensor_raises_pytorchs_class(
    name: str, device: str, others: str, stride: int, dtype: torch.dtype
) -> None:
    tensors = {"input": X.to(dtype), "weight": W.to(dtype), "bias": BIAS.to(dtype)}
    tensors[name] = tensors[name].to_sparse()
    for each, on in (("input", device), ("weight", others), ("bias", others)):
        tensors[each] = tensors[each].to(on)
    expected = raised(F.conv_transpose2d, **tensors, stride=stride)
    found = raised(dgrad.conv_transpose2d, **tensors, stride=stride)
    assert expected is not None
    assert isinstance(found, type(expected)), f"{found!r} in place of {expected!r}"
    assert f"{name} has layout torch.sparse_coo, expected a dense tensor" in str(found)
    assert_a_good_call_works()


# PyTorch lets these pass, as if there were values.
MIXED: dict[str, tuple[Any, list[str]]] = {
    "weight on another device": (call(X, W.to("meta")), ["weight", "meta", "expected cpu"]),
    "bias on another device": (call(X, W, BIAS.to("meta")), ["bias", "meta", "expected cpu"]),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "words"), MIXED.values(), ids=MIXED.keys())
def test_mixed_tensors_are_refused(arguments: tuple[Any, Any], words: list[str]) -> None:
    positional, named = arguments
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            dgrad.conv_transpose2d(*positional, **named)
        for word in words:
            assert word in str(caught.value)
    assert_a_good_call_works()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_bias_of_another_type_is_pytorchs_to_judge_outside_cuda(dtype: torch.dtype) -> None:
    x, w = X.to(dtype), W.to(dtype)
    for bias in (BIAS, BIAS.half(), BIAS.to(torch.complex64)):
        try:
            wanted = F.conv_transpose2d(x, w, bias)
        except RuntimeError:
            words = f"bias has dtype {bias.dtype}, expected {dtype}"
            with pytest.raises(RuntimeError, match=words):
                dgrad.conv_transpose2d(x, w, bias)
        else:
            found = dgrad.conv_transpose2d(x, w, bias)
            assert found.dtype is dtype
            assert torch.equal(found, wanted)


def test_autocast_does_not_hide_that_dtypes_differ() -> None:
    # PyTorch raises for this on both devices; cuDNN would read a float16 weight as float64.
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(RuntimeError):
        F.conv_transpose2d(X.double(), W)
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)  # the context manager refuses without a GPU
    try:
        with FakeTensorMode():  # a CUDA tensor that needs no GPU
            input = torch.empty(1, 4, 3, 3, dtype=torch.float64, device="cuda")
            weight = torch.empty(4, 2, 3, 3, dtype=torch.float16, device="cuda")
        with pytest.raises(RuntimeError, match=r"weight has dtype torch\.float16"):
            check_tensors(input, weight, None)
    finally:
        torch.set_autocast_enabled("cuda", before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["input", "weight", "bias"])
def test_values_that_are_not_finite_flow_through_as_in_pytorch(place: str, value: float) -> None:
    tensors = {"input": X.clone(), "weight": W.clone(), "bias": BIAS.clone()}
    tensors[place].view(-1)[0] = value
    expected = F.conv_transpose2d(**tensors, stride=2, output_padding=1)
    found = dgrad.conv_transpose2d(**tensors, stride=2, output_padding=1)
    assert not expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_a_meta_input_gives_the_shape_whatever_holds_the_weight() -> None:
    """As for PyTorch's convolutions; a weight without values is no use to a real input."""
    layer = dgrad.ConvTranspose2d(4, 6, 3, stride=2, padding=1)
    output = layer(torch.randn(2, 4, 5, 6, device="meta"))
    assert (output.device.type, output.shape) == ("meta", (2, 6, 9, 11))
    with pytest.raises(RuntimeError, match="weight is on meta, expected cpu"):
        layer.to("meta")(torch.randn(2, 4, 5, 6))
