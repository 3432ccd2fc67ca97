"""One call made ready: how two tensors enter a direction, and what tensor comes out, for dgrad
with a bias or without."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import _fallback, _loader, _reproduction, config, log
from ._geometry import Geometry, Pair
from ._operands import DTYPES, INPUTS, OUTPUT, check_numbers, memory_format, output_shape
from ._runner import Runner
from ._watch import note, watchers
from .config import Deciding, Flags
from .exceptions import CudnnError, NotSupportedError, OutOfMemoryError
from .planner import plan_cache

if TYPE_CHECKING:
    from ._core import ReadyCall, ReadyGradients

MAX_ELEMENTS = 2**31 - 1  # of one tensor in one cuDNN call
_ALIGNMENT = 16  # bytes, of an address that every kernel can read

# What torch.compile's code allocates with, on the current device: torch.empty_strided takes longer
# and gives the GIL to other threads, as the convolution after it does once more.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_empty_strided = getattr(_guards, "_empty_strided_cuda", None)


def _alignment(address: int) -> int:
    """The largest power of two up to 16 bytes that divides an address."""
    return (address & -address) & 15 or _ALIGNMENT


def _needs_copy(tensor: Tensor, memory_format: torch.memory_format) -> bool:
    """Whether cuDNN gets a copy: it wants dense tensors, and it is slow and less reliable where
    addresses are not aligned."""
    dense = tensor.is_contiguous(memory_format=memory_format)
    return not dense or _alignment(tensor.data_ptr()) < _ALIGNMENT


class Call:
    """Runs one direction for tensors of one shape, stride and type, on one thread.

    Tensors with more than 2^31 - 1 elements are split along the batch: exactly for dgrad and
    fprop; for wgrad the parts are summed in float32 (float64 for float64). Before that each part is
    rounded to the type of its inputs, the only one that cudnnConvolutionBackwardFilter writes: of
    float16 a part can overflow where the sum would not.
    """

    __slots__ = (
        "_arguments",
        "_copies_a",
        "_copies_b",
        "_copies_bias",
        "_device",
        "_dtype",
        "_format",
        "_may_fall_back",
        "_native_runs",
        "_out_shape",
        "_parts",
        "_reason",
        "_single",
    )

    def __init__(
        self,
        direction: str,
        a: Tensor,
        b: Tensor,
        geometry: Geometry,
        size: Pair,
        deciding: Deciding | None = None,
        bias: Tensor | None = None,
    ) -> None:
        check_numbers(geometry)
        core = _loader.require()
        policy, tf32, commands, _ = deciding or config.deciding(direction)
        self._arguments = (direction, geometry, size)
        self._may_fall_back = policy.fallback == "pytorch" and not commands
        self._reason: str | None = None  # why PyTorch runs it
        self._device: int = a.get_device()
        self._dtype = a.dtype
        self._format = memory_format(a, b)
        self._copies_a = _needs_copy(a, self._format)
        self._copies_b = _needs_copy(b, self._format)
        self._copies_bias = bias is not None and _needs_copy(bias, torch.contiguous_format)
        self._out_shape = output_shape(direction, a.shape, b.shape, geometry.groups, size)

        first, second = INPUTS[direction]
        shapes = {
            first: tuple(a.shape),
            second: tuple(b.shape),
            OUTPUT[direction]: self._out_shape,
        }
        try:
            step = _images_per_call(shapes)
        except NotSupportedError as error:
            again = _reproduction.of_shapes(**shapes, geometry=geometry, like=a, flags={})
            raise NotSupportedError(f"{error}\nTo reproduce:\n\n{again}\n") from None
        images = shapes["x"][0]
        alignment = _ALIGNMENT
        if step < images:  # the parts begin inside the tensors
            part_bytes = (step * math.prod(shapes[name][1:]) * a.element_size() for name in "xy")
            alignment = min(alignment, *map(_alignment, part_bytes))

        def runner(images: int) -> Runner:
            problem = core.Problem(
                direction=direction,
                dtype=DTYPES[a.dtype],
                tf32=a.dtype == torch.float32 and tf32,
                layout="nhwc" if self._format is torch.channels_last else "nchw",
                x=(images, *shapes["x"][1:]),
                w=shapes["w"],
                y=(images, *shapes["y"][1:]),
                padding=geometry.padding,
                stride=geometry.stride,
                dilation=geometry.dilation,
                groups=geometry.groups,
                bias=bias is not None,
                alignment=alignment,
                device=self._device,
            )
            return Runner(problem, policy)

        runners = {count: runner(count) for count in {min(step, images), images % step} if count}
        self._parts = [
            (runners[min(step, images - start)], start, min(start + step, images))
            for start in range(0, images, step)
        ]
        self._single = self._parts[0][0] if len(self._parts) == 1 else None
        self._native_runs = 0

    def __call__(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        if self._reason is not None:
            direction, geometry, size = self._arguments
            if watchers:
                note(f"PyTorch's own operator runs: {self._reason}")
            return _fallback.run(direction, a, b, geometry, size, bias)
        try:
            return self._run(a, b, bias)
        except OutOfMemoryError:
            raise
        except NotSupportedError as error:
            if not self._may_fall_back:
                raise
            self._reason = str(error)
            log.fallback(self._reason)
        except CudnnError as error:
            raise self._parts[0][0].failed(error) from error
        return self(a, b, bias)

    def ready(self, recipe: Callable[[], tuple[object, ReadyGradients | None]]) -> ReadyCall | None:
        """What native code needs to run this again as it last ran here, if it can.

        ``recipe`` makes what Python needs of it, and what native code needs of its gradients.
        """
        if torch._C._cuda_getDevice() != self._device:
            return None  # it runs on the current one alone
        copies = self._copies_a or self._copies_b or self._copies_bias
        if self._single is None or copies or self._reason is not None:
            return None
        out = torch.empty(self._out_shape, device="meta", memory_format=self._format)
        if _empty_strided is not None:
            make_out = partial(_empty_strided, self._out_shape, out.stride(), self._dtype)
        else:
            make_out = partial(
                torch.empty_strided, self._out_shape, out.stride(), dtype=self._dtype, device="cuda"
            )
        return self._single.ready(make_out, *recipe())

    def ran_natively(self) -> bool:
        """Whether native code has run such a call since this was last asked."""
        use, before = None if self._single is None else self._single.use, self._native_runs
        self._native_runs = 0 if use is None else use.native_runs
        return self._native_runs != before

    def _run(self, a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
        if self._copies_a:
            a = a.clone(memory_format=self._format)
        if self._copies_b:
            b = b.clone(memory_format=self._format)
        if self._copies_bias and bias is not None:
            bias = bias.clone(memory_format=torch.contiguous_format)
        out = torch.empty(
            self._out_shape, dtype=a.dtype, device=a.device, memory_format=self._format
        )
        if torch._C._cuda_getDevice() == self._device:
            return self._fill(a, b, out, bias)
        with torch.cuda.device(self._device):
            return self._fill(a, b, out, bias)

    def _fill(self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None) -> Tensor:
        direction = self._arguments[0]
        if self._single is not None:
            _execute(self._single, direction, a, b, out, bias)
        elif direction == "wgrad":
            total = torch.zeros_like(out, dtype=torch.promote_types(out.dtype, torch.float32))
            for runner, start, stop in self._parts:
                _execute(runner, direction, a[start:stop], b[start:stop], out)
                total += out
            out.copy_(total)
        else:
            for runner, start, stop in self._parts:
                _execute(runner, direction, a[start:stop], b, out[start:stop], bias)
        return out


def _execute(
    runner: Runner, direction: str, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None
) -> None:
    if direction == "dgrad":
        runner.run(out, b, a, bias)
    elif direction == "fprop":
        runner.run(a, b, out)
    else:
        runner.run(a, out, b)


def _images_per_call(shapes: dict[str, tuple[int, ...]]) -> int:
    """How many images fit into one cuDNN call; NotSupportedError where not one does."""
    for name in "xy":
        per_image = math.prod(shapes[name][1:])
        if per_image > MAX_ELEMENTS:
            side = "output" if name == "x" else "input"
            raise NotSupportedError(
                f"one image of the {side} has {per_image} elements (shape {shapes[name]}), and "
                f"cuDNN takes at most {MAX_ELEMENTS} in one call; run it in smaller tiles"
            )
    if math.prod(shapes["w"]) > MAX_ELEMENTS:
        raise NotSupportedError(
            f"weight has shape {shapes['w']}, and cuDNN takes at most {MAX_ELEMENTS} elements "
            "in one call"
        )
    return min(MAX_ELEMENTS // math.prod(shapes[name][1:]) for name in "xy")


def call_for(
    direction: str,
    a: Tensor,
    b: Tensor,
    geometry: Geometry,
    size: Pair,
    flags: Flags | None = None,
    bias: Tensor | None = None,
    deciding: Deciding | None = None,
) -> Call:
    """The cached call for these tensors under the flags in force, made if there is none."""
    deciding = deciding or config.deciding(direction, flags)
    key = (
        direction,
        a.shape,
        a.stride(),
        b.shape,
        b.stride(),
        a.dtype,
        a.get_device(),
        geometry,
        size,
        a.data_ptr() & 15,
        b.data_ptr() & 15,
        None if bias is None else (bias.stride(), bias.data_ptr() & 15),
        deciding,
        threading.get_ident(),
    )
    call = plan_cache.get(key)
    if call is None:
        call = Call(direction, a, b, geometry, size, deciding, bias)
        plan_cache.put(key, call)
    return call
