"""Streams, graphs, threads, devices and repeated calls."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad import _loader
from fallbacks import run_python
from gpu_cases import UPSAMPLING, check, forward
from gpu_layers import held_bytes
from reference import arguments, assert_close, expected, pytorch, results

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("strict_and_never_pytorch")]


# --- streams ------------------------------------------------------------------------------------


def test_work_goes_to_the_current_stream() -> None:
    """The input gets its value late on this stream; who runs elsewhere reads the old one."""
    given = arguments(UPSAMPLING)
    value = given.input.detach().clone()
    results(dgrad.conv_transpose2d, UPSAMPLING, given)
    wanted = expected(UPSAMPLING, given)
    stream = torch.cuda.Stream()
    with torch.no_grad():
        given.input.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        forward(UPSAMPLING, given)  # its memory is this stream's from now on
        torch.cuda._sleep(2_000_000_000)  # about 1 s
        with torch.no_grad():
            given.input.copy_(value)
        output = forward(UPSAMPLING, given)
        assert not stream.query(), "the sleep was too short to tell"
    stream.synchronize()
    assert_close(output, wanted["output"], UPSAMPLING.tolerance, "output on a side stream")


def test_streams_in_turn_and_their_gradients() -> None:
    streams = [torch.cuda.Stream() for _ in range(3)]
    for round_ in range(3):
        for index, stream in enumerate(streams):
            case = replace(UPSAMPLING, seed=10 * round_ + index)
            given = arguments(case)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found = results(dgrad.conv_transpose2d, case, given)
            torch.cuda.current_stream().wait_stream(stream)
            check(case, given, found)


def warm_up(work: Callable[[], Any]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_captured_graph_replays_with_new_values(layout: str, precision: str) -> None:
    case = replace(UPSAMPLING, precision=precision, layout=layout, weight_layout=layout)
    given = arguments(case)
    with dgrad.flags(allow_tf32=precision == "tf32"):
        warm_up(lambda: forward(case, given))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = forward(case, given)
    for seed in (1, 2):
        new = arguments(replace(case, seed=seed))
        with torch.no_grad():
            given.input.copy_(new.input)
            given.weight.copy_(new.weight)
            output.fill_(float("nan"))
        # Other work may not disturb the graph's workspace.
        torch.full((1 << 22,), float("nan"), device="cuda")
        graph.replay()
        wanted = expected(case, replace(new, bias=given.bias))
        assert_close(output, wanted["output"], case.tolerance, f"replay of {case}")


def test_a_captured_training_step_replays() -> None:
    given = arguments(UPSAMPLING)

    def step() -> list[Tensor]:
        return list(results(dgrad.conv_transpose2d, UPSAMPLING, given).values())

    warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    new = arguments(replace(UPSAMPLING, seed=1))
    with torch.no_grad():
        given.input.copy_(new.input)
        given.grad_output.copy_(new.grad_output)
        for tensor in found:
            tensor.fill_(float("nan"))
    graph.replay()
    wanted = expected(UPSAMPLING, given)
    for actual, name in zip(found, wanted, strict=True):
        assert_close(actual, wanted[name], UPSAMPLING.tolerance, f"replayed {name}")


# --- threads ------------------------------------------------------------------------------------


def at_once(works: Sequence[Callable[[], None]]) -> None:
    """Run each in a thread of its own, all released together; the first failure is raised."""
    barrier = threading.Barrier(len(works))
    failures: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            barrier.wait(60)
            work()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize("own_streams", [False, True])
@pytest.mark.parametrize("same_shapes", [True, False])
def test_eight_threads_at_once(same_shapes: bool, own_streams: bool) -> None:
    def work_of(index: int) -> Callable[[], None]:
        case = replace(UPSAMPLING, seed=index)
        if not same_shapes:
            case = replace(case, size=(8 + index, 12), c_out=8 * (index + 1))
        given = arguments(case)
        wanted = expected(case, given)
        torch.cuda.synchronize()

        def work() -> None:
            stream = torch.cuda.Stream() if own_streams else torch.cuda.current_stream()
            for _ in range(10):
                with torch.cuda.stream(stream):
                    found = results(dgrad.conv_transpose2d, case, given)
                stream.synchronize()
                for name, actual in found.items():
                    assert_close(actual, wanted[name], case.tolerance, f"{name} of {case}")

        return work

    dgrad.plan_cache.clear()
    at_once([work_of(index) for index in range(8)])


@pytest.mark.seconds(60)
def test_threads_while_the_cache_is_cleared_and_shrunk() -> None:
    stop = threading.Event()
    given = [arguments(replace(UPSAMPLING, size=(5 + i, 6))) for i in range(4)]
    wanted = [forward(UPSAMPLING, one) for one in given]

    def disturb() -> None:
        while not stop.wait(0.001):
            dgrad.plan_cache.max_size = 1
            dgrad.plan_cache.clear()
            dgrad.plan_cache.max_size = 1024

    def work(index: int) -> None:
        for _ in range(100):
            torch.testing.assert_close(
                forward(UPSAMPLING, given[index]), wanted[index], rtol=1e-3, atol=1e-3
            )

    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        at_once([lambda i=i: work(i) for i in range(4)])  # type: ignore[misc]
    finally:
        stop.set()
        disturber.join()


# --- devices ------------------------------------------------------------------------------------

two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@two_devices
def test_the_tensors_device_need_not_be_the_current_one() -> None:
    torch.cuda.set_device(0)
    given = arguments(UPSAMPLING, "cuda:1")
    before = held_bytes(0)
    found = results(dgrad.conv_transpose2d, UPSAMPLING, given)
    assert torch.cuda.current_device() == 0
    assert held_bytes(0) == before
    assert all(tensor.device == torch.device("cuda:1") for tensor in found.values())
    check(UPSAMPLING, given, found)


@two_devices
def test_two_devices_in_turn_and_at_once() -> None:
    def work_on(device: str) -> Callable[[], None]:
        def work() -> None:
            for seed in range(5):
                case = replace(UPSAMPLING, seed=seed)
                given = arguments(case, device)
                check(case, given, results(dgrad.conv_transpose2d, case, given))

        return work

    for device in ("cuda:0", "cuda:1", "cuda:0"):
        work_on(device)()
    at_once([work_on(f"cuda:{index % 2}") for index in range(4)])


@two_devices
def test_tensors_on_two_devices_are_refused() -> None:
    x, w = torch.randn(1, 2, 3, 3, device="cuda:0"), torch.randn(2, 2, 3, 3, device="cuda:1")
    with pytest.raises(RuntimeError, match="weight is on cuda:1"):
        dgrad.conv_transpose2d(x, w)


# --- repeated calls -----------------------------------------------------------------------------


def test_a_repeated_call_asks_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments(UPSAMPLING)
    first = results(dgrad.conv_transpose2d, UPSAMPLING, given)
    forward(UPSAMPLING, given)
    cache = dgrad.plan_cache
    hits, misses = cache.hits, cache.misses

    def refuse() -> None:
        raise AssertionError("a repeated call makes descriptors or asks cuDNN something")

    monkeypatch.setattr(_loader, "require", refuse)
    forward(UPSAMPLING, given)
    assert cache.hits > hits
    again = results(dgrad.conv_transpose2d, UPSAMPLING, given)
    assert cache.misses == misses
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, first[name], rtol=1e-4, atol=1e-3)
    with pytest.raises(AssertionError, match="makes descriptors"):
        forward(UPSAMPLING, arguments(replace(UPSAMPLING, size=(13, 12))))


def test_the_same_shape_at_other_addresses_is_a_hit() -> None:
    forward(UPSAMPLING, arguments(UPSAMPLING))
    misses = dgrad.plan_cache.misses
    for seed in range(1, 4):
        case = replace(UPSAMPLING, seed=seed)
        given = arguments(case)
        check(case, given, {"output": forward(case, given)})
    assert dgrad.plan_cache.misses == misses


def test_a_call_between_pytorchs_own_calls_changes_neither() -> None:
    """Both use cuDNN on the same stream, each with a handle of its own."""
    given = arguments(UPSAMPLING)
    with torch.no_grad():
        theirs = pytorch(given.input, given.weight, given.bias, **UPSAMPLING.options)
        for _ in range(3):
            ours = forward(UPSAMPLING, given)
            again = pytorch(given.input, given.weight, given.bias, **UPSAMPLING.options)
            assert torch.equal(theirs, again)
    check(UPSAMPLING, given, {"output": ours})


@pytest.mark.parametrize(
    ("provider", "function"),
    [("graph", "cudnnBackendExecute"), ("legacy", "cudnnConvolutionBackwardData")],
)
def test_a_repeated_call_asks_cudnn_for_the_convolution_alone(provider: str, function: str) -> None:
    # By cuDNN's own log. Outputs take turns at two addresses.
    code = f"""
        import sys, torch, dgrad
        x, w = (torch.randn(8, 8, 4, 4, device="cuda") for _ in "xw")
        with torch.no_grad(), dgrad.flags(algorithm={provider!r}):
            for part in ("first", "later"):
                print(part, file=sys.stderr, flush=True)
                for _ in range(4):
                    y = dgrad.conv_transpose2d(x, w, stride=2)
            print("end", file=sys.stderr, flush=True)
    """
    ran = run_python(code, CUDNN_LOGLEVEL_DBG="3", CUDNN_LOGDEST_DBG="stderr")
    assert ran.returncode == 0, ran.stderr
    _, first, later, _ = re.split(r"^(?:first|later|end)$", ran.stderr, flags=re.MULTILINE)
    called = re.findall(r"function (cudnn\w+)\(\) called", later)
    assert f"function {function}() called" in first
    assert called.count("cudnnSetStream") == 4  # one a call
    assert called.count(function) in (4, 8)  # the backend's is named again by what it calls
    # What ends so writes the log.
    others = [name for name in called if not name.endswith("Visualize")]
    assert not [name for name in others if re.search("Create|Get|Finalize", name)], called
