"""What dgrad cannot run, PyTorch runs, and dgrad says so once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import dgrad
from dgrad import _compiled, _loader, log
from dgrad._autograd import convolution
from dgrad._geometry import Geometry
from dgrad._watch import watching
from fallbacks import BIAS, W, X, run_python

pytestmark = pytest.mark.usefixtures("nothing_said_yet")


def test_the_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dgrad"):
        for _ in range(3):
            dgrad.conv_transpose2d(X, W)
            dgrad.conv_transpose2d(X, W, BIAS, stride=2)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("dgrad", "INFO")
    assert record.getMessage() == (
        "PyTorch's own conv_transpose2d runs: input is on cpu, and cuDNN runs on CUDA devices"
    )


def test_another_reason_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="dgrad"):
        dgrad.conv_transpose2d(X, W)
        dgrad.conv_transpose2d(X.to("meta"), W.to("meta"))
    assert ["cpu" in caplog.messages[0], "meta" in caplog.messages[1]] == [True, True]


def test_the_reasons_that_were_said_take_bounded_memory() -> None:
    for i in range(20_000):
        log.fallback(f"reason{i}")
    assert len(log._told) <= 4096


CALLS = """
    import torch, dgrad
    for _ in range(3):
        dgrad.conv_transpose2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2))
"""


def test_by_default_nothing_is_printed() -> None:
    done = run_python(CALLS, DGRAD_LOG="")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("level", ["info", " DEBUG "])
def test_the_variable_shows_the_log(level: str) -> None:
    done = run_python(CALLS, DGRAD_LOG=level)
    assert (done.returncode, done.stdout) == (0, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("[dgrad] PyTorch's own conv_transpose2d runs: input is on cpu")


def test_an_unknown_level_is_said_and_taken_as_info() -> None:
    done = run_python(CALLS, DGRAD_LOG="loud")
    first, second = done.stderr.splitlines()
    assert first == "[dgrad] DGRAD_LOG is 'loud', expected info or debug; info is used"
    assert "input is on cpu" in second


def test_the_root_logger_and_its_handlers_are_left_alone() -> None:
    assert logging.getLogger("dgrad").handlers
    done = run_python("""
        import logging, dgrad
        print(logging.getLogger().handlers, logging.getLogger("dgrad").level)
    """)
    assert done.stdout.split() == ["[]", "0"]


def test_the_flag_forbids_it() -> None:
    with dgrad.flags(fallback="error"):
        for _ in range(2):
            with pytest.raises(dgrad.NotSupportedError) as caught:
                dgrad.conv_transpose2d(X, W)
            assert "input is on cpu" in str(caught.value)
            assert "fallback='error'" in str(caught.value)
            with pytest.raises(dgrad.NotSupportedError):
                dgrad.ConvTranspose2d(4, 2, 3)(X)
    assert torch.equal(dgrad.conv_transpose2d(X, W), F.conv_transpose2d(X, W))


@pytest.mark.parametrize("by_operator", [False, True])
def test_an_empty_batch_is_nothing_to_forbid(
    by_operator: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(_loader, "unavailable_reason", lambda: None)
    run = torch.ops.dgrad.conv_transpose2d if by_operator else dgrad.conv_transpose2d
    with dgrad.flags(fallback="error"), caplog.at_level(logging.INFO, logger="dgrad"):
        for _ in range(2):
            leaves = [t.clone().requires_grad_() for t in (X[:0], W, BIAS)]
            output = run(*leaves, (2, 2))
            wanted = F.conv_transpose2d(*leaves, 2)
            assert output.shape == (0, 2, 7, 7)
            assert output.stride() == wanted.stride()
            gradients, others = (
                torch.autograd.grad(result.sum(), leaves) for result in (output, wanted)
            )
            for leaf, gradient, other in zip(leaves, gradients, others, strict=True):
                assert gradient.shape == leaf.shape
                assert not gradient.any()
                assert gradient.stride() == other.stride()
    assert not caplog.messages


def test_bad_arguments_are_told_before_the_fallback_is_refused() -> None:
    with dgrad.flags(fallback="error"), pytest.raises(RuntimeError, match="stride is") as caught:
        dgrad.conv_transpose2d(X, W, stride=0)
    assert not isinstance(caught.value, dgrad.NotSupportedError)


@pytest.mark.filterwarnings(
    "ignore:.torch.jit:DeprecationWarning", "ignore:.torch.jit:FutureWarning"
)
def test_each_thing_that_is_at_work_is_a_reason_of_its_own(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(x: Tensor) -> Tensor:
        return dgrad.conv_transpose2d(x, W).sum()

    def with_tangents(x: Tensor) -> None:
        with forward_ad.dual_level():
            run(forward_ad.make_dual(x, x))

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def in_mode(x: Tensor) -> None:
        with Mode():
            run(x)

    at_work: dict[str, Callable[[Tensor], Any]] = {
        "torch.jit.trace is": lambda x: torch.jit.trace(run, x, check_trace=False),
        "torch.func is at work (vmap)": torch.func.vmap(run),
        "torch.func is at work (grad)": torch.func.grad(run),
        "forward-mode AD is": with_tangents,
        "the dispatch mode Mode is": in_mode,
    }
    for reason, call in at_work.items():
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="dgrad"):
            for _ in range(2):
                call(X)
        (line,) = caplog.messages
        assert line.startswith(f"PyTorch's own conv_transpose2d runs: {reason}")


# --- the gradients of what cuDNN ran ------------------------------------------------------------

PLAIN = Geometry((0, 0), (1, 1), (1, 1), 1)
FORBIDDEN = ", and fallback='error' forbids PyTorch's own operator"
AT_ONCE = "gradients of many vectors are taken at once"


@pytest.fixture
def recorded() -> tuple[Tensor, list[Tensor]]:
    """An output with its graph, as cuDNN leaves it, and the two leaves."""
    leaves = [X.clone().requires_grad_(), W.clone().requires_grad_()]
    output = convolution("dgrad", *leaves, PLAIN, (5, 5))
    log._told.clear()
    return output, leaves


def many(output: Tensor) -> dict[str, Any]:
    return {"grad_outputs": torch.ones(3, *output.shape), "is_grads_batched": True}


def test_gradients_that_pytorch_runs_are_logged_once(
    recorded: tuple[Tensor, list[Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    output, leaves = recorded
    with caplog.at_level(logging.INFO, logger="dgrad"), watching() as events:
        for _ in range(2):
            torch.autograd.grad(output.sum(), leaves, retain_graph=True)
            torch.autograd.grad(output, leaves, **many(output), retain_graph=True)
    reasons = ["input is on cpu, and cuDNN runs on CUDA devices", AT_ONCE]
    assert caplog.messages == [f"PyTorch's own conv_transpose2d runs: {r}" for r in reasons]
    assert list(dict.fromkeys(events)) == [f"PyTorch's own operator runs: {r}" for r in reasons]


@pytest.mark.parametrize("at_once", [False, True])
def test_the_flag_forbids_gradients_by_pytorch_too(
    recorded: tuple[Tensor, list[Tensor]], at_once: bool
) -> None:
    output, leaves = recorded
    named = many(output) if at_once else {"grad_outputs": torch.ones_like(output)}
    reason = AT_ONCE if at_once else "input is on cpu, and cuDNN runs on CUDA devices"
    with dgrad.flags(fallback="error"):
        for leaf in leaves:
            with pytest.raises(dgrad.NotSupportedError) as caught:
                torch.autograd.grad(output, leaf, **named, retain_graph=True)
            assert str(caught.value) == reason + FORBIDDEN
    expected = torch.autograd.grad(F.conv_transpose2d(*leaves), leaves, **named)
    for found, wanted in zip(torch.autograd.grad(output, leaves, **named), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_gradient_of_a_tensor_with_a_tangent_has_one(
    recorded: tuple[Tensor, list[Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    output, leaves = recorded
    with caplog.at_level(logging.INFO, logger="dgrad"), forward_ad.dual_level():
        given = forward_ad.make_dual(torch.ones_like(output), torch.full_like(output, 2.0))
        for found in torch.autograd.grad(output, leaves, given):
            value, tangent = forward_ad.unpack_dual(found)
            torch.testing.assert_close(tangent, 2 * value)
    assert caplog.messages == ["PyTorch's own conv_transpose2d runs: forward-mode AD is at work"]


def test_a_layers_own_flag_holds_in_the_transforms_of_torch_func_too() -> None:
    xs = torch.stack([X, -X])
    run = torch.func.vmap(
        lambda x: convolution("dgrad", x, W, PLAIN, (5, 5), dgrad.Flags(fallback="error"))
    )
    with pytest.raises(dgrad.NotSupportedError, match=AT_ONCE):
        run(xs)


@pytest.mark.parametrize("direction", ["dgrad", "fprop"])
def test_a_gradient_taken_while_cudnn_is_off_is_refused_or_logged(
    direction: str, caplog: pytest.LogCaptureFixture
) -> None:
    with FakeTensorMode():  # CUDA tensors that need no GPU
        a, b = (torch.empty(1, 4, 5, 5, device="cuda"), torch.empty(4, 4, 3, 3, device="cuda"))
        size = (7, 7) if direction == "dgrad" else (3, 3)
        torch.backends.cudnn.enabled = False
        with dgrad.flags(fallback="error"), pytest.raises(dgrad.NotSupportedError) as caught:
            convolution(direction, a, b, PLAIN, size)
        assert str(caught.value) == "torch.backends.cudnn.enabled is False" + FORBIDDEN
        with caplog.at_level(logging.INFO, logger="dgrad"):
            assert convolution(direction, a, b, PLAIN, size).shape == (1, 4, *size)
    assert "torch.backends.cudnn.enabled is False" in caplog.text


def test_nothing_is_logged_while_pytorch_exports(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    monkeypatch.setattr(_compiled, "_is_exporting", lambda: True)
    with caplog.at_level(logging.INFO, logger="dgrad"), watching() as events:
        dgrad.conv_transpose2d(X, W)
    assert (caplog.messages, events) == ([], [])
    with dgrad.flags(fallback="error"), pytest.raises(dgrad.NotSupportedError, match="exporting"):
        dgrad.conv_transpose2d(X, W)
