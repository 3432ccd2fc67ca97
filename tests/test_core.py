"""The native module on the real libcudnn, as far as that goes without a device."""

from __future__ import annotations

import copy
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
from dgrad import _loader, exceptions

core, reason = _loader.load()
if core is None:
    pytest.skip(f"the native module cannot be used: {reason}", allow_module_level=True)

LARGEST = 2**31 - 1

# Every size is another number where it can be, so that swapped fields show.
BASE: dict[str, Any] = {
    "direction": "dgrad",
    "dtype": "float32",
    "tf32": False,
    "layout": "nchw",
    "x": (2, 6, 9, 11),
    "w": (4, 3, 3, 2),
    "y": (2, 4, 5, 6),
    "padding": (1, 1),
    "stride": (2, 2),
    "dilation": (1, 2),
    "groups": 2,
    "bias": False,
    "alignment": 16,
    "device": 0,
}


def problem(**changes: Any) -> Any:
    assert core is not None
    return core.Problem(**(BASE | changes))


# Each changes one field as far as it can be changed alone: sizes that hang together move together.
CHANGES: dict[str, dict[str, Any]] = {
    "direction fprop": {"direction": "fprop"},
    "direction wgrad": {"direction": "wgrad"},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float64": {"dtype": "float64"},
    "tf32": {"tf32": True},
    "layout": {"layout": "nhwc"},
    "batch": {"x": (3, 6, 9, 11), "y": (3, 4, 5, 6)},
    "channels of x": {"x": (2, 8, 9, 11), "w": (4, 4, 3, 2)},
    "channels of y": {"w": (8, 3, 3, 2), "y": (2, 8, 5, 6)},
    "height of x alone": {"x": (2, 6, 10, 11)},
    "width of x alone": {"x": (2, 6, 9, 12)},
    "height of y": {"x": (2, 6, 11, 11), "y": (2, 4, 6, 6)},
    "width of y": {"x": (2, 6, 9, 13), "y": (2, 4, 5, 7)},
    "kernel height alone": {"w": (4, 3, 2, 2)},
    "kernel width": {"w": (4, 3, 3, 1), "y": (2, 4, 5, 7)},
    "vertical padding": {"padding": (2, 1), "y": (2, 4, 6, 6)},
    "horizontal padding": {"padding": (1, 2), "y": (2, 4, 5, 7)},
    "vertical stride": {"stride": (3, 2), "y": (2, 4, 3, 6)},
    "horizontal stride": {"stride": (2, 3), "y": (2, 4, 5, 4)},
    "vertical dilation": {"dilation": (2, 2), "y": (2, 4, 4, 6)},
    "horizontal dilation alone": {"dilation": (1, 1)},
    "groups": {"groups": 1, "x": (2, 3, 9, 11)},
    "bias": {"bias": True},
    "alignment 8": {"alignment": 8},
    "alignment 1": {"alignment": 1},
    "device": {"device": 1},
}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_another_field_gives_another_key_and_another_text(changes: dict[str, Any]) -> None:
    one, other = problem(), problem(**changes)
    assert one != other
    assert hash(one) != hash(other)
    assert str(one) != str(other)
    assert len({one, other}) == 2
    for name, value in (BASE | changes).items():
        found = getattr(other, name)
        assert (tuple(found) if isinstance(found, list) else found) == value


def test_the_changes_cover_every_field() -> None:
    changed = set().union(*CHANGES.values())
    assert changed == set(BASE)
    properties = {name for name in dir(problem()) if not name.startswith("_")}
    assert properties == set(BASE), "a new field belongs into BASE and CHANGES"


def test_all_these_problems_differ_from_each_other() -> None:
    problems = [problem(), *(problem(**changes) for changes in CHANGES.values())]
    assert len(set(problems)) == len(problems)
    assert len({hash(one) for one in problems}) == len(problems)
    assert len({str(one) for one in problems}) == len(problems)


def test_equal_problems_are_one_key_and_one_text() -> None:
    one, other = problem(), problem()
    assert one is not other
    assert one == other
    assert hash(one) == hash(other)
    assert str(one) == str(other)
    assert {one: "found"}[other] == "found"


@pytest.mark.parametrize("other", [None, 0, "text", BASE, str(BASE)])
def test_a_problem_equals_nothing_else(other: object) -> None:
    assert problem() != other
    assert str(problem()) != other


def test_the_text_says_every_value() -> None:
    text = str(problem())
    for part in (
        "dgrad float32/ieee nchw",
        "x=2x6x9x11",
        "w=4x3x3x2",
        "y=2x4x5x6",
        "padding=1,1",
        "stride=2,2",
        "dilation=1,2",
        "groups=2",
        "alignment=16",
        "device=0",
    ):
        assert part in text
    assert "float32/tf32" in str(problem(tf32=True))
    assert str(problem(bias=True)) == text.replace("dgrad ", "dgrad+bias ", 1)
    assert text in repr(problem())


def test_the_same_sizes_by_dilation_and_by_output_padding_are_two_keys() -> None:
    # h=2, k=2, s=2, out=5: other caches without dilation in the key confuse these two.
    common = {
        "x": (1, 1, 5, 5), "w": (1, 1, 2, 2), "y": (1, 1, 2, 2),
        "padding": (0, 0), "stride": (2, 2), "groups": 1,
    }  # fmt: skip
    with_output_padding = problem(**common, dilation=(1, 1))
    with_dilation = problem(**common, dilation=(2, 2))
    assert with_output_padding != with_dilation
    assert hash(with_output_padding) != hash(with_dilation)
    x, w = torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    first = dgrad.conv_transpose2d(x, w, stride=2, output_padding=1)
    second = dgrad.conv_transpose2d(x, w, stride=2, dilation=2)
    assert first.shape == second.shape == (1, 1, 5, 5)
    assert not torch.equal(first, second)


NO_BIAS = r"bias is true, expected false, as direction is not dgrad$"
INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "direction": ({"direction": "up"}, r"direction is 'up', expected one of dgrad, fprop, wgrad"),
    "dtype": ({"dtype": "int8"}, r"dtype is 'int8', expected one of float16, bfloat16, float32"),
    "layout": ({"layout": "chwn"}, r"layout is 'chwn', expected one of nchw, nhwc"),
    "tf32": ({"tf32": True, "dtype": "float16"}, r"tf32 is true, expected false"),
    "x has a zero": ({"x": (2, 6, 0, 11)}, r"x is 2x6x0x11, expected each from 1"),
    "w is negative": ({"w": (4, 3, -3, 2)}, r"w is 4x3x-3x2, expected each from 1"),
    "y has a zero": ({"y": (0, 4, 5, 6)}, r"y is 0x4x5x6, expected each from 1"),
    "padding": ({"padding": (-1, 1)}, r"padding is -1x1, expected each from 0"),
    "stride": ({"stride": (2, 0)}, r"stride is 2x0, expected each from 1"),
    "dilation": ({"dilation": (0, 2)}, r"dilation is 0x2, expected each from 1"),
    "groups zero": ({"groups": 0}, r"groups is 0, expected a divisor"),
    "groups negative": ({"groups": -2}, r"groups is -2, expected a divisor"),
    "groups no divisor": ({"groups": 3}, r"groups is 3, expected a divisor"),
    "channels of w": ({"w": (4, 6, 3, 2)}, r"w is 4x6x3x2, expected .*channels of x / groups"),
    "filters of w": ({"w": (2, 3, 3, 2)}, r"w is 2x3x3x2, expected .*channels of y"),
    "batch": ({"y": (3, 4, 5, 6)}, r"y is 3x4x5x6, expected the batch size of x"),
    "size of y": ({"y": (2, 4, 5, 5)}, r"y is 2x4x5x5, expected the size of the convolution"),
    "kernel too large": ({"w": (4, 3, 12, 2)}, r"y is 2x4x5x6, expected the size of the conv"),
    "bias of fprop": ({"bias": True, "direction": "fprop"}, NO_BIAS),
    "bias of wgrad": ({"bias": True, "direction": "wgrad"}, NO_BIAS),
    "alignment zero": ({"alignment": 0}, r"alignment is 0, expected 1, 2, 4, 8 or 16"),
    "alignment odd": ({"alignment": 3}, r"alignment is 3, expected 1, 2, 4, 8 or 16"),
    "alignment 32": ({"alignment": 32}, r"alignment is 32, expected 1, 2, 4, 8 or 16"),
    "device": ({"device": -1}, r"device is -1, expected 0 or more"),
}


@pytest.mark.parametrize(("changes", "words"), INVALID.values(), ids=INVALID.keys())
def test_an_invalid_field_is_named_with_its_value(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{words}"):
        problem(**changes)


@pytest.mark.parametrize("field", ["padding", "stride", "dilation", "x", "w", "y"])
@pytest.mark.parametrize("value", [2**31, 2**32, 2**62, 2**63 - 1])
def test_what_does_not_fit_in_32_bits_is_refused(field: str, value: int) -> None:
    # 2^32 + a valid number would be valid again if it were cut to 32 bits.
    sizes = (*BASE[field][:-1], value)
    with pytest.raises(ValueError, match=rf"^{field} is .*{value}, expected"):
        problem(**{field: sizes})


@pytest.mark.parametrize("value", [2**63, 2**64, 2**100])
def test_what_does_not_fit_in_64_bits_is_refused(value: int) -> None:
    with pytest.raises(TypeError):
        problem(groups=value)


@pytest.mark.parametrize("field", BASE)
def test_every_field_must_be_given(field: str) -> None:
    assert core is not None
    with pytest.raises(TypeError):
        core.Problem(**{name: value for name, value in BASE.items() if name != field})


@pytest.mark.parametrize("value", ["yes", "", [True], {}])
def test_a_bias_that_is_no_bool_is_refused(value: object) -> None:
    with pytest.raises(TypeError):
        problem(bias=value)


def large(x: tuple[int, ...], channels: int = 1) -> dict[str, Any]:
    return {
        "x": x, "w": (channels, x[1], 1, 1), "y": (x[0], channels, *x[2:]),
        "padding": (0, 0), "stride": (1, 1), "dilation": (1, 1), "groups": 1,
    }  # fmt: skip


def test_a_tensor_of_all_elements_that_32_bits_count_is_accepted() -> None:
    assert core is not None
    accepted = problem(**large((1, 1, 1, LARGEST)))
    assert core.legacy_forward_output_size(accepted) == [1, 1, 1, LARGEST]


@pytest.mark.parametrize(
    "x", [(1, 1, 2, 2**30), (2**16, 2**16, 1, 1), (LARGEST, LARGEST, LARGEST, LARGEST)]
)
def test_more_elements_than_32_bits_count_are_refused(x: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^x is .*at most {LARGEST} elements.*32-bit"):
        problem(**large(x))


def test_the_largest_numbers_do_not_overflow_the_arithmetic() -> None:
    kernel = {"x": (1, 1, 1, 1), "w": (1, 1, LARGEST, 1), "y": (1, 1, 1, 1), "groups": 1}
    with pytest.raises(ValueError, match=r"^y is 1x1x1x1, expected the size"):
        problem(**kernel, dilation=(LARGEST, 1), padding=(LARGEST, 0), stride=(LARGEST, 1))


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
    f"eng{2**63}", f"eng5_k{2**63}=0", f"eng5_k2={2**63}", "eng\u0665",
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
        error = exceptions.cudnn_error(status, "some text", "cudnnCreate", "the detail")
        other = copied(error)
        assert type(other) is type(error)
        assert str(other) == "some text"
        assert (other.status, other.call, other.detail) == (status, "cudnnCreate", "the detail")


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
