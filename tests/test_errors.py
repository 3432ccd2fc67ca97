"""Bad arguments raise what PyTorch raises for them, and say which, what and why."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import dgrad
from dgrad._arguments import check_tensors

X = torch.arange(36.0).reshape(1, 4, 3, 3) / 36
W = torch.arange(72.0).reshape(4, 2, 3, 3) / 72
BIAS = torch.tensor([1.0, -2.0])

Function = Callable[..., Tensor]


def raised(function: Function, *arguments: Any, **named: Any) -> Exception | None:
    try:
        function(*arguments, **named)
    except Exception as error:
        return error
    return None


def assert_a_good_call_works() -> None:
    for bias in (None, BIAS):
        found = dgrad.conv_transpose2d(X, W, bias, stride=2)
        torch.testing.assert_close(found, F.conv_transpose2d(X, W, bias, stride=2))


def quantized(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():  # deprecated since PyTorch 2.13
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.quint8)


def call(input: object = X, weight: object = W, bias: object = None, **named: Any) -> Any:
    return (input, weight, bias), named


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
        ("stride", {1, 2}, "{1, 2}", "expected an integer"),
        ("stride", ((1, 1), 1), "(1, 1)", "expected an integer"),
        ("padding", -1, "(-1, -1)", "at least 0"),
        ("padding", (0, -2), "(0, -2)", "at least 0"),
        ("padding", "same", "'same'", "expected an integer"),
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
    with pytest.raises(RuntimeError, match=f"expected at most {2**63 - 1} bytes"):
        dgrad.conv_transpose2d(wide, wide[..., :1], stride=(1, 2**30))
    assert_a_good_call_works()


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


# On the CPU and the meta device PyTorch lets these pass; on a CUDA device it refuses them, and
# dgrad does so everywhere.
MIXED: dict[str, tuple[Any, list[str]]] = {
    "weight on another device": (call(X, W.to("meta")), ["weight", "meta", "expected cpu"]),
    "input on another device": (call(X.to("meta")), ["weight", "cpu", "expected meta"]),
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
    for bias in (BIAS, BIAS.half()):
        try:
            wanted = F.conv_transpose2d(x, w, bias)
        except RuntimeError:
            with pytest.raises(RuntimeError, match="bias"):
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


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.float8_e4m3fn])
def test_a_dtype_that_pytorch_cannot_run_raises_pytorchs_error(dtype: torch.dtype) -> None:
    expected = raised(F.conv_transpose2d, X.to(dtype), W.to(dtype))
    found = raised(dgrad.conv_transpose2d, X.to(dtype), W.to(dtype))
    assert expected is not None
    assert (type(found), str(found)) == (type(expected), str(expected))
    assert_a_good_call_works()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["input", "weight", "bias"])
def test_values_that_are_not_finite_flow_through_as_in_pytorch(place: str, value: float) -> None:
    tensors = {"input": X.clone(), "weight": W.clone(), "bias": BIAS.clone()}
    tensors[place].view(-1)[0] = value
    expected = F.conv_transpose2d(**tensors, stride=2, output_padding=1)
    found = dgrad.conv_transpose2d(**tensors, stride=2, output_padding=1)
    assert not expected.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


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


WILD = st.one_of(
    st.integers(-1, 6),
    st.sampled_from([1.0, True, "1", None, 2**64, (1, 2**64), (), (1,) * 3, [0, 9], (2, 1.0)]),
    st.tuples(st.integers(-1, 6), st.integers(-1, 6)),
)
DTYPE = st.sampled_from([torch.float32] * 8 + [torch.float64, torch.int64, torch.complex64])


def numbers(least: int) -> st.SearchStrategy[Any]:
    number = st.integers(least, least + 2)
    return st.one_of(number, st.tuples(number, number), st.lists(number, min_size=1, max_size=2))


@st.composite
def arguments_with_at_most_one_spoiled(draw: st.DrawFn) -> tuple[Any, ...]:
    # Where two are wrong, either class of error is right.
    groups, channels, out_channels = (draw(st.integers(1, n)) for n in (2, 3, 2))
    input_size, kernel = (draw(st.tuples(st.integers(1, 4), st.integers(1, 4))) for _ in "ab")
    dtype = draw(DTYPE)
    input = torch.randn(draw(st.integers(1, 2)), channels * groups, *input_size).to(dtype)
    weight = torch.randn(channels * groups, out_channels, *kernel).to(dtype)
    bias = draw(st.sampled_from([None, torch.randn(out_channels * groups).to(dtype)]))
    stride, dilation = draw(numbers(1)), draw(numbers(1))
    made = [input, weight, bias, stride, draw(numbers(0)), 0, groups, dilation]
    place = draw(st.integers(0, 7))
    if place > 2:
        made[place] = draw(st.one_of(st.just(made[place]), WILD))
        return tuple(made)
    tensor = made[place] if made[place] is not None else torch.ones(1, dtype=dtype)
    others: list[Any] = [made[place], made[place], None, 1, "text", tensor.tolist()]
    others += [tensor.sum(0), tensor[None], tensor[:0], tensor.repeat_interleave(2, dim=0)]
    if place < 2:
        others += [torch.randn(tensor.shape).to(draw(DTYPE)), tensor.transpose(2, 3)]
        others += [tensor.to(memory_format=torch.channels_last)]
        others += [tensor.narrow(draw(st.integers(1, 3)), 0, 0)]
    made[place] = draw(st.sampled_from(others))
    return tuple(made)


@contextmanager
def without_onednn() -> Iterator[None]:
    # torch.backends.mkldnn.flags also sets a tf32 switch, which warns without an Intel GPU.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@settings(deadline=None, max_examples=300)
@given(arguments_with_at_most_one_spoiled())
def test_any_arguments_give_pytorchs_result_or_pytorchs_class_of_error(
    arguments: tuple[Any, ...],
) -> None:
    # oneDNN runs a few arguments that PyTorch's other backends refuse, such as a dilation of 0.
    with without_onednn():
        expected = raised(F.conv_transpose2d, *arguments)
        found = raised(dgrad.conv_transpose2d, *arguments)
        if expected is not None:
            assert isinstance(found, type(expected)), f"{found!r} in place of {expected!r}"
            return
        wanted = F.conv_transpose2d(*arguments)
        if len(arguments[0]) == 0 and found is not None:
            assert isinstance(found, RuntimeError)  # PyTorch checks less of an empty batch
            return
        assert found is None, f"{found!r} where PyTorch gives a result"
        result = dgrad.conv_transpose2d(*arguments)
    assert result.stride() == wanted.stride()
    torch.testing.assert_close(result, wanted, rtol=0, atol=0)
