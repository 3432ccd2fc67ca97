"""What PyTorch runs in dgrad's place, and what raises as it does in PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import dgrad
from reference import pytorch

pytestmark = pytest.mark.gpu


def test_other_dtypes_are_pytorchs_to_run() -> None:
    x = torch.randn(1, 3, 4, 4, device="cuda", dtype=torch.complex64)
    w = torch.randn(3, 2, 3, 3, device="cuda", dtype=torch.complex64)
    torch.testing.assert_close(dgrad.conv_transpose2d(x, w), F.conv_transpose2d(x, w))


def test_mixed_dtypes_and_devices_raise_what_pytorch_raises() -> None:
    x = torch.randn(1, 3, 4, 4, device="cuda")
    w = torch.randn(3, 2, 3, 3, device="cuda")
    for wrong in (w.half(), w.double(), w.cpu()):
        with pytest.raises(RuntimeError):
            pytorch(x, wrong)
        with pytest.raises(RuntimeError, match="weight"):
            dgrad.conv_transpose2d(x, wrong)


@pytest.mark.parametrize(
    ("name", "value"), [("stride", 2**31), ("stride", 2**40), ("dilation", 2**31)]
)
def test_a_number_over_32_bits_raises_what_pytorch_raises(name: str, value: int) -> None:
    one = torch.ones(1, 1, 1, 1, device="cuda")
    with pytest.raises(RuntimeError):
        pytorch(one, one, **{name: value})
    with pytest.raises(RuntimeError, match=f"{name} is .*{value}.*, expected at most {2**31 - 1}"):
        dgrad.conv_transpose2d(one, one, **{name: value})


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("kind", ["sparse", "nested"])
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_a_sparse_or_nested_tensor_raises_what_pytorch_raises(name: str, kind: str) -> None:
    x, w = torch.randn(1, 3, 4, 4, device="cuda"), torch.randn(3, 2, 3, 3, device="cuda")
    tensors = {"input": x, "weight": w, "bias": torch.randn(2, device="cuda")}
    dgrad.conv_transpose2d(**tensors)  # a remembered call of the same sizes
    given = tensors[name]
    nested = kind == "nested"
    tensors[name] = torch.nested.nested_tensor([given]) if nested else given.to_sparse()
    with pytest.raises(RuntimeError) as theirs:
        pytorch(**tensors)
    with pytest.raises(type(theirs.value), match=f"{name} .*{kind}.*, expected a dense tensor"):
        dgrad.conv_transpose2d(**tensors)


@pytest.mark.parametrize("kind", ["quantized", "meta"])
@pytest.mark.parametrize("name", ["input", "weight", "bias"])
def test_a_quantized_or_meta_tensor_among_others_raises_what_pytorch_raises(
    name: str, kind: str
) -> None:
    x, w = torch.randn(1, 3, 4, 4, device="cuda"), torch.randn(3, 2, 3, 3, device="cuda")
    tensors = {"input": x, "weight": w, "bias": torch.randn(2, device="cuda")}
    good = dgrad.conv_transpose2d(**tensors)  # a remembered call of the same sizes
    given = dict(tensors)
    if kind == "meta":
        given[name] = tensors[name].to("meta")
    else:
        given[name] = torch.quantize_per_tensor(tensors[name], 0.1, 0, torch.qint8)
    if (name, kind) == ("input", "meta"):  # PyTorch infers the shape, whatever holds the rest
        found = dgrad.conv_transpose2d(**given)
        assert (found.device.type, found.shape) == ("meta", good.shape)
    else:
        kind_of = RuntimeError  # PyTorch runs a meta weight or bias, as if there were values
        words = "is on meta, expected cuda"
        if kind == "quantized":
            with pytest.raises(RuntimeError) as theirs:
                pytorch(**given)
            kind_of, words = type(theirs.value), r"is quantized \(torch.qint8\)"
        with pytest.raises(kind_of, match=f"{name} {words}"):
            dgrad.conv_transpose2d(**given)
    torch.testing.assert_close(dgrad.conv_transpose2d(**tensors), good)
