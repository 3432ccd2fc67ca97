"""Bad arguments raise what PyTorch raises for them, and say which, what and why."""

from __future__ import annotations

import re
import threading
import warnings
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dgrad
from good_call import BIAS, W, X, assert_a_good_call_works, call, raised


def quantized(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():  # deprecated since PyTorch 2.13
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)


# What is passed, and the parts that the message must have: argument, value, expectation.
TENSORS: dict[str, tuple[Any, list[str]]] = {
    "input is text": (call("x"), ["input", "str", "expected a Tensor"]),
    "input is a list": (call([[1.0]]), ["input", "list", "expected a Tensor"]),
    "input is None": (call(None), ["input", "NoneType", "expected a Tensor"]),
    "weight is None": (call(X, None), ["weight", "NoneType", "expected a Tensor"]),
    "weight is a number": (call(X, 3.0), ["weight", "float", "expected a Tensor"]),
    "bias is a number": (call(X, W, 1), ["bias", "int", "expected a Tensor"]),
    "bias is False": (call(X, W, False), ["bias", "bool", "expected a Tensor"]),
    "input has 2 dimensions": (call(X[0, 0]), ["input", "(3, 3)", "(N, C_in, H, W)"]),
    "input has 5 dimensions": (call(X[None]), ["input", "(1, 1, 4, 3, 3)", "(N, C_in, H, W)"]),
    "input is a scalar": (call(X.sum()), ["input", "()", "(N, C_in, H, W)"]),
    "weight has 3 dimensions": (call(X, W[0]), ["weight", "(2, 3, 3)", "(C_in, C_out/groups"]),
    "weight has 5 dimensions": (call(X, W[None]), ["weight", "(1, 4, 2, 3, 3)", "4 dimensions"]),
    "channels do not match": (call(X[:, :3]), ["input", "3 channels", "expected 4 channels"]),
    "unbatched channels do not match": (call(X[0, :3]), ["input", "3 channels", "expected 4"]),
    "bias is too long": (call(X, W, torch.ones(3)), ["bias", "(3,)", "expected (2,)"]),
    "bias is empty": (call(X, W, torch.ones(0)), ["bias", "(0,)", "expected (2,)"]),
    "bias has 2 dimensions": (call(X, W, BIAS[None]), ["bias", "(1, 2)", "expected (2,)"]),
    "bias is a scalar": (call(X, W, BIAS[0]), ["bias", "()", "expected (2,)"]),
    "bias is too short for groups": (call(X, W, BIAS, groups=2), ["bias", "(2,)", "(4,)"]),
    "input has no rows": (call(X[:, :, :0]), ["input", "(1, 4, 0, 3)", "at least 1"]),
    "input has no columns": (call(X[..., :0]), ["input", "(1, 4, 3, 0)", "at least 1"]),
    "no channels at all": (call(X[:, :0], W[:0]), ["weight", "(0, 2, 3, 3)", "at least 1"]),
    "kernel is empty": (call(X, W[..., :0]), ["weight", "(4, 2, 3, 0)", "at least 1"]),
    "no output channels": (call(X, W[:, :0]), ["weight", "(4, 0, 3, 3)", "at least 1"]),
    "output has no rows": (
        call(X.double(), W[:, :, :2].double(), padding=(2, 0)), ["(2, 0)", "(0, 5)", "at least 1"],
    ),
    "weight of another dtype": (
        call(X, W.double()), ["weight", "torch.float64", "expected torch.float32"],
    ),
    "input of another dtype": (
        call(X.half()), ["weight", "torch.float32", "expected torch.float16"],
    ),
    "input is sparse": (call(X.to_sparse()), ["input", "torch.sparse_coo", "to_dense()"]),
    "weight is sparse": (call(X, W.to_sparse()), ["weight", "torch.sparse_coo", "to_dense()"]),
    "input is quantized": (call(quantized(X)), ["input", "torch.quint8", "dequantize()"]),
    "weight is quantized": (call(X, quantized(W)), ["weight", "torch.quint8", "dequantize()"]),
}  # fmt: skip

NUMBERS: dict[str, tuple[Any, list[str]]] = {
    f"{name}={value!r}": (call(**{name: value}), [name, *words])
    for name, value, *words in (
        ("stride", 0, "(0, 0)", "at least 1"),
        ("stride", -1, "(-1, -1)", "at least 1"),
        ("stride", -(2**63), str(-(2**63)), "at least 1"),
        ("stride", (2, 0), "(2, 0)", "at least 1"),
        ("stride", "2", "'2'", "expected an integer"),
        ("stride", 2.0, "2.0", "expected an integer"),
        ("stride", (1, 2.5), "2.5", "expected an integer"),
        ("stride", True, "True", "expected an integer"),
        ("stride", (True, 1), "True", "expected an integer"),
        ("stride", None, "None", "expected an integer"),
        ("stride", (), "()", "expected one integer or a list of 2"),
        ("stride", (1, 1, 1), "(1, 1, 1)", "expected one integer or a list of 2"),
        ("stride", [1, 1, 1, 1], "[1, 1, 1, 1]", "expected one integer or a list of 2"),
        ("stride", (1.0, 2.0, 3.0), "1.0", "expected an integer"),
        ("stride", (1, 2, "a"), "'a'", "expected an integer"),
        ("stride", {1, 2}, "{1, 2}", "expected an integer"),
        ("stride", ((1, 1), 1), "(1, 1)", "expected an integer"),
        ("padding", -1, "(-1, -1)", "at least 0"),
        ("padding", (0, -2), "(0, -2)", "at least 0"),
        ("padding", "same", "'same'", "expected an integer"),
        ("padding", ("s", "a", "m", "e"), "'s'", "expected an integer"),
        ("padding", 0.5, "0.5", "expected an integer"),
        ("padding", (1, 2, 3), "(1, 2, 3)", "list of 2"),
        ("padding", 3, "(3, 3)", "(-1, -1)", "at least 1"),
        ("padding", (0, 3), "(0, 3)", "(5, -1)", "at least 1"),
        ("output_padding", -1, "(-1, -1)", "at least 0"),
        ("output_padding", 1, "(1, 1)", "smaller than stride 1 or dilation 1"),
        ("output_padding", (0, 5), "(0, 5)", "smaller than stride 1 or dilation 1"),
        ("output_padding", "1", "'1'", "expected an integer"),
        ("output_padding", False, "False", "expected an integer"),
        ("output_padding", (0, 0, 0), "(0, 0, 0)", "list of 2"),
        ("dilation", 0, "(0, 0)", "at least 1"),
        ("dilation", -2, "(-2, -2)", "at least 1"),
        ("dilation", 1.5, "1.5", "expected an integer"),
        ("dilation", (1,) * 3, "(1, 1, 1)", "list of 2"),
        ("groups", 0, "0", "at least 1"),
        ("groups", -1, "-1", "at least 1"),
        ("groups", 3, "3", "a divisor of the 4 input channels"),
        ("groups", 1.0, "1.0", "expected an integer"),
        ("groups", True, "True", "expected an integer"),
        ("groups", "1", "'1'", "expected an integer"),
        ("groups", (1,), "(1,)", "expected an integer"),
        ("groups", None, "None", "expected an integer"),
        *(
            (name, torch.tensor(value), repr(torch.tensor(value)), "expected an integer")
            for name in ("stride", "padding", "output_padding", "dilation", "groups")
            for value in ([2, 2], 2.0, [], 1j)
        ),
        *(("stride", given, "an integer") for given in ((True, True), (False, 1), (1, None))),
        ("stride", (1, torch.tensor([2, 2])), "tensor([2, 2])", "expected an integer, not Tensor"),
        ("stride", (torch.tensor(1.0), 1), "tensor(1.)", "expected an integer, not Tensor"),
    )
}
NUMBERS["output_padding=2 with stride=2"] = (
    call(stride=2, output_padding=2),
    ["output_padding", "(2, 2)", "smaller than stride 2 or dilation 1"],
)
NUMBERS["output_padding=3 with dilation=3"] = (
    call(dilation=3, output_padding=3),
    ["output_padding", "(3, 3)", "smaller than stride 1 or dilation 3"],
)

BAD = TENSORS | NUMBERS


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_raises_pytorchs_class_and_says_what_is_wrong(
    arguments: tuple[Any, Any], words: list[str]
) -> None:
    positional, named = arguments
    expected = raised(F.conv_transpose2d, *positional, **named)
    assert expected is not None, "PyTorch accepts this"
    for _ in range(2):  # the second call finds what the first one left in the caches
        found = raised(dgrad.conv_transpose2d, *positional, **named)
        assert isinstance(found, type(expected)), f"{found!r} in place of {expected!r}"
        for word in words:
            assert word in str(found)
    assert_a_good_call_works()


@pytest.mark.parametrize("kind", [tuple, list])
@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
def test_a_bool_is_a_number_where_pytorch_takes_it_for_one(name: str, kind: type) -> None:
    given = {name: kind((1, True))}
    found = dgrad.conv_transpose2d(X, W, **given)
    assert torch.equal(found, F.conv_transpose2d(X, W, **given))


@pytest.mark.parametrize("name", ["stride", "padding", "output_padding", "dilation", "groups"])
def test_what_raises_when_asked_for_its_value_is_no_integer(name: str) -> None:
    class Broken:
        def __index__(self) -> int:
            raise ZeroDivisionError

        def __repr__(self) -> str:
            raise ZeroDivisionError

    for function in (F.conv_transpose2d, dgrad.conv_transpose2d):
        with pytest.raises(TypeError, match=name) as caught:
            function(X, W, **{name: Broken()})
    assert str(caught.value) == f"{name} is <Broken>, expected an integer, not Broken"
    assert_a_good_call_works()


@pytest.mark.parametrize("name", ["stride", "padding", "output_padding", "dilation", "groups"])
@pytest.mark.parametrize("value", [[2, 2], [1], 2.0])
def test_an_array_of_another_library_is_named(name: str, value: Any) -> None:
    array = pytest.importorskip("numpy").array(value)
    expected = raised(F.conv_transpose2d, X, W, **{name: array})
    found = raised(dgrad.conv_transpose2d, X, W, **{name: array})
    assert expected is not None
    assert isinstance(found, type(expected)), f"{found!r} in place of {expected!r}"
    assert str(found) == f"{name} is {array!r}, expected an integer, not ndarray"
    assert_a_good_call_works()


@pytest.mark.parametrize("name", ["stride", "padding", "output_padding", "dilation"])
@pytest.mark.parametrize("value", [2**31, 2**32, 2**40, 2**62, 2**63 - 1])
def test_a_number_over_32_bits_is_named(name: str, value: int) -> None:
    # PyTorch's CPU kernels cut these to 32 bits, so only the class of its error is comparable.
    named = {name: value}
    expected = raised(F.conv_transpose2d, X, W, **named)
    if (name, value) == ("padding", 2**63 - 1) and expected is None:
        expected = RuntimeError("PyTorch 2.4 takes it: twice this wraps around to -2")
    found = raised(dgrad.conv_transpose2d, X, W, **named)
    assert isinstance(found, type(expected))
    if name in ("padding", "output_padding"):
        assert f"{name} {(value, value)}" in str(found).replace(" is ", " ")
    assert re.search("expected (at most|at least|a height smaller)", str(found))
    assert_a_good_call_works()


@pytest.mark.parametrize("value", [2**63, 2**64, 2**100, -(2**63) - 1, -(2**70)])
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("groups", int),
        *product(("stride", "padding", "output_padding", "dilation"), (int, tuple, list)),
    ],
)
def test_a_number_over_64_bits_is_named(name: str, kind: type, value: int) -> None:
    given = value if kind is int else kind((1, value))
    expected = raised(F.conv_transpose2d, X, W, **{name: given})
    assert expected is not None
    found = raised(dgrad.conv_transpose2d, X, W, **{name: given})
    assert isinstance(found, type(expected)), f"{found!r} in place of {expected!r}"
    for word in (name, str(value), "expected a 64-bit integer"):
        assert word in str(found)
    assert_a_good_call_works()


def test_a_number_too_long_to_be_written_is_told_all_the_same() -> None:
    for given in (10**5000, (1, 10**5000)):
        for function in (F.conv_transpose2d, dgrad.conv_transpose2d):
            with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
                function(X, W, stride=given)
        assert re.fullmatch(r"stride is .{1,210}, expected a 64-bit integer", str(caught.value))


@pytest.mark.parametrize("size", [2**31, 2**40, 2**62])
def test_sizes_over_32_bits_give_pytorchs_result_on_the_meta_device(size: int) -> None:
    # An expanded tensor has the sizes without the memory.
    wide = torch.empty(1, device="meta").expand(1, 1, 1, size)
    kernel = torch.empty(1, 1, 1, 1, device="meta")
    expected = raised(F.conv_transpose2d, wide, kernel)
    found = raised(dgrad.conv_transpose2d, wide, kernel)
    assert type(found) is type(expected)
    if expected is None:
        shape = dgrad.conv_transpose2d(wide, kernel).shape
        assert shape == F.conv_transpose2d(wide, kernel).shape == (1, 1, 1, size)


def test_an_output_over_64_bits_is_refused() -> None:
    wide = torch.empty(1, device="meta").expand(1, 1, 1, 2**40)
    words = rf"stride \(1, {2**30}\), .* expected at most {2**63 - 1} bytes"
    with pytest.raises(RuntimeError, match=words):
        dgrad.conv_transpose2d(wide, wide[..., :1], stride=(1, 2**30))
    assert_a_good_call_works()


def test_a_missing_or_unknown_argument_is_a_type_error() -> None:
    for function in (F.conv_transpose2d, dgrad.conv_transpose2d):
        with pytest.raises(TypeError):
            function(X)  # type: ignore[call-arg]
        with pytest.raises(TypeError):
            function(X, W, strides=2)  # type: ignore[call-arg]


def test_arguments_have_pytorchs_names_and_order() -> None:
    ordered = dgrad.conv_transpose2d(X, W[:, :1], None, 3, 1, 2, 2, 2)
    named = dgrad.conv_transpose2d(
        dilation=2, groups=2, output_padding=2, padding=1, stride=3, weight=W[:, :1], input=X
    )
    expected = F.conv_transpose2d(X, W[:, :1], None, 3, 1, 2, 2, 2)
    assert torch.equal(ordered, expected)
    assert torch.equal(named, expected)


def test_errors_on_many_threads_disturb_no_good_call() -> None:
    wrong: list[object] = []
    expected = F.conv_transpose2d(X, W, BIAS)

    def work() -> None:
        for i in range(100):
            error = raised(dgrad.conv_transpose2d, X, W, BIAS, stride=-i)
            if not isinstance(error, RuntimeError):
                wrong.append(error)
            if not torch.equal(dgrad.conv_transpose2d(X, W, BIAS), expected):
                wrong.append("another result")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
