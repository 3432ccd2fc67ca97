"""Errors of calls that are right end with lines that make the same error when pasted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad import _loader, _ops, functional

MARK = "\nTo reproduce:\n\n"


def message_of(run: Callable[[], object]) -> str:
    with pytest.raises(dgrad.NotSupportedError) as caught:
        run()
    assert type(caught.value) is dgrad.NotSupportedError
    return str(caught.value)


def pasted(message: str) -> dict[str, Any]:
    """What the lines of an error set, after they have raised the same one."""
    variables: dict[str, Any] = {}
    again = message_of(lambda: exec(message.partition(MARK)[2], variables))
    assert again == message
    return variables


REFUSED: dict[str, tuple[Tensor, Tensor, Tensor | None, dict[str, Any]]] = {
    "plain": (torch.randn(1, 4, 3, 3), torch.randn(4, 2, 3, 3), None, {}),
    "bias": (torch.randn(1, 4, 3, 3), torch.randn(4, 2, 3, 3), torch.randn(2), {}),
    "unbatched": (torch.randn(4, 3, 3), torch.randn(4, 2, 3, 3), None, {"stride": [2, 2]}),
    "numbers": (
        torch.randn(2, 4, 3, 3), torch.randn(4, 2, 3, 3), None,
        {"stride": (3, 2), "padding": (0, 1), "output_padding": [2, 1], "dilation": (2, 1),
         "groups": 2},
    ),
    "channels last": (
        torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 2, 3, 3), None, {},
    ),
    "bfloat16": (torch.randn(1, 4, 3, 3).bfloat16(), torch.ones(4, 2, 3, 3).bfloat16(), None, {}),
    "complex": (
        torch.randn(1, 4, 3, 3, dtype=torch.complex64),
        torch.ones(4, 2, 3, 3, dtype=torch.complex64), None, {},
    ),
    "integers": (torch.ones(1, 4, 3, 3).int(), torch.ones(4, 2, 3, 3).int(), None, {}),
    "meta": (
        torch.empty(1, 4, 3, 3, device="meta"), torch.empty(4, 2, 3, 3, device="meta"), None, {},
    ),
    "large on meta": (
        torch.empty(1, 1, 1, 2**40, device="meta"), torch.empty(1, 1, 1, 1, device="meta"),
        None, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("by_operator", [False, True])
@pytest.mark.parametrize(("x", "w", "b", "named"), REFUSED.values(), ids=REFUSED.keys())
def test_what_only_pytorch_could_run(
    x: Tensor, w: Tensor, b: Tensor | None, named: dict[str, Any], by_operator: bool
) -> None:
    run = torch.ops.dgrad.conv_transpose2d if by_operator else dgrad.conv_transpose2d
    with dgrad.flags(fallback="error"):
        for _ in range(2):
            message = message_of(lambda: run(x, w, b, **named))
            reason = f"input is on {x.device.type}, and cuDNN runs on CUDA devices"
            assert message.startswith(f"{reason}, and fallback='error' forbids PyTorch's own")
    made = pasted(message)
    for name, given in (("x", x), ("w", w), ("b", b)):
        if given is None:
            assert made[name] is None
        else:
            found = made[name]
            assert (found.shape, found.dtype, found.device) == (given.shape, given.dtype, x.device)
            assert found.stride() == given.stride()


def test_a_layers_own_flag() -> None:
    layer = dgrad.ConvTranspose2d(4, 2, 3)
    layer.flags = dgrad.Flags(fallback="error")
    pasted(message_of(lambda: layer(torch.randn(1, 4, 3, 3))))


def test_lines_that_would_not_make_the_error_are_not_given() -> None:
    x, w = torch.randn(1, 4, 3, 3), torch.randn(4, 2, 3, 3)

    class Special(Tensor):
        pass

    negative = torch.randn(1, 4, 3, 3, dtype=torch.complex64).conj().imag
    assert negative.is_neg()
    with dgrad.flags(fallback="error"):
        for run in (
            lambda: dgrad.conv_transpose2d(x.as_subclass(Special), w),
            lambda: dgrad.conv_transpose2d(negative, w),
            lambda: torch.func.vmap(lambda x: dgrad.conv_transpose2d(x, w))(x[None]),
        ):
            assert MARK not in message_of(run)


@pytest.fixture
def pretended_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go to cuDNN, up to where it would be called."""
    core, reason = _loader.load()
    if core is None:
        pytest.skip(f"the native module cannot be used: {reason}")
    for module in (functional, _ops):
        monkeypatch.setattr(module, "unsuitable", lambda *_: None)
    monkeypatch.setattr(_loader, "unavailable_reason", lambda: None)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    dgrad.plan_cache.clear()


@pytest.mark.usefixtures("pretended_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("x", "w", "named", "words"),
    [
        ((2, 1, 2**15, 2**15), (1, 2, 1, 1), {}, "one image of the output has 2147483648"),
        ((1, 2, 2**15, 2**15), (2, 1, 1, 1), {}, "one image of the input has 2147483648"),
        ((1, 2**11), (2**11, 2**10, 32, 32), {}, "weight has shape"),
        (
            (1, 2, 2**14, 2**14), (2, 3, 4, 4),
            {"stride": (2, 3), "padding": (1, 2), "output_padding": (1, 0), "groups": 2},
            "one image of the output has",
        ),
    ],
)  # fmt: skip
def test_what_is_too_large_for_cudnn_takes_no_memory_to_make_again(
    x: tuple[int, ...],
    w: tuple[int, ...],
    named: dict[str, Any],
    words: str,
    dtype: torch.dtype,
) -> None:
    tensors = [torch.zeros(1, dtype=dtype).expand(*shape) for shape in ((*x, 1, 1)[:4], w)]
    message = message_of(lambda: dgrad.conv_transpose2d(*tensors, **named))
    assert message.startswith(words)
    made = pasted(message)
    for name, given in zip("xw", tensors, strict=True):
        assert (made[name].shape, made[name].dtype) == (given.shape, dtype)
        assert made[name].untyped_storage().nbytes() == dtype.itemsize
