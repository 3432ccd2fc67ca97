"""The native module on the real libcudnn, as far as that goes without a device."""

from __future__ import annotations

import copy
import ctypes
import pickle
import re
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import dgrad
from core_problem import core, problem
from dgrad import _loader, exceptions


def resident_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("/proc/self/status is needed to read the memory in use")
    found = re.search(r"VmRSS:\s+(\d+) kB", status.read_text())
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_descriptors_of_all_types_leak_nothing(dtype: str, layout: str) -> None:
    assert core is not None
    made = problem(dtype=dtype, layout=layout)
    for _ in range(2_000):
        core.legacy_forward_output_size(made)
    before = resident_bytes()
    for _ in range(20_000):
        assert core.legacy_forward_output_size(made) == [2, 4, 5, 6]
    # One descriptor is more than 100 bytes, so 20,000 calls that lose one lose over 2 MB.
    assert resident_bytes() - before < 1_000_000


def test_a_problem_that_fails_leaks_nothing() -> None:
    def fail(times: int) -> None:
        for _ in range(times):
            with pytest.raises(ValueError, match="the size of the convolution"):
                problem(y=(2, 4, 5, 5))

    fail(1_000)
    before = resident_bytes()
    fail(10_000)
    assert resident_bytes() - before < 1_000_000


def test_descriptors_are_made_on_many_threads_at_once() -> None:
    assert core is not None
    results: list[list[int]] = []

    def work() -> None:
        for _ in range(500):
            results.append(core.legacy_forward_output_size(problem()))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[2, 4, 5, 6]] * 4000


without_device = pytest.mark.skipif(
    torch.cuda.is_available(), reason="there is a GPU, so the call succeeds"
)


# What a cuDNN graph of ours can compute; see Operation in src/graph/operation_graph.hpp.
OPERATIONS = ("convolution", "convolution_identity", "convolution_bias", "bias", "bias_rows")


def calls_that_need_a_device(made: Any) -> list[Callable[[], object]]:
    assert core is not None
    algorithm = core.legacy_algorithms(made.direction)[0]
    calls: list[Callable[[], object]] = [
        partial(core.legacy_heuristic, made),
        partial(core.legacy_plan, made, algorithm, "DEFAULT_MATH"),
    ]
    for operation in OPERATIONS if made.bias else OPERATIONS[:2]:
        calls.append(partial(core.graph_heuristic, made, operation))
        calls.append(partial(core.graph_plan, made, operation, "eng5_k2=3_k24=0"))
    return calls


@without_device
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("direction", ["dgrad", "dgrad+bias", "fprop", "wgrad"])
def test_a_call_that_needs_a_device_says_that_there_is_none(
    direction: str, dtype: str, layout: str
) -> None:
    name, _, bias = direction.partition("+")
    made = problem(direction=name, bias=bool(bias), dtype=dtype, layout=layout)
    for call in calls_that_need_a_device(made):
        with pytest.raises(dgrad.CudnnNotInitializedError) as caught:
            call()
        error = caught.value
        assert error.status == 1001
        assert error.call == "cudnnCreate"
        assert error.detail
        assert str(error) == (
            f"cudnnCreate returned 1001 CUDNN_STATUS_NOT_INITIALIZED: {error.detail}"
        )
        assert isinstance(error, dgrad.CudnnError)
        assert isinstance(error, RuntimeError)


@without_device
@pytest.mark.parametrize("operation", [None, *OPERATIONS])
def test_a_failing_call_can_be_made_again_and_leaks_nothing(operation: str | None) -> None:
    assert core is not None
    made = problem(bias=True)
    plan = (
        partial(core.legacy_plan, made, "ALGO_0", "DEFAULT_MATH")
        if operation is None
        else partial(core.graph_plan, made, operation, "eng5_k2=3_k24=0")
    )

    def fail(times: int) -> None:
        for _ in range(times):
            with pytest.raises(dgrad.CudnnNotInitializedError):
                plan()

    fail(200)
    before = resident_bytes()
    fail(2_000)
    assert resident_bytes() - before < 1_000_000
    assert core.legacy_forward_output_size(made) == [2, 4, 5, 6]


def test_the_text_of_another_ones_failure_is_no_reason_of_ours() -> None:
    """cuDNN keeps it until it is read; PyTorch, for example, does not read it."""
    assert core is not None
    cudnn, descriptor = ctypes.CDLL(_loader.cudnn_path()), ctypes.c_void_p()
    assert cudnn.cudnnCreateTensorDescriptor(ctypes.byref(descriptor)) == 0
    assert cudnn.cudnnSetTensor4dDescriptor(descriptor, 0, 0, -1, 1, 1, 1) != 0
    core.legacy_forward_output_size(problem())
    text = ctypes.create_string_buffer(2048)
    cudnn.cudnnGetLastErrorString(text, len(text))
    assert text.value == b""
    assert cudnn.cudnnDestroyTensorDescriptor(descriptor) == 0


def test_an_unknown_algorithm_or_math_type_lists_the_known_ones() -> None:
    assert core is not None
    with pytest.raises(ValueError, match=r"algorithm is 'ALGO_9', expected one of ALGO_0, ALGO_1"):
        core.legacy_plan(problem(), "ALGO_9", "DEFAULT_MATH")
    with pytest.raises(ValueError, match=r"math_type is 'FAST', expected one of .*FMA_MATH"):
        core.legacy_plan(problem(), "ALGO_0", "FAST")
    with pytest.raises(ValueError, match=r"direction is 'up', expected one of dgrad"):
        core.legacy_algorithms("up")


def test_an_unknown_operation_lists_the_known_ones() -> None:
    assert core is not None
    words = f"^operation is 'pooling', expected one of {', '.join(OPERATIONS)}$"
    with pytest.raises(ValueError, match=words):
        core.graph_heuristic(problem(), "pooling")
    with pytest.raises(ValueError, match=words):
        core.graph_plan(problem(), "pooling", "eng5")


WRONG_ENGINES = (
    "", "5", "eng", "ENG5", "eng 5", " eng5", "eng5 ", "eng+5", "eng5_", "eng5_k2", "eng5_k2=",
    "eng5_k=3", "eng5_k2=3=4", "eng5k2=3", "eng5_k2=3_", "eng5,k2=3", "eng5\0", "eng5+identity",
    f"eng{2**63}", f"eng5_k{2**63}=0", f"eng5_k{2**32 + 2}=7", f"eng5_k2={2**63}", "eng\u0665",
    "eng5_k3=0_k2=1", "eng5_k2=0_k2=1",
)  # fmt: skip


@pytest.mark.parametrize("engine", WRONG_ENGINES, ids=ascii)
def test_a_wrong_engine_is_named_once_there_is_a_device(engine: str) -> None:
    assert core is not None
    expected: type[Exception] = dgrad.CudnnNotInitializedError  # the handle is made before
    words = "cudnnCreate returned 1001"
    if torch.cuda.is_available():
        expected = ValueError
        words = re.escape(f"engine is '{engine}', expected a name such as 'eng5_k2=3_k24=0'")
    with pytest.raises(expected, match=f"^{words}"):
        core.graph_plan(problem(), "convolution", engine)


# The enums of cuDNN's documentation (cudnn_cnn: cudnnConvolutionBwdDataAlgo_t and so on).
ALGORITHMS = {
    "dgrad": ["ALGO_0", "ALGO_1", "FFT", "FFT_TILING", "WINOGRAD", "WINOGRAD_NONFUSED"],
    "fprop": [
        "IMPLICIT_GEMM", "IMPLICIT_PRECOMP_GEMM", "GEMM", "DIRECT",
        "FFT", "FFT_TILING", "WINOGRAD", "WINOGRAD_NONFUSED",
    ],
    "wgrad": ["ALGO_0", "ALGO_1", "FFT", "ALGO_3", "WINOGRAD", "WINOGRAD_NONFUSED", "FFT_TILING"],
}  # fmt: skip


@pytest.mark.parametrize("direction", ALGORITHMS)
def test_the_algorithms_have_cudnns_names_in_cudnns_order(direction: str) -> None:
    assert core is not None
    assert core.legacy_algorithms(direction) == ALGORITHMS[direction]


# The documented statuses: category * 1000 + n.
STATUSES = [
    (1001, "CUDNN_STATUS_NOT_INITIALIZED", dgrad.CudnnNotInitializedError),
    (2000, "CUDNN_STATUS_BAD_PARAM", dgrad.CudnnBadParameterError),
    (2002, "CUDNN_STATUS_BAD_PARAM_NULL_POINTER", dgrad.CudnnBadParameterError),
    (3000, "CUDNN_STATUS_NOT_SUPPORTED", dgrad.CudnnNotSupportedError),
    (3007, "CUDNN_STATUS_NOT_SUPPORTED_ARCH_MISMATCH", dgrad.CudnnNotSupportedError),
    (4000, "CUDNN_STATUS_INTERNAL_ERROR", dgrad.CudnnInternalError),
    (5000, "CUDNN_STATUS_EXECUTION_FAILED", dgrad.CudnnExecutionError),
]


@pytest.mark.parametrize(("status", "name", "expected"), STATUSES, ids=lambda value: str(value))
def test_a_status_has_cudnns_name_and_the_class_of_its_category(
    status: int, name: str, expected: type[dgrad.CudnnError]
) -> None:
    assert core is not None
    assert core.status_name(status) == name
    error = exceptions.cudnn_error(status, "text", "call", "detail")
    assert type(error) is expected
    assert (str(error), error.status, error.call, error.detail) == (
        "text", status, "call", "detail",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (1999, dgrad.CudnnNotInitializedError),
        (3999, dgrad.CudnnNotSupportedError),
        (9001, dgrad.CudnnError),
        (7, dgrad.CudnnError),
        (-1, dgrad.CudnnError),
        (2**31 - 1, dgrad.CudnnError),
    ],
)
def test_an_unknown_status_is_shown_and_not_hidden(
    status: int, expected: type[dgrad.CudnnError]
) -> None:
    assert core is not None
    assert core.status_name(status)
    error = exceptions.cudnn_error(status, f"call returned {status}", "call", "")
    assert type(error) is expected
    assert error.status == status


@pytest.mark.parametrize("copied", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_an_error_survives_pickling_and_copying(copied: Any) -> None:
    for status in (1001, 3000, 9001):
        error = exceptions.cudnn_error(status, "some text", "cudnnFind", "the detail")
        other = copied(error)
        assert type(other) is type(error)
        assert str(other) == "some text"
        assert (other.status, other.call, other.detail) == (status, "cudnnFind", "the detail")


def test_the_versions_are_told_in_words() -> None:
    assert core is not None
    assert core.cudnn_version() // 10000 == 9
    assert _loader.cudnn_version() == _loader.format_version(core.cudnn_version())
    assert _loader.compiled_cudnn_version() == _loader.format_version(core.compiled_cudnn_version)
    assert _loader.format_version(91900) == "9.19.0"
    assert _loader.format_version(90100) == "9.1.0"
    assert _loader.format_version(8907) == "8.9.7"


def test_the_path_of_cudnn_is_the_file_that_is_mapped() -> None:
    path = _loader.cudnn_path()
    if path is None:
        pytest.skip("/proc/self/maps is needed to find the file")
    assert Path(path).name.startswith("libcudnn.so.9")
    assert Path(path).is_file()
