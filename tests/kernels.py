"""What the tests of kept kernels share: a cuDNN that compiles, and what is done with it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import dgrad
from dgrad import _loader, config
from dgrad._runner import Runner
from dgrad.exceptions import cudnn_error
from fake_cudnn import (
    FakeEngine,
    FakeResult,
    StoredCore,
    W,
    X,
    Y,
    compute,
    fake_times,
    names,
    real_problem,
)

_CORE, _REASON = _loader.load()
MARKS = [
    pytest.mark.skipif(_CORE is None, reason=str(_REASON)),
    pytest.mark.usefixtures("folder"),
]

PLAIN, FUSED, ROWS = "convolution:eng1", "convolution_bias:eng2", "bias_rows:eng3"
PASS = f"{PLAIN} + {ROWS}"
BIAS = torch.tensor([1.0, 2.0])
BIASED = None if _CORE is None else real_problem(x=(2, 2, 7, 9), w=(4, 2, 3, 3), bias=True)
REFUSED = cudnn_error(3000, "not supported", "cudnnBackendFinalize", "")


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> StoredCore:
    """A core that compiles for the engines which take a bias."""
    core = StoredCore(FakeResult("ALGO_1", "FMA_MATH"))
    core.engines = {
        "convolution": [FakeEngine("eng1", ["TENSOR_CORE"])],
        "convolution_bias": [FakeEngine("eng2", ["TENSOR_CORE"])],
        "bias_rows": [FakeEngine("eng3")],
    }
    core.compiling = {FUSED, ROWS}
    core.begin(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    compute(core, X)
    return core


def run(core: StoredCore) -> dgrad.Selection:
    """Run a biased problem as another process would."""
    dgrad.plan_cache.clear()
    core.planned.clear()
    core.restored.clear()
    core.ran.clear()
    X.zero_()
    Runner(BIASED, config.policy(dgrad.Flags(selection="measure"))).run(X, W, Y, BIAS)
    assert X[0, :, 0, 0].tolist() == pytest.approx([4.0, 5.0])
    (selection, *_), *_ = dgrad.selections()
    return selection


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kernels"))


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def choose(core: StoredCore, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let a plan be the fastest, and measure."""
    times: dict[str, float | None] = dict.fromkeys((PLAIN, "ALGO_1", FUSED, PASS), 2.0)
    times |= {PASS: 1.8, "ALGO_1": 1.9} if name.startswith("ALGO_1 ") else {}
    times[name] = 1.0
    fake_times(core, monkeypatch, times)
    run(core)
    assert names(core)[-1] == name
