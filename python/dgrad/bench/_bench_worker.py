"""One contestant of `bench` in a process of its own, see `_process.py`."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dgrad
from dgrad import config
from dgrad._layers import Layer
from dgrad._watch import watching
from dgrad.bench import environment
from dgrad.bench._clock import MAX_CALLS, Call, GraphClock, WallClock
from dgrad.bench._process import Answer, serve
from dgrad.bench.roofline import measure_ceilings, output_shape
from dgrad.bench.suite import Case

_SEED = 42
_CACHE_BYTES = 128 << 20  # twice an H200's, and no GPU's is larger


class Contestant:
    """PyTorch under one setting, or dgrad: holds one prepared case at a time.

    Args:
        setting: "torch", "torch-benchmark", "torch-compile" or "dgrad".
        device: "cuda" or "cpu".
        selection: dgrad's flag.
    """

    def __init__(self, setting: str, device: str, selection: str) -> None:
        self._setting, self._device = setting, torch.device(device)
        self._clock: GraphClock | WallClock | None = None
        self._training = False
        self._spoiled = False
        if setting in ("torch-benchmark", "torch-compile"):
            torch.backends.cudnn.benchmark = True
        if setting == "dgrad":
            on_gpu = self._device.type == "cuda"
            dgrad.set_flags(selection=selection, fallback="error" if on_gpu else "pytorch")
        if self._device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream())  # the default one cannot be captured
        gc.collect()
        gc.freeze()  # each capture collects garbage, and none of it is older than this

    def describe(self) -> Answer:
        """What runs here: the device's name, versions, and whether float32 may be tf32."""
        versions = environment.versions()
        versions.pop("cudnn_path")  # a path of this machine
        return {
            "device": environment.device_name(self._device),
            "driver": versions.pop("driver"),
            "versions": versions,
            "tf32": config.tf32_allowed(),
        }

    def ceilings(self, dtypes: list[str]) -> Answer:
        return measure_ceilings(self._device, dtypes, config.tf32_allowed())

    def prepare(self, case: Mapping[str, Any]) -> Answer:
        """Make the tensors, select, warm up and capture; says how the case will be timed."""
        layer = Case.from_dict(case).layer
        with watching() as events:
            calls = [self._first_call(case)]
        explanation = dgrad.Explanation(events)
        clock = GraphClock if self._device.type == "cuda" else WallClock
        with torch.set_grad_enabled(self._training):
            calls += [self._call(layer) for _ in range(1, self._copies(layer))]
            self._clock = clock(calls)
        self._spoiled = self._clock.problem is not None  # the allocator may wait for ever
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # the others need memory too
        return {
            "calls": self._clock.calls,
            "not_captured": self._clock.problem,
            "selected": [_selected(selection) for selection in explanation.selections],
        }

    def select(self, case: Mapping[str, Any]) -> Answer:
        """Call once, which leaves the selections in the store."""
        self._first_call(case)
        return {}

    def sample(self) -> Answer:
        assert self._clock is not None
        with torch.set_grad_enabled(self._training):
            return self._clock.sample()

    def release(self) -> Answer:
        """Forget the case. "spoiled" says that this process should run no other."""
        self._clock = None
        gc.collect()
        dgrad.plan_cache.clear()
        if self._setting == "torch-compile":
            torch._dynamo.reset()
        if self._device.type == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:  # after an illegal access nothing works any more
                self._spoiled = True
        return {"spoiled": self._spoiled}

    def _first_call(self, case: Mapping[str, Any]) -> Call:
        """The case's call, made once on tensors of its own."""
        self._training = case["direction"] == "training"
        with torch.set_grad_enabled(self._training):
            torch.manual_seed(_SEED)
            call = self._call(Case.from_dict(case).layer)
            call()
        return call

    def _call(self, layer: Layer) -> Call:
        """The forward pass, or with gradients the whole step, on tensors of standard normals."""
        x, w = (self._tensor(shape, layer) for shape in layer.shapes())
        bias = self._tensor((layer.out_channels,), layer) if layer.bias else None
        sources = [t.requires_grad_(self._training) for t in (x, w, bias) if t is not None]
        forward: Callable[[], Tensor] = partial(
            self._function(),
            x,
            w,
            bias,
            layer.stride,
            layer.padding,
            layer.output_padding,
            layer.groups,
            layer.dilation,
        )
        if not self._training:
            return forward
        grad_output = self._tensor(output_shape(layer), layer)

        def step() -> None:
            for source in sources:
                source.grad = None
            forward().backward(grad_output)

        return step

    def _copies(self, layer: Layer) -> int:
        """How many calls on tensors of their own push each other's out of the device's cache."""
        if self._device.type != "cuda":
            return 1
        elements = sum(map(math.prod, layer.shapes()))
        return min(MAX_CALLS, math.ceil(_CACHE_BYTES / (elements * layer.dtype.itemsize)))

    def _tensor(self, shape: tuple[int, ...], layer: Layer) -> Tensor:
        tensor = torch.randn(shape, dtype=layer.dtype, device=self._device)
        nhwc = layer.channels_last and tensor.dim() == 4
        return tensor.to(memory_format=torch.channels_last) if nhwc else tensor

    def _function(self) -> Callable[..., Tensor]:
        if self._setting == "dgrad":
            return dgrad.conv_transpose2d
        if self._setting == "torch-compile":
            # Sizes are fixed, as for each of PyTorch's other settings.
            compiled: Callable[..., Tensor] = torch.compile(_conv_transpose2d, dynamic=False)
            return compiled
        return F.conv_transpose2d


def _conv_transpose2d(*arguments: Any) -> Tensor:
    return F.conv_transpose2d(*arguments)


def _selected(selection: dgrad.Selection) -> Answer:
    chosen = selection.candidate
    return {
        "direction": selection.problem.direction,
        "candidate": str(chosen),
        "source": selection.source,
        "workspace_bytes": chosen.workspace_bytes,
        "time_ms": chosen.time_ms,
        "captured": None
        if selection.captured is None
        else str(selection.candidates[selection.captured]),
    }


def _answer(contestant: Contestant, request: dict[str, Any]) -> Answer:
    do = getattr(contestant, request.pop("do"))
    try:
        answer: Answer = do(**request)
    except Exception as error:  # whatever PyTorch, a compiler or dgrad raises
        words = str(error).strip().splitlines()
        answer = {"error": f"{type(error).__name__}: {words[0]}" if words else repr(error)}
    return answer


def main(argv: list[str]) -> int:
    contestant = Contestant(*argv)
    serve(partial(_answer, contestant))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
