"""Bad arguments of calls that go to PyTorch's operator without a look: they are told as well."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dgrad
from good_call import BIAS, W, X, assert_a_good_call_works, raised
from test_errors import BAD


class Subclass(Tensor):
    pass


def _subclass(value: Any) -> Any:
    plain = isinstance(value, Tensor) and value.layout is torch.strided and not value.is_quantized
    return value.as_subclass(Subclass) if plain else value


# How the tensors are given, and what is at work meanwhile.
WAYS: dict[str, tuple[Callable[[Any], Any], Callable[[], AbstractContextManager[Any]]]] = {
    "subclass": (_subclass, nullcontext),
    "forward mode": (lambda value: value, forward_ad.dual_level),
    "dispatch mode": (lambda value: value, lambda: FlopCounterMode(display=False)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_told_where_pytorch_runs(
    arguments: tuple[Any, Any], words: list[str], way: str
) -> None:
    positional, named = arguments
    given, at_work = WAYS[way]
    positional = [given(each) for each in positional]
    with at_work():
        expected = raised(F.conv_transpose2d, *positional, **named)
        assert expected is not None, "PyTorch accepts this"
        found = raised(dgrad.conv_transpose2d, *positional, **named)
    assert isinstance(found, type(expected)), f"{found!r} in place of {expected!r}"
    for word in words:
        assert word in str(found)
    assert_a_good_call_works()


@pytest.mark.parametrize("layer", [True, False])
def test_too_few_dimensions_under_vmap_raise_as_in_pytorch(layer: bool) -> None:
    theirs, ours = (
        kind(4, 2, 3) if layer else lambda x, f=function: f(x, W)
        for kind, function in (
            (nn.ConvTranspose2d, F.conv_transpose2d),
            (dgrad.ConvTranspose2d, dgrad.conv_transpose2d),
        )
    )
    expected = raised(torch.func.vmap(theirs), torch.randn(2, 3))
    found = raised(torch.func.vmap(ours), torch.randn(2, 3))
    assert isinstance(found, type(expected)), f"{found!r} in place of {expected!r}"
    assert "input has shape (3,), expected 3 dimensions" in str(found)


def test_want_of_memory_is_no_fault_of_a_bias_of_another_dtype() -> None:
    x = X.double().expand(2**22, 4, 3, 3)
    expected = raised(F.conv_transpose2d, x, W.double(), BIAS, stride=1000)
    found = raised(dgrad.conv_transpose2d, x, W.double(), BIAS, stride=1000)
    assert "allocate" in str(expected)
    assert str(found) == str(expected)


@pytest.mark.parametrize(("weight", "bias"), [(None, None), (W, 3), (W.double(), None)])
def test_a_wide_stride_hides_no_bad_argument(weight: Any, bias: Any) -> None:
    with forward_ad.dual_level():
        expected = raised(F.conv_transpose2d, X, weight, bias, 2000)
        found = raised(dgrad.conv_transpose2d, X, weight, bias, 2000)
    assert isinstance(found, type(expected)), f"{found!r} in place of {expected!r}"


class _OwnError(RuntimeError):
    pass


class _Failing(TorchDispatchMode):
    def __torch_dispatch__(self, *_: Any, **__: Any) -> Any:
        raise _OwnError("no bias type")


def test_the_error_of_a_mode_stays_what_it_is() -> None:
    bias = BIAS.double()
    with _Failing():
        found = raised(dgrad.conv_transpose2d, X, W, bias)
    assert type(found) is _OwnError
    assert str(found) == "no bias type"


def test_a_weight_that_autocast_leaves_is_told() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = raised(F.conv_transpose2d, X, W.double())
        found = raised(dgrad.conv_transpose2d, X, W.double())
    assert isinstance(found, type(expected))
    assert (
        str(found) == "weight has dtype torch.float64, expected torch.float32, the dtype of input"
    )


@pytest.mark.skipif(torch.__version__ < "2.7", reason="PyTorch's operator runs in compiled code")
@pytest.mark.parametrize(("weight", "bias"), [(3.0, None), (None, None), (W, 1), ("w", None)])
def test_what_is_no_tensor_is_told_in_compiled_code(weight: Any, bias: Any) -> None:
    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return torch.compile(lambda x: function(x, weight, bias), backend="eager")

    expected = raised(compiled(F.conv_transpose2d), X)
    found = raised(compiled(dgrad.conv_transpose2d), X)
    assert isinstance(expected, TypeError)
    name = "weight" if bias is None else "bias"
    assert isinstance(found, TypeError)
    assert f"{name} is of type {type(weight if bias is None else bias).__name__}" in str(found)
