"""The results of candidates are held against each other: precision passes, a wrong one does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad import config
from dgrad._check import Check
from dgrad._runner import Runner
from dgrad.exceptions import TorchOutOfMemoryError
from fake_cudnn import (
    FakeCore,
    FakeEngine,
    FakeProblem,
    Start,
    W,
    X,
    Y,
    fake_times,
    names,
)

DTYPES = ("float16", "bfloat16", "float32", "float64")


def check_of(result: Tensor, dtype: str, tf32: bool = False) -> Check:
    return Check(result, FakeProblem(dtype=dtype, tf32=tf32))  # type: ignore[arg-type]


def values(dtype: str) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 16, 16, dtype=torch.float64).to(getattr(torch, dtype))


def disturbed(tensor: Tensor, relative: float) -> Tensor:
    """Another tensor so far away, as a relative norm."""
    noise = torch.randn_like(tensor, dtype=torch.float64)
    noise *= relative * torch.linalg.vector_norm(tensor.double()) / torch.linalg.vector_norm(noise)
    return (tensor.double() + noise).to(tensor.dtype)


# What right algorithms differ by at most (Note [Imprecise]), and what a wrong one differs by.
RIGHT = {"float16": 1e-3, "bfloat16": 8e-3, "float32": 1e-6, "float64": 1e-13}


@pytest.mark.parametrize("dtype", DTYPES)
def test_precision_passes_and_a_wrong_result_does_not(dtype: str) -> None:
    first = values(dtype)
    result = first.clone()
    check = check_of(result, dtype)
    check()
    for _ in range(3):
        result.copy_(disturbed(first, RIGHT[dtype]))
        check()
    for wrong in (0.2, 1.0, 55.0):
        result.copy_(disturbed(first, wrong))
        with pytest.raises(ValueError, match="not that of the first candidate"):
            check()
    result.copy_(first)
    check()


def test_tf32_passes_where_it_is_allowed_alone() -> None:
    first = values("float32")
    for tf32 in (True, False):
        result = first.clone()
        check = check_of(result, "float32", tf32)
        check()
        result.copy_(disturbed(first, 5e-3))
        if tf32:
            check()
        else:
            with pytest.raises(ValueError, match="not that of the first candidate"):
                check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_that_is_none_is_noticed_where_the_first_has_numbers(
    dtype: str, value: float
) -> None:
    result = values(dtype)
    check = check_of(result, dtype)
    check()
    result[1, 2, 3, 4] = value
    with pytest.raises(ValueError, match="not that of the first candidate"):
        check()


def test_where_the_first_is_not_finite_nothing_is_checked() -> None:
    result = values("float32")
    result[0, 0, 0, 0] = float("nan")
    check = check_of(result, "float32")
    check()
    result.zero_()
    check()


def test_a_result_of_zeros_is_equal_to_itself_alone() -> None:
    result = torch.zeros(2, 3)
    check = check_of(result, "float32")
    check()
    check()
    result[0, 0] = 1e-3
    with pytest.raises(ValueError, match="not that of the first candidate"):
        check()


def test_large_numbers_of_a_half_type_do_not_overflow_the_check() -> None:
    result = torch.full((64, 64), 6e4, dtype=torch.float16)
    check = check_of(result, "float16")
    check()
    check()
    result.neg_()
    with pytest.raises(ValueError, match="not that of the first candidate"):
        check()


def test_what_overflows_in_one_engine_alone_is_no_fault() -> None:
    result = torch.full((64, 64), 6.4e4, dtype=torch.float16)
    check = check_of(result, "float16")
    check()
    result[0, 0] = float("inf")
    check()
    result[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not that of the first candidate"):
        check()


def test_what_underflows_in_one_engine_alone_is_no_fault() -> None:
    result = torch.zeros((64, 64), dtype=torch.float16)
    check = check_of(result, "float16")
    check()
    result.fill_(3e-5)
    check()
    result.fill_(1e-3)
    with pytest.raises(ValueError, match="not that of the first candidate"):
        check()


def test_without_memory_for_a_copy_nothing_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Any:
        raise TorchOutOfMemoryError("CUDA out of memory")

    for owner, name in ((torch.Tensor, "clone"), (torch.linalg, "vector_norm")):
        result = values("float32")
        check = check_of(result, "float32")
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, full)
            check()
            check()
        check()  # another result in the first one's place would be no measure
        result.zero_()
        check()


def test_what_a_candidate_leaves_unwritten_is_noticed() -> None:
    result = values("float32")
    check = check_of(result, "float32")
    right = result.clone()
    check()
    check.spoil()
    result[:1].copy_(right[:1])
    with pytest.raises(ValueError, match="not that of the first candidate: nan apart"):
        check()
    check.drop()
    check()


# --- in a runner --------------------------------------------------------------------------------


def writing(core: FakeCore, result: Tensor, written: dict[str, Tensor]) -> None:
    """Let each plan write its tensor."""

    def on_run(name: str, x: int, bias: int) -> None:
        result.copy_(written[name])

    core.on_run = on_run


@pytest.mark.parametrize("direction", ["dgrad", "fprop", "wgrad"])
def test_a_wrong_engine_does_not_run_though_it_is_the_fastest(
    start: Start, monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    core = start(convolution=[FakeEngine(f"eng{i}") for i in range(3)])
    fake_times(core, monkeypatch, {f"convolution:eng{i}": 3.0 - i for i in range(3)})
    x, w, y = X.clone(), W.clone(), Y.clone()
    result = {"dgrad": x, "fprop": y, "wgrad": w}[direction]
    right = torch.randn_like(result)
    wrong = right.clone().flatten()
    wrong[-1] += 10
    ways = {"convolution:eng0": right, "convolution:eng1": right * (1 + 1e-6)}
    writing(core, result, ways | {"convolution:eng2": wrong.view_as(result)})
    policy = config.policy(dgrad.Flags(selection="measure"))
    Runner(FakeProblem(direction), policy).run(x, w, y)  # type: ignore[arg-type]
    assert names(core) == ["convolution:eng1"]
    assert torch.equal(result, right * (1 + 1e-6))
    ((selection, _),) = dgrad.selections()
    reasons = [candidate.rejected for candidate in selection.candidates]
    assert reasons[:2] == [None, None]
    assert str(reasons[2]).startswith("its result is not that of the first candidate")


def test_an_engine_that_leaves_its_result_unwritten_does_not_run(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(convolution=[FakeEngine("eng1"), FakeEngine("eng2")])
    fake_times(core, monkeypatch, {"convolution:eng1": 2.0, "convolution:eng2": 1.0})
    x, right = X.clone(), torch.randn_like(X)

    def on_run(name: str, x_address: int, bias: int) -> None:
        if name == "convolution:eng1":
            x.copy_(right)  # and the other one finds it there

    core.on_run = on_run
    policy = config.policy(dgrad.Flags(selection="measure"))
    Runner(FakeProblem(), policy).run(x, W, Y)  # type: ignore[arg-type]
    assert names(core) == ["convolution:eng1"]


def test_what_is_timed_later_is_held_against_the_first_candidate_too(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong engine that a smaller limit had left out does not become its own measure."""
    core = start(convolution=[FakeEngine("eng1"), FakeEngine("eng2", workspace_bytes=4096)])
    right = torch.randn_like(X)
    writing(core, X, {"convolution:eng1": right, "convolution:eng2": right * 3})
    fake_times(core, monkeypatch, {"convolution:eng1": 2.0, "convolution:eng2": 1.0})
    for limit in (0, None):
        policy = config.policy(dgrad.Flags(selection="measure", workspace_limit=limit))
        Runner(FakeProblem(), policy).run(X, W, Y)  # type: ignore[arg-type]
    assert names(core)[-1] == "convolution:eng1"
    assert not torch.equal(X, right * 3)
