"""Known calls that native code runs alone: never another answer than the long way gives."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import dgrad
from gpu_cases import room_for
from gpu_ready import NATIVE, tensors, used

pytestmark = NATIVE


def assert_right(output: Tensor, *arguments: Any, **options: Any) -> None:
    wanted = F.conv_transpose2d(
        *(a.double() if isinstance(a, Tensor) else a for a in arguments), **options
    )
    tolerance = {torch.float16: 2e-2, torch.bfloat16: 5e-2}.get(output.dtype, 5e-3)
    torch.testing.assert_close(output.double(), wanted, rtol=tolerance, atol=tolerance)
    assert output.stride() == F.conv_transpose2d(*arguments, **options).stride()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("selection", ["heuristic", "measure"])
def test_a_repeated_call_runs_in_native_code_with_the_same_result(
    selection: str, dtype: torch.dtype, layout: torch.memory_format, bias: bool
) -> None:
    x, w, b = tensors(dtype=dtype)
    x, w = (t.to(memory_format=layout) for t in (x, w))
    b = b if bias else None  # type: ignore[assignment]
    # float64 runs contiguous only, as in PyTorch: others are copied, and not by native code.
    native = int(dtype != torch.float64 or layout == torch.contiguous_format)
    with dgrad.flags(selection=selection):
        first = dgrad.conv_transpose2d(x, w, b, 2, 1)
        results: list[Tensor] = []
        assert used(lambda: results.append(dgrad.conv_transpose2d(x, w, b, 2, 1))) == native
        assert_right(first, x, w, b, stride=2, padding=1)
        assert_right(results[0], x, w, b, stride=2, padding=1)
        # Other values at other addresses, the same call.
        x2, w2, b2 = tensors(dtype=dtype)
        x2, w2 = (t.to(memory_format=layout) for t in (x2, w2))
        b2 = b2 if bias else None  # type: ignore[assignment]
        assert used(lambda: results.append(dgrad.conv_transpose2d(x2, w2, b2, 2, 1))) == native
        assert_right(results[1], x2, w2, b2, stride=2, padding=1)


CHANGES: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "stride": lambda x, w, b: ((x, w, b), {"stride": 3}),
    "padding": lambda x, w, b: ((x, w, b), {"stride": 2, "padding": 1}),
    "output padding": lambda x, w, b: ((x, w, b), {"stride": 2, "output_padding": 1}),
    "dilation": lambda x, w, b: ((x, w, b), {"stride": 2, "dilation": 2}),
    "pair": lambda x, w, b: ((x, w, b), {"stride": (2, 1)}),
    "no bias": lambda x, w, b: ((x, w, None), {"stride": 2}),
    "batch": lambda x, w, b: ((x[:1], w, b), {"stride": 2}),
    "unbatched": lambda x, w, b: ((x[0], w, b), {"stride": 2}),
    "height": lambda x, w, b: ((x[:, :, :8].contiguous(), w, b), {"stride": 2}),
    "strides": lambda x, w, b: ((x.transpose(2, 3), w, b), {"stride": 2}),
    "layout": lambda x, w, b: ((x.to(memory_format=torch.channels_last), w, b), {"stride": 2}),
    "kernel": lambda x, w, b: ((x, w[..., :2].contiguous(), b), {"stride": 2}),
    "weight's strides": lambda x, w, b: ((x, w.transpose(2, 3), b), {"stride": 2}),
    "expanded bias": lambda x, w, b: ((x, w, b[:1].expand(6)), {"stride": 2}),
    "negative view": lambda x, w, b: ((torch.complex(x, x).conj().imag, w, b), {"stride": 2}),
    "negative view at an aligned address": lambda x, w, b: (
        (torch.complex(x, x).conj().imag.as_strided(x.shape, x.stride(), 0), w, b),
        {"stride": 2},
    ),
    "negative weight": lambda x, w, b: (
        (x, torch.complex(w, w).conj().imag.as_strided(w.shape, w.stride(), 0), b),
        {"stride": 2},
    ),
    "negative bias": lambda x, w, b: (
        (x, w, torch.complex(b, b).conj().imag.as_strided(b.shape, b.stride(), 0)),
        {"stride": 2},
    ),
    "view of an imaginary part": lambda x, w, b: ((torch.complex(x, x).imag, w, b), {"stride": 2}),
    "dtype": lambda x, w, b: (tuple(t.half() for t in (x, w, b)), {"stride": 2}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_that_differs_in_anything_is_not_taken_for_a_known_one(change: str) -> None:
    x, w, b = tensors()
    dgrad.conv_transpose2d(x, w, b, 2)
    arguments, options = CHANGES[change](x, w, b)
    results: list[Tensor] = []
    with dgrad.flags(fallback="pytorch"):  # other flags alone would be another call
        dgrad.conv_transpose2d(x, w, b, 2)
        assert used(lambda: dgrad.conv_transpose2d(x, w, b, 2)) == 1
        assert used(lambda: results.append(dgrad.conv_transpose2d(*arguments, **options))) == 0
    plain = tuple(None if a is None else a.resolve_neg() for a in arguments)
    assert_right(results[0], *plain, **options)


def test_a_misaligned_view_is_another_call() -> None:
    x, w, b = tensors()
    flat = torch.cat([x.flatten(), x.flatten()[:1]])
    dgrad.conv_transpose2d(x, w, b)
    shifted = flat[1:].view(x.shape)
    results: list[Tensor] = []
    assert used(lambda: results.append(dgrad.conv_transpose2d(shifted, w, b))) == 0
    assert_right(results[0], shifted, w, b)


def test_what_is_equal_but_of_another_type_is_told_apart() -> None:
    x, w, b = tensors()
    for _ in range(2):
        dgrad.conv_transpose2d(x, w, b, 1)
        dgrad.conv_transpose2d(x, w, b, (1, 1))
    for wrong in (1.0, (1.0, 1)):
        with pytest.raises(TypeError):
            dgrad.conv_transpose2d(x, w, b, wrong)  # type: ignore[arg-type]


def test_a_stride_of_nested_tuples_is_refused_however_deep() -> None:
    x, w, _ = tensors()
    dgrad.conv_transpose2d(x, w, stride=2)
    stride: Any = 2
    for _ in range(400_000):  # more than the stack has room for
        stride = (stride,)
    with pytest.raises((TypeError, RuntimeError), match="stride"):
        dgrad.conv_transpose2d(x, w, stride=stride)


def test_flags_and_switches_are_part_of_the_call() -> None:
    x, w, _ = tensors((4, 64, 32, 32), (64, 64, 3, 3))
    exact = F.conv_transpose2d(x.double(), w.double())

    def error() -> float:
        found = [dgrad.conv_transpose2d(x, w) for _ in range(3)][-1]
        return float((found - exact).norm() / exact.norm())

    with dgrad.flags(allow_tf32=True, algorithm={"dgrad": "legacy:ALGO_1"}):
        assert error() > 1e-5
    with dgrad.flags(allow_tf32=False):
        assert error() < 1e-5
    layer = dgrad.Flags(allow_tf32=False)
    assert float((dgrad.conv_transpose2d(x, w, flags=layer) - exact).norm() / exact.norm()) < 1e-5
    torch.backends.cudnn.enabled = False
    with pytest.raises(dgrad.NotSupportedError, match="enabled is False"):
        dgrad.conv_transpose2d(x, w)
    torch.backends.cudnn.enabled = True
    torch.backends.cudnn.deterministic = True
    assert used(lambda: dgrad.conv_transpose2d(x, w)) == 0


def test_a_bias_that_pytorch_adds_follows_its_changes() -> None:
    x, w, b = tensors()
    with dgrad.flags(selection="heuristic"):
        dgrad.conv_transpose2d(x, w, b)
        assert dgrad.selections()[0][0].candidate.bias == "add"
        for _ in range(3):
            b.mul_(2)
            assert_right(dgrad.conv_transpose2d(x, w, b), x, w, b)
            b = torch.randn_like(b)
            assert_right(dgrad.conv_transpose2d(x, w, b), x, w, b)
        layer = torch.nn.Parameter(b)
        dgrad.conv_transpose2d(x, w, layer)
        layer.data = torch.randn_like(b)
        with torch.no_grad():
            assert_right(dgrad.conv_transpose2d(x, w, layer), x, w, layer)


def test_uses_and_hits_are_counted() -> None:
    x, w, b = tensors()
    for _ in range(5):
        dgrad.conv_transpose2d(x, w, b)
    ((_, uses),) = dgrad.selections()
    assert uses == 5
    assert dgrad.plan_cache.hits >= 4
    dgrad.plan_cache.clear()
    assert (dgrad.plan_cache.hits, dgrad.plan_cache.misses) == (0, 0)


def test_a_profiler_sees_each_call_and_what_was_selected() -> None:
    x, w, _ = (t.requires_grad_() for t in tensors())

    def step() -> None:
        y = dgrad.conv_transpose2d(x, w)
        torch.autograd.grad(y, (x, w), torch.ones_like(y))

    step()
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step()
    ranges = sorted(e.name for e in profile.events() if e.name.startswith("dgrad::"))
    chosen = sorted(f"dgrad::{s.problem.direction} {s.candidate}" for s, _ in dgrad.selections())
    assert ranges == chosen
    assert len(ranges) == 3


def test_threads_and_streams_have_their_own() -> None:
    x, w, b = tensors((4, 8, 33, 33))
    wanted = F.conv_transpose2d(x.double(), w.double(), b.double())
    torch.cuda.synchronize()
    failures: list[str] = []

    def work() -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(200):
                y = dgrad.conv_transpose2d(x, w, b)
            stream.synchronize()
        error = float((y - wanted).norm() / wanted.norm())
        if not error < 5e-3:
            failures.append(f"error {error}")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for number in range(20):
        if number % 5 == 4:
            dgrad.plan_cache.clear()
        dgrad.conv_transpose2d(x, w, b)
    for thread in threads:
        thread.join()
    assert not failures


def test_the_cache_bounds_the_native_calls_too() -> None:
    dgrad.plan_cache.max_size = 4
    w = torch.randn(4, 4, 2, 2, device="cuda")
    for n in range(1, 20):
        x = torch.randn(n, 4, 3, 3, device="cuda")
        for _ in range(2):
            dgrad.conv_transpose2d(x, w)
        assert dgrad.plan_cache.ready is not None
        assert dgrad.plan_cache.ready.size <= 4
    dgrad.plan_cache.clear()
    assert dgrad.plan_cache.ready.size == 0


def test_what_native_code_runs_is_not_forgotten_first() -> None:
    dgrad.plan_cache.clear()
    dgrad.plan_cache.max_size = 4
    w = torch.randn(4, 4, 2, 2, device="cuda")
    first, *others = (torch.randn(n, 4, 3, 3, device="cuda") for n in range(1, 20))
    dgrad.conv_transpose2d(first, w)
    for x in others:
        before = dgrad.plan_cache.misses
        dgrad.conv_transpose2d(first, w)
        assert dgrad.plan_cache.misses == before
        dgrad.conv_transpose2d(x, w)


def test_out_of_memory_is_the_same_error_as_the_long_way() -> None:
    x, w, b = tensors((64, 16, 128, 128), (16, 16, 2, 2))
    dgrad.conv_transpose2d(x, w, b, 2)
    with room_for(8 << 20), pytest.raises(torch.cuda.OutOfMemoryError):
        dgrad.conv_transpose2d(x, w, b, 2)
    assert_right(dgrad.conv_transpose2d(x, w, b, 2), x, w, b, stride=2)


def test_inference_mode_and_capture() -> None:
    x, w, b = tensors()
    wanted = dgrad.conv_transpose2d(x, w, b)
    with torch.inference_mode():
        assert used(lambda: dgrad.conv_transpose2d(x, w, b)) == 1
        assert dgrad.conv_transpose2d(x, w, b).is_inference()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        y = dgrad.conv_transpose2d(x, w, b)
    y.zero_()
    graph.replay()
    torch.testing.assert_close(y, wanted)


@pytest.mark.parametrize("kind", [list, torch.Size])
def test_a_list_is_looked_up_as_a_tuple_is(kind: Callable[[Any], Any]) -> None:
    x, w, b = tensors()
    first = dgrad.conv_transpose2d(x, w, b, kind((2, 2)), kind((1, 1)), kind((1, 1)))
    again: list[Tensor] = []
    given = ((2, 2), (1, 1), (1, 1))
    assert used(lambda: again.append(dgrad.conv_transpose2d(x, w, b, *map(kind, given)))) == 1
    for each in again:  # ALGO_0 adds up in any order
        torch.testing.assert_close(each, first)
    assert_right(first, x, w, b, stride=2, padding=1, output_padding=1)


def traced(call: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    return torch.jit.trace(call, x, check_trace=False)


def differentiated(call: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with forward_ad.dual_level():
        return call(forward_ad.make_dual(x, x))


class Dispatching(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
        return function(*args, **(kw or {}))


def dispatched(call: Callable[[Tensor], Tensor], x: Tensor) -> Any:
    with Dispatching():
        return call(x)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit")
@pytest.mark.parametrize("way", [traced, torch.vmap, differentiated, dispatched, dgrad.explain])
def test_what_must_see_a_known_call_sees_it(way: Callable[..., Any]) -> None:
    x, w, _ = tensors()

    def call(x: Tensor) -> Tensor:
        return dgrad.conv_transpose2d(x, w)

    def seen() -> None:
        if way is torch.vmap:
            torch.vmap(call)(torch.stack([x, x]))
        else:
            way(call, x)

    with dgrad.flags(fallback="pytorch"):
        call(x)
        assert used(lambda: call(x)) == 1
        assert used(seen) == 0


def test_numbers_of_another_kind_inside_a_tuple_are_known_too() -> None:
    two = pytest.importorskip("numpy").int64(2)
    layer = dgrad.ConvTranspose2d(8, 6, 3, stride=two, padding=(two, 1), device="cuda")
    x, _, _ = tensors()
    results: list[Tensor] = []
    with torch.no_grad():
        layer(x)
        assert used(lambda: results.append(layer(x))) == 1
        assert_right(results[0], x, layer.weight, layer.bias, stride=2, padding=(2, 1))
