"""Processes that end, and the command compare: started at once, because each takes seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.gpu


_USE = """
import gc, threading
import torch, dgrad

def use(device="cuda"):
    layer = dgrad.ConvTranspose2d(8, 8, 3, stride=2, device=device)
    with dgrad.flags(fallback="error"):
        y = layer(torch.randn(2, 8, 9, 9, device=device, requires_grad=True))
        y.square().sum().backward()
    assert layer.weight.grad.isfinite().all()
    return layer, y
"""
_ENDINGS = {
    "after use in the main thread": "use()",
    "after import alone": "",
    "with layer, output and graph kept in globals": "kept = use(); more = dgrad.plan_cache",
    "after del and gc": "kept = use(); del kept; gc.collect(); dgrad.plan_cache.clear()",
    "after a thread that ended": """
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()
        """,
    "with a daemon thread that is still alive": """
        used = threading.Event()

        def work():
            kept = use()
            used.set()
            threading.Event().wait()

        threading.Thread(target=work, daemon=True).start()
        assert used.wait(150)
        """,
    "with PyTorch's cuDNN used before and after": """
        x, w = torch.randn(2, 8, 9, 9, device="cuda"), torch.randn(8, 8, 3, 3, device="cuda")
        torch.nn.functional.conv_transpose2d(x, w)
        kept = use()
        torch.nn.functional.conv2d(x, w)
        """,
    "with work still queued": """
        layer = dgrad.ConvTranspose2d(64, 64, 3, device="cuda")
        x = torch.randn(8, 64, 256, 256, device="cuda")
        for _ in range(20):
            y = layer(x)
        """,
    "with plans in a cache of its own": """
        from dgrad import _call, planner
        import dgrad.functional
        use()
        kept = dict(dgrad.plan_cache._entries)
        import sys
        sys.kept = kept
        """,
    "by an exception that is caught at the top": """
        kept = use()
        import sys
        sys.exit(0)
        """,
}
# In float32 the outputs are PyTorch's whatever is chosen; tf32 errs by more than compare allows.
_MODEL = """
import torch

torch.backends.cudnn.allow_tf32 = False

class Model(torch.nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.up = torch.nn.ConvTranspose2d(channels, 8, 4, stride=2, padding=1)

    def forward(self, x):
        return self.up(x)

def get_inputs():
    return [torch.rand(2, 8, 32, 32)]

def get_init_inputs():
    return [8]
"""


class Processes:
    """Python processes that find the packages that this one finds."""

    def __init__(self) -> None:
        self._running: dict[str, subprocess.Popen[str]] = {}

    def start(self, name: str, *words: str) -> None:
        self._running[name] = subprocess.Popen(
            [sys.executable, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                "DGRAD_STORE": "off",
            },
            text=True,
        )

    def finish(self, name: str) -> tuple[int, str, str]:
        process = self._running[name]
        out, err = process.communicate(timeout=180)
        return process.returncode, out, err

    def end(self) -> None:
        for process in self._running.values():
            process.kill()
            process.communicate()


@pytest.fixture(scope="module")
def processes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Processes]:
    wanted = {item.name for item in request.session.items}  # a part runs some of them alone
    started = Processes()
    for name, ending in _ENDINGS.items():
        if f"{test_the_process_ends_cleanly.__name__}[{name}]" in wanted:
            started.start(name, "-c", _USE + textwrap.dedent(ending))
    if test_compare_runs_on_the_gpu.__name__ in wanted:
        model = tmp_path_factory.mktemp("compare") / "model.py"
        model.write_text(_MODEL)
        started.start("compare", "-m", "dgrad", "compare", str(model), "--json", "--budget", "0.2")
    yield started
    started.end()


@pytest.mark.processes
@pytest.mark.seconds(3)
@pytest.mark.parametrize("ending", _ENDINGS)
def test_the_process_ends_cleanly(ending: str, processes: Processes) -> None:
    code, out, err = processes.finish(ending)
    assert (code, out, err) == (0, "", "")


@pytest.mark.processes
@pytest.mark.seconds(8)
def test_compare_runs_on_the_gpu(processes: Processes) -> None:
    code, out, err = processes.finish("compare")
    assert code == 0, err
    told: dict[str, Any] = json.loads(out)
    assert told["equal"] is True
    assert told["max_abs_diff"] <= 1e-4
    for name in ("pytorch_ms", "pytorch_benchmark_ms", "dgrad_ms", "ratio"):
        assert told[name] > 0
    best_ms = min(told["pytorch_ms"], told["pytorch_benchmark_ms"])
    assert told["ratio"] == pytest.approx(best_ms / told["dgrad_ms"])
    assert any("graph:" in line or "legacy:" in line for line in told["selected"])
