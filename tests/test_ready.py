"""The table of ready calls, without a GPU: what looks at it or at its keys breaks nothing."""

from __future__ import annotations

import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch

from dgrad import _loader
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
