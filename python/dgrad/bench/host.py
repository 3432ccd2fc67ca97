"""What a call costs the host, against PyTorch's own: `python -m dgrad.bench.host [--out FILE]`.

Both run in one process, in alternating rounds. The problems are so small, or the rounds so short,
that the GPU keeps up: what is timed is the time until the call returns. With several threads, each
on a stream of its own, it is the time of a round until the GPU has finished, by all its calls.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import dgrad
from dgrad.bench import environment

# N, C_in, H, W, C_out, kernel, stride, padding: the smallest layer, and N = 1 layers of models.
LAYERS: dict[str, tuple[int, int, int, int, int, int, int, int]] = {
    "tiny": (1, 8, 4, 4, 8, 3, 2, 1),
    "dcgan/G1": (1, 100, 1, 1, 512, 4, 1, 0),
    "dcgan/G4": (1, 128, 16, 16, 64, 4, 2, 1),
    "pix2pix/up5": (1, 1024, 8, 8, 512, 4, 2, 1),
    "unet/up4": (1, 128, 64, 64, 64, 2, 2, 0),
    "vitpose/deconv1": (1, 768, 16, 12, 256, 4, 2, 1),
}
_CALLS = 100  # of one round; few enough for the queue of the GPU
_ROUNDS = 10
_THREADS = 8

Round = Callable[[Callable[[], object]], list[float]]
Kind = tuple[str, list[partial[Any]], bool, Round]  # dgrad's call and PyTorch's; with gradients?


def _round(call: Callable[[], object]) -> list[float]:
    """Microseconds of each of `_CALLS` calls in a row."""
    torch.cuda.synchronize()
    samples = []
    for _ in range(_CALLS):
        begin = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - begin) / 1e3)
    return samples


class _Threads:
    """Threads that call at once, each on a CUDA stream of its own."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_THREADS, initializer=self._begin)
        self._ready = threading.Barrier(_THREADS)

    def _begin(self) -> None:
        torch.cuda.set_stream(torch.cuda.Stream())

    def round(self, call: Callable[[], object]) -> list[float]:
        """Microseconds of a round by its calls."""
        torch.cuda.synchronize()
        begin = time.perf_counter_ns()
        for done in [self._pool.submit(self._calls, call) for _ in range(_THREADS)]:
            done.result()
        torch.cuda.synchronize()
        return [(time.perf_counter_ns() - begin) / 1e3 / (_THREADS * _CALLS)]

    def _calls(self, call: Callable[[], object]) -> None:
        self._ready.wait()  # no thread takes the work of two
        with torch.no_grad():
            for _ in range(_CALLS):
                call()


def compare_host(
    ours: Callable[[], object], theirs: Callable[[], object], round_: Round = _round
) -> dict[str, float]:
    """Median and 99th percentile of both calls in microseconds; the ratio is of the medians."""
    for call in (ours, theirs):
        round_(call)
    times: dict[str, list[float]] = {"dgrad": [], "pytorch": []}
    for _ in range(_ROUNDS):
        times["dgrad"] += round_(ours)
        times["pytorch"] += round_(theirs)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    return {
        **{f"{name}_us": value for name, value in medians.items()},
        **{
            f"{name}_p99_us": statistics.quantiles(samples, n=100, method="inclusive")[98]
            for name, samples in times.items()
        },
        "ratio": medians["dgrad"] / medians["pytorch"],
    }


def _step(module: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor) -> None:
    module.zero_grad()
    x.grad = None
    module(x).backward(grad)


def _cases() -> list[dict[str, Any]]:
    cases = []
    threads = _Threads()
    for name, (n, c_in, h, w, c_out, k, stride, padding) in LAYERS.items():
        for bias in (False, True):
            layer = torch.nn.ConvTranspose2d(
                c_in, c_out, k, stride, padding, bias=bias, device="cuda"
            )
            ours = dgrad.ConvTranspose2d(c_in, c_out, k, stride, padding, bias=bias, device="cuda")
            x = torch.randn(n, c_in, h, w, device="cuda")
            functions = [
                partial(call, x, layer.weight, layer.bias, stride, padding)
                for call in (dgrad.conv_transpose2d, F.conv_transpose2d)
            ]
            modules = [partial(module, x) for module in (ours, layer)]
            grad = torch.randn_like(layer(x))
            leaf = x.clone().requires_grad_()
            steps = [partial(_step, module, leaf, grad) for module in (ours, layer)]
            kinds: list[Kind] = [
                ("function", functions, False, _round),
                ("function, recording", functions, True, _round),
                ("module", modules, False, _round),
                ("module, recording", modules, True, _round),
                ("module, with backward", steps, True, _round),
                (f"function, {_THREADS} threads", functions, False, threads.round),
            ]
            if name == "tiny":  # the others' would tell no more, and compiling takes seconds
                compiled = [
                    partial(torch.compile(module, fullgraph=True), x) for module in (ours, layer)
                ]
                kinds.append(("module, compiled", compiled, False, _round))
            for kind, calls, recording, round_ in kinds:
                with torch.set_grad_enabled(recording):
                    result = compare_host(calls[0], calls[1], round_)
                cases.append({"layer": name, "bias": bias, "call": kind, **result})
    return cases


def _record(cases: list[dict[str, Any]]) -> dict[str, Any]:
    versions = environment.versions()
    versions.pop("cudnn_path")
    return {
        "meta": {
            "command": "python -m dgrad.bench.host",
            "device": torch.cuda.get_device_name(),
            "versions": versions,
        },
        "cases": cases,
        "summary": {"max_ratio": max(case["ratio"] for case in cases)},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Host time of a call against PyTorch's own.")
    parser.add_argument("--out", type=Path, help="a JSON file to write too")
    arguments = parser.parse_args(argv)
    if not dgrad.is_available():
        print(f"host: dgrad cannot run here: {dgrad.unavailable_reason()}", file=sys.stderr)
        return 3
    cases = _cases()
    for case in cases:
        print(
            f"{case['layer']:<16} {case['call']:<21} bias {case['bias']!s:<5} "
            f"dgrad {case['dgrad_us']:6.1f} us, PyTorch {case['pytorch_us']:6.1f} us, "
            f"ratio {case['ratio']:.2f}"
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(_record(cases), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
