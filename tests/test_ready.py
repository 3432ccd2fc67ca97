"""The table of ready calls, without a GPU: what looks at it or at its keys breaks nothing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad import _loader, config, functional
from dgrad._geometry import Geometry
from dgrad._ready import ready_calls

EXCHANGE = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
pytestmark = pytest.mark.skipif(
    EXCHANGE is None or _loader.load()[0] is None, reason="PyTorch has no table of DLPack's calls"
)

# A profiler, a debugger or another thread may walk all objects while a key is made.
WALK = """
import gc, sys, torch
from dgrad._ready import ready_calls
if not torch.cuda.is_available():
    torch._C._cuda_getDevice = lambda: 0  # a build without CUDA has none
calls = ready_calls(torch.Tensor.__dlpack_c_exchange_api__)
x = torch.zeros(2, 4, 5, 6)
seen = []
def walk(*event):
    seen.extend(len([*each]) for each in gc.get_objects() if type(each) is tuple)
sys.setprofile(walk)
assert calls.call(x, x, None, (1, 0, 0, 1, 1), None) is None
sys.setprofile(None)
assert seen
"""


def test_who_walks_the_collectors_objects_meets_no_half_made_key() -> None:
    done = subprocess.run([sys.executable, "-c", WALK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_what_is_no_ready_call_is_refused_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    calls, x = ready_calls(EXCHANGE), torch.zeros(2, 4, 5, 6)
    for wrong in (None, Mock(spec=_loader.require().ReadyCall)):
        with pytest.raises((TypeError, RuntimeError)):
            calls.put(x, x, None, (1,), wrong)
        assert calls.size == 0
        assert calls.run(x, x, None, (1,)) is None


def turned_there_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As another thread may do while the first call measures."""
    real = config.deciding
    dgrad.set_flags(deterministic=True)

    def deciding(*arguments: Any) -> config.Deciding:
        monkeypatch.setattr(config, "deciding", real)
        dgrad.set_flags(deterministic=False)
        decided = real(*arguments)
        dgrad.set_flags(deterministic=True)
        return decided

    monkeypatch.setattr(config, "deciding", deciding)


def cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    real = functional.convolution

    def convolution(*arguments: Any) -> Tensor:
        dgrad.plan_cache.clear()
        return real(*arguments)

    monkeypatch.setattr(functional, "convolution", convolution)


@pytest.mark.usefixtures("restored_flags")
@pytest.mark.parametrize(
    ("meanwhile", "kept"), [(None, 1), (turned_there_and_back, 0), (cleared, 0)]
)
def test_a_call_is_kept_for_native_code_as_it_was_chosen_or_not_at_all(
    meanwhile: Callable[[pytest.MonkeyPatch], None] | None,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.nn.functional.conv_transpose2d(x, w, bias)

    call: Any = run
    call.ready = lambda made: "ready"
    geometry = Geometry((0, 0), (1, 1), (1, 1), 1)
    prepared = functional._Prepared(call, None, geometry, (6, 6), (0, 0))
    calls: list[Any] = []
    monkeypatch.setattr(functional, "_prepare", lambda *_: prepared)
    monkeypatch.setattr(functional, "convolution", lambda *given: run(given[1], given[2]))
    monkeypatch.setattr(dgrad.plan_cache, "exchange", object())
    monkeypatch.setattr(dgrad.plan_cache, "ready", None)
    monkeypatch.setattr(dgrad.plan_cache, "keep_ready", lambda *given: calls.append(given))
    dgrad.plan_cache.clear()
    if meanwhile is not None:
        meanwhile(monkeypatch)
    dgrad.conv_transpose2d(torch.randn(1, 2, 4, 4), torch.randn(2, 2, 3, 3))
    assert len(calls) == kept
