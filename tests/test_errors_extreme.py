"""Numbers at which PyTorch's own operator crashes, hangs or counts wrong, on the CPU."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dgrad
from dgrad import _operator
from dgrad._autograd import convolution
from dgrad._geometry import Geometry
from fallbacks import run_python
from good_call import assert_a_good_call_works, raised

LARGEST = 2**31 - 1


def test_strides_that_crash_pytorchs_operator_leave_the_process_alive() -> None:
    done = run_python("""
        import torch, dgrad
        for stride in (8192, 65536, 2**24):
            for channels, out_channels, height in ((64, 16, 1), (16, 2, 3), (34, 2, 3)):
                for dtype in (torch.float32, torch.bfloat16):
                    x = torch.randn(2, channels, height, 2).to(dtype).requires_grad_()
                    w = torch.randn(channels, out_channels, 1, 3).to(dtype).requires_grad_()
                    padding = (0, stride // 2)
                    y = dgrad.conv_transpose2d(x, w, None, (1, stride), padding)
                    y.sum().backward()
                    z = torch.ops.dgrad.conv_transpose2d(x, w, None, (1, stride), padding)
                    assert torch.equal(z, y)
        print("alive")
    """)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


def test_so_do_they_in_transforms_and_of_a_layer() -> None:
    done = run_python("""
        import torch, dgrad
        x, w = torch.randn(2, 64, 1, 2), torch.randn(64, 16, 1, 3)
        run = lambda x: dgrad.conv_transpose2d(x, w, None, (1, 65536), (0, 32768))
        torch.func.vmap(run)(x[None])
        layer = dgrad.ConvTranspose2d(64, 16, (1, 3), stride=(1, 65536), padding=(0, 32768))
        layer(x).sum().backward()
        print("alive")
    """)
    assert (done.returncode, done.stdout) == (0, "alive\n"), done.stderr


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", _operator._WIDENED)
@pytest.mark.parametrize("with_bias", [False, True])
def test_wide_strides_give_pytorchs_values_and_types(dtype: torch.dtype, with_bias: bool) -> None:
    # Of a batch of one without groups oneDNN runs nothing, so PyTorch can be asked.
    torch.manual_seed(0)
    x, w, b = torch.randn(1, 3, 2, 2), torch.randn(3, 2, 2, 3), torch.randn(2)
    x, w, b = (t.to(dtype) for t in (x, w, b))
    bias = b if with_bias else None
    arguments = (bias, (2, 2000), (1, 999), (1, 3))
    found = dgrad.conv_transpose2d(x, w, *arguments)
    exact = _operator._WIDENED[dtype]
    given = [t if t is None else t.to(exact) for t in (x, w, bias)]
    wanted = F.conv_transpose2d(*given, *arguments[1:])
    assert found.dtype is dtype
    torch.testing.assert_close(found, wanted.to(dtype))


def test_wide_strides_obey_autocast() -> None:
    x, w = torch.randn(1, 3, 2, 2), torch.randn(3, 2, 2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dgrad.conv_transpose2d(x, w, None, (1, 2000))
        wanted = F.conv_transpose2d(x, w, None, (1, 2000))
    assert found.dtype is wanted.dtype is torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("direction", ["fprop", "wgrad"])
def test_gradients_of_wide_strides_are_pytorchs(direction: str) -> None:
    x, w, y = torch.randn(1, 2, 1, 2003), torch.randn(3, 2, 1, 3), torch.randn(1, 3, 1, 2)
    geometry = Geometry((0, 0), (1, 2000), (1, 1), 1)
    a, b, size = (x, w, (1, 2)) if direction == "fprop" else (x, y, (1, 3))
    found = convolution(direction, a, b, geometry, size)
    leaf = w.double().requires_grad_()
    result = F.conv2d(x.double(), leaf, None, (1, 2000))
    wanted = result if direction == "fprop" else torch.autograd.grad(result, leaf, y.double())[0]
    torch.testing.assert_close(found, wanted.detach().float())


def test_strides_that_any_layer_has_run_in_their_own_type(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[torch.dtype] = []
    real = F.conv_transpose2d

    def watched(input: torch.Tensor, *rest: Any) -> torch.Tensor:
        ran.append(input.dtype)
        return real(input, *rest)

    monkeypatch.setattr(F, "conv_transpose2d", watched)
    for stride in (1, 1024, 1025):
        dgrad.conv_transpose2d(torch.randn(1, 1, 1, 2), torch.randn(1, 1, 1, 1), None, (1, stride))
    assert ran == [torch.float32, torch.float32, torch.float64]


TOO_LARGE: dict[str, tuple[dict[str, Any], str]] = {
    "stride": ({"stride": (2**32, 1), "padding": (2**31, 0)}, "stride is (4294967296, 1)"),
    "wide stride": ({"stride": (1, 2**31), "padding": (0, 2**30)}, "stride is (1, 2147483648)"),
    "dilation": (
        {"dilation": (LARGEST + 1, 1), "padding": (2**30, 0)},
        "dilation is (2147483648, 1)",
    ),
    "all before padding": (
        {"dilation": (LARGEST, 1), "padding": (2**30 - 2, 0)},
        "make an output of size (2147483649, 3) before padding is taken off",
    ),
}


@pytest.mark.parametrize(("named", "words"), TOO_LARGE.values(), ids=TOO_LARGE.keys())
def test_what_pytorchs_operator_miscounts_is_told_in_words(
    named: dict[str, Any], words: str
) -> None:
    tensors = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    expected = raised(F.conv_transpose2d, *tensors, **named)
    assert isinstance(expected, RuntimeError), "PyTorch takes it"
    for _ in range(2):
        found = raised(dgrad.conv_transpose2d, *tensors, **named)
        assert type(found) is RuntimeError
        assert words in str(found)
        assert f"expected at most {LARGEST}" in str(found)
    assert_a_good_call_works()


NO_KERNEL = (torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("dtype", "other"),
    [
        (dtype, other)
        for dtype, other in itertools.product(NO_KERNEL, (None, torch.float32, torch.int64))
    ],
    ids=str,
)
def test_a_dtype_that_pytorch_has_no_kernel_for_is_told(
    dtype: torch.dtype, other: torch.dtype | None
) -> None:
    x, w = torch.ones(1, 1, 2, 2).to(dtype), torch.ones(1, 1, 2, 2).to(other or dtype)
    expected = raised(F.conv_transpose2d, x, w)
    assert expected is not None
    for run in (dgrad.conv_transpose2d, torch.ops.dgrad.conv_transpose2d):
        for _ in range(2):
            found = raised(run, x, w)
            assert isinstance(found, type(expected)), f"{found!r} in place of {expected!r}"
            assert f"input has dtype {dtype}" in str(found)
            assert re.search("expected (one|a) floating-point dtype", str(found))
    assert_a_good_call_works()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.float64])
def test_a_weight_of_another_dtype_is_told(dtype: torch.dtype) -> None:
    x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2).to(dtype)
    expected = raised(F.conv_transpose2d, x, w)
    found = raised(dgrad.conv_transpose2d, x, w)
    assert expected is not None
    assert isinstance(found, type(expected))
    assert str(found) == f"weight has dtype {dtype}, expected torch.float32, the dtype of input"
