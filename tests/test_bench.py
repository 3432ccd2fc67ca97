"""The rule for equal outputs, and the clock, of dgrad.bench."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import dgrad
from dgrad.bench import host
from dgrad.bench._outputs import gradient_differences, judge
from dgrad.bench._share import share
from dgrad.bench.timing import Timing, measure


@pytest.mark.parametrize(
    ("dtype", "within", "beyond"),
    [
        (torch.float32, 1e-5, 1e-3),
        (torch.float64, 1e-5, 1e-3),
        (torch.float16, 5e-3, 5e-2),
        (torch.bfloat16, 5e-3, 5e-2),
    ],
)
def test_the_tolerance_follows_the_dtype(dtype: torch.dtype, within: float, beyond: float) -> None:
    zeros = torch.zeros(3, dtype=dtype)
    assert judge(zeros, zeros + within).equal
    assert not judge(zeros, zeros + beyond).equal
    assert judge(zeros, zeros + beyond).max_abs_diff == pytest.approx(beyond, rel=1e-2)


def test_nan_and_infinity_at_equal_places_are_equal() -> None:
    values = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0])
    verdict = judge(values, values.clone())
    assert verdict.equal
    assert verdict.max_abs_diff == 0
    assert judge(values, values.nan_to_num()).max_abs_diff == float("inf")


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (torch.zeros(2, 2), "shape"),
        (torch.zeros(2, dtype=torch.float64), "torch.float64 from dgrad"),
        ((torch.zeros(2),), "tuple from dgrad"),
    ],
)
def test_another_shape_dtype_or_type_is_a_difference(other: object, words: str) -> None:
    (difference,) = judge(torch.zeros(2), other).differences
    assert words in difference


def test_nests_are_compared_part_by_part() -> None:
    a = {"x": [torch.zeros(2), 1.0], "y": None}
    assert judge(a, {"x": [torch.zeros(2), 1.0], "y": None}).equal
    (difference,) = judge(a, {"x": [torch.ones(2), 1.0], "y": None}).differences
    assert difference.startswith("output['x'][0]: largest absolute difference 1")
    assert not judge(a, {"x": [torch.zeros(2)], "y": None}).equal
    assert not judge(a, {"x": [torch.zeros(2), 2.0], "y": None}).equal
    with pytest.raises(TypeError, match="output is a object"):
        judge(object(), object())


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (torch.Tensor.to_sparse, r"\['y'\] is a tensor of layout torch.sparse_coo"),
        (torch.Tensor.to_mkldnn, r"\['y'\] is a tensor of layout torch._mkldnn"),
        (lambda y: torch.nested.as_nested_tensor([y], layout=torch.jagged), "a nested tensor"),
    ],
)
def test_tensors_that_are_not_dense_are_not_compared(turn: Any, words: str) -> None:
    dense = torch.ones(2, 2)
    for a, b in ((turn(dense), turn(dense)), (dense, turn(dense))):
        with pytest.raises(TypeError, match=f"{words}: expected a dense tensor, a number, or"):
            judge({"y": a}, {"y": b})


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("batch", [1, 3])
def test_large_outputs_are_compared_in_pieces(
    monkeypatch: pytest.MonkeyPatch, batch: int, layout: torch.memory_format
) -> None:
    monkeypatch.setattr("dgrad.bench._outputs._PIECE", 7)
    a = torch.zeros(batch, 2, 5, 3).contiguous(memory_format=layout)
    for last in ((0, 0, 0, 0), (batch - 1, 1, 4, 2), (0, 1, 3, 1)):
        b = a.clone()
        assert judge(a, b).equal
        b[last] = 0.5
        assert judge(a, b).max_abs_diff == 0.5
        assert not judge(a, b).equal


@pytest.mark.parametrize("written", [False, True])
def test_the_hosts_times_are_printed_and_written_where_asked(
    written: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    times = {"dgrad_us": 9.0, "pytorch_us": 10.0, "ratio": 0.9}
    case = {"layer": "tiny", "bias": False, "call": "function", **times}
    monkeypatch.setattr(host, "_cases", lambda: [case])
    monkeypatch.setattr(dgrad, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    file = tmp_path / "host.json"
    assert host.main(["--out", str(file)] if written else []) == 0
    assert "dgrad    9.0 us, PyTorch   10.0 us, ratio 0.90" in capsys.readouterr().out
    assert file.exists() is written
    if written:
        assert json.loads(file.read_text())["cases"] == [case]


def test_a_timing_sums_its_samples_up() -> None:
    timing = Timing.from_samples([4.0, 1.0, 2.0, 3.0, 100.0])
    assert timing == Timing(median_ms=3.0, q1_ms=2.0, q3_ms=4.0, min_ms=1.0, runs=5)
    assert Timing.from_samples([2.0]) == Timing(2.0, 2.0, 2.0, 2.0, 1)
    with pytest.raises(ValueError, match="samples_ms is empty"):
        Timing.from_samples([])


def test_measuring_warms_up_and_runs_at_least_three_times() -> None:
    calls: list[int] = []
    timing = measure(lambda: calls.append(0), torch.device("cpu"), budget_s=1e-12)
    assert timing.runs == 3
    assert len(calls) > 5
    assert timing.min_ms <= timing.q1_ms <= timing.median_ms <= timing.q3_ms


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measuring_on_a_gpu_counts_the_device_time() -> None:
    x = torch.rand(4096, 4096, device="cuda")
    timing = measure(lambda: x @ x, torch.device("cuda"), budget_s=0.1)
    # 137 GFLOP: no GPU needs less than 0.01 ms, and the launch alone would
    assert 0.01 < timing.min_ms <= timing.median_ms


@pytest.fixture
def pretended_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time passes in ``time.sleep`` alone."""
    now = [0.0]
    monkeypatch.setattr(time, "sleep", lambda seconds: now.append(now[-1] + seconds))
    monkeypatch.setattr(time, "perf_counter", lambda: now[-1])


class Waiting(torch.nn.Module):
    """Takes some milliseconds outside of its transposed convolutions, and some in one of them."""

    def __init__(self, outside_s: float, inside_s: float) -> None:
        super().__init__()
        self.layer = torch.nn.ConvTranspose2d(1, 1, 1)
        self._outside_s, self._inside_s = outside_s, inside_s
        self.layer.forward = self._wait  # type: ignore[method-assign]

    def _wait(self, input: torch.Tensor, output_size: list[int] | None = None) -> torch.Tensor:
        time.sleep(self._inside_s)
        return input

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        time.sleep(self._outside_s)
        output: torch.Tensor = self.layer(self.layer(input))
        return output


@pytest.mark.usefixtures("pretended_clock")
@pytest.mark.parametrize(
    ("outside_s", "inside_s", "expected"), [(0.06, 0.01, 0.25), (0.0, 0.02, 1.0), (0.05, 0.0, 0.0)]
)
def test_the_share_of_the_layers(outside_s: float, inside_s: float, expected: float) -> None:
    model = Waiting(outside_s, inside_s)
    found = share(model, lambda: model(torch.zeros(1)), torch.device("cpu"))
    assert found == pytest.approx(expected)
    assert not model.layer._forward_hooks


@pytest.mark.usefixtures("pretended_clock")
def test_nested_layers_are_counted_once() -> None:
    class Nested(torch.nn.ConvTranspose2d):
        def __init__(self) -> None:
            super().__init__(1, 1, 1)
            self.inner = Waiting(0.0, 0.02).layer

        def forward(self, input: torch.Tensor, output_size: list[int] | None = None) -> Any:
            time.sleep(0.02)
            return self.inner(input)

    model = torch.nn.Sequential(Nested())
    found = share(model, lambda: model(torch.zeros(1)), torch.device("cpu"))
    assert found == pytest.approx(1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda g: g, None),
        (lambda g: -g, "2 apart"),
        (lambda g: g * 0, "1 apart"),
        (lambda g: g * 10, "9 apart"),
        (lambda g: g * float("nan"), "nan apart"),
    ],
)
def test_wrong_gradients_are_told(dtype: torch.dtype, change: Any, told: str | None) -> None:
    torch.manual_seed(0)
    reference = {"weight": torch.randn(8, 8), "bias": torch.randn(8), "zero": torch.zeros(8)}
    reference = {name: gradient.to(dtype) for name, gradient in reference.items()}
    assert gradient_differences(reference, dict(reference)) == []
    rounding = reference["zero"] + 1e-10
    found = gradient_differences(
        reference, {**reference, "bias": change(reference["bias"]), "zero": rounding}
    )
    if told is None:
        assert found == []
    else:
        (words,) = found
        assert words.startswith(f"gradient of bias: {told}")


def test_gradients_that_tell_nothing_or_lack_are_differences() -> None:
    one, none = {"w": torch.ones(2)}, {"w": torch.zeros(2)}
    assert gradient_differences(one, {}) == ["gradient of w: only one of the models has one"]
    assert gradient_differences({}, {}) == []
    (words,) = gradient_differences(none, one)
    assert "nothing to compare" in words


def test_numbers_are_equal_by_the_same_rule() -> None:
    assert judge([0.5, 1j], [0.50000006, 1j + 1e-6]).equal
    assert not judge(0.5, 0.501).equal
    assert judge(float("nan"), float("nan")).equal
    assert not judge(1, 2).equal
    assert not judge(True, False).equal
