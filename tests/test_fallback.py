"""What dgrad cannot run, PyTorch runs, and dgrad says so once."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import dgrad
from dgrad import _compiled, _loader, functional, log
from dgrad._autograd import convolution
from dgrad._geometry import Geometry
from dgrad._watch import watching

X = torch.linspace(-1, 1, 2 * 4 * 3 * 3).reshape(2, 4, 3, 3)
W = torch.linspace(-1, 1, 4 * 2 * 3 * 3).reshape(4, 2, 3, 3)
BIAS = torch.tensor([1.0, -2.0])


@pytest.fixture(autouse=True)
def nothing_said_yet() -> Iterator[None]:
    log._told.clear()
    dgrad.plan_cache.clear()
    yield
    log._told.clear()
    dgrad.plan_cache.clear()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
    )


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
    # The reason can be the table of a problem, so there may be one for each shape.
    for i in range(20_000):
        log.fallback(f"reason {i}")
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


# --- what PyTorch runs gives its results --------------------------------------------------------


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
