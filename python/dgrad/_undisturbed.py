"""Leaves what a call is made of as it was: buffers, and PyTorch's random numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import CodeType, FunctionType, MethodType

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy


def modules_of(call: object) -> Iterable[torch.nn.Module]:
    return call.modules() if isinstance(call, torch.nn.Module) else ()


def _named(call: object) -> list[torch.nn.Module]:
    """The modules that a call is, is a method or a partial of, or names as a function."""
    found: dict[torch.nn.Module, None] = {}
    seen: dict[int, object] = {}
    left = [call]
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        kind = type(part)  # a proxy may say that it is of another one, or raise
        if issubclass(kind, torch.nn.Module):
            found |= dict.fromkeys(modules_of(part))
        elif issubclass(kind, partial):
            assert isinstance(part, partial)
            left += [part.func, *part.args, *part.keywords.values()]
        elif issubclass(kind, MethodType):
            assert isinstance(part, MethodType)
            left += [part.__self__, part.__func__, *getattr(part.__self__, "__dict__", {}).values()]
        elif issubclass(kind, FunctionType):
            assert isinstance(part, FunctionType)
            left += _values(part)
    return list(found)


def _values(function: FunctionType) -> Iterator[object]:
    """What a function has from outside: in its closure, as defaults, and modules by name."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # it has no value yet
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    codes = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        for name in code.co_names:
            value = function.__globals__.get(name)
            if issubclass(type(value), torch.nn.Module):
                yield value


def _same(buffer: Tensor, before: Tensor) -> bool:
    try:
        return torch.equal(buffer, before)
    except (RuntimeError, AttributeError):  # sparse ones, float8 and others are not compared
        return False


@contextmanager
def undisturbed(call: object) -> Iterator[None]:
    """Put buffers and PyTorch's random numbers back to what they were.

    Lazy layers are initialized by a first run, and take random numbers for that. Statistics that
    have begun with it begin anew: of PyTorch's lazy layers those of the norms alone have buffers.
    A buffer that a run registers or fills stays, as does what else the module knows of it.
    """
    modules = _named(call)
    buffers = [
        (module, name, buffer, None if is_lazy(buffer) else buffer.clone())
        for module in modules
        for name, buffer in module.named_buffers(recurse=False)
    ]
    begun = {module for module, _, _, before in buffers if before is None}
    lazy = any(is_lazy(t) for m in modules for t in (*m.parameters(False), *m.buffers(False)))
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices, enabled=not lazy):
        try:
            yield
        finally:
            for module, name, buffer, before in buffers:
                if before is None:
                    continue
                module._buffers[name] = buffer
                if not _same(buffer, before):
                    with torch.inference_mode(buffer.is_inference()):
                        # .data: a graph that has saved it must not take it for a changed one.
                        if buffer.shape == before.shape and buffer.layout is torch.strided:
                            # Of an expanded one each element once.
                            own = tuple(slice(None, 1 if s == 0 else None) for s in buffer.stride())
                            buffer.data[own].copy_(before[own])
                        else:
                            buffer.data = before
            for module in begun:
                reset, now = getattr(module, "reset_running_stats", None), [*module.buffers(False)]
                if callable(reset) and not any(map(is_lazy, now)):
                    with torch.inference_mode(any(b.is_inference() for b in now)):
                        reset()
