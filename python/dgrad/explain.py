"""What would run and why, and selecting it ahead of time."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.nn.parameter import is_lazy

from . import log
from ._undisturbed import modules_of, undisturbed
from ._watch import Event, watching
from .selection import Selection


class Explanation:
    """The selections that one run used, in order of first use, and why PyTorch ran the rest.

    Attributes:
        selections (list of Selection): one for each choice that was made: of a problem's there are
            several where layers have flags of their own. Forward before gradients.
        notes (list of str): why PyTorch's own operator ran, where it did.
    """

    def __init__(self, events: Iterable[Event]) -> None:
        choices: dict[Any, Selection] = {}
        notes: dict[str, None] = {}
        for event in events:
            if isinstance(event, Selection):
                choices[event.problem, event.policy, event.chosen] = event
            else:
                notes[event] = None
        self.selections = list(choices.values())
        self.notes = list(notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the selections' ``to_dict`` and the notes."""
        return {
            "selections": [selection.to_dict() for selection in self.selections],
            "notes": self.notes,
        }

    def table(self) -> list[list[tuple[str, ...]]]:
        """For each selection its rows of text, the header first."""
        return [selection.table() for selection in self.selections]

    def __str__(self) -> str:
        blocks = [
            f"{selection.problem}{self._under(selection)}\n{_aligned(selection.table())}"
            for selection in self.selections
        ]
        return "\n\n".join(blocks + self.notes) or "no transposed convolution ran"

    def _under(self, selection: Selection) -> str:
        """The flags that tell a selection from others of the same problem."""
        others = [_flags(other) for other in self.selections if other.problem == selection.problem]
        own = [
            f"{name}={value!r}"
            for name, value in _flags(selection).items()
            if any(flags.get(name, value) != value for flags in others)
        ]
        return f" under {', '.join(own)}" if own else ""


def _flags(selection: Selection) -> dict[str, Any]:
    policy = selection.policy
    if policy is None:
        return {}
    return policy._asdict() | {"algorithm": policy.wanted(selection.problem.direction)}


def _aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(f"  {line}" for line in lines)


_A_STEP = (
    "pass a function that makes a step of training, or the model as it was before it was wrapped"
)


def explain(
    call: Callable[..., Any], *inputs: Any, backward: bool = False, **keywords: Any
) -> Explanation:
    """What runs for ``call(*inputs)``, what was chosen, and why each other candidate was not.

    The call is run once, so that a problem that is new is selected as it would be. Gradients, the
    buffers of the modules that the call is, is a method or a partial of, or names as a function,
    PyTorch's random numbers and the counts of :func:`dgrad.selections` stay as they are, and so do
    the inputs unless the call itself writes to them. Lazy layers are initialized, as by any first
    call, and take random numbers for that.

    The threads that the call starts are told of too. What other threads of the program run
    meanwhile is not, nor what the call leaves to threads that were there before.

    Args:
        call: a layer, a model, or any function that ends in dgrad's convolutions.
        inputs, keywords: its arguments.
        backward: run the gradients too. Default False.
    """
    with watching() as events:
        _rehearse(call, inputs, keywords, backward)
    return Explanation(events)


def warm_up(
    call: Callable[..., Any], *inputs: Any, backward: bool = True, **keywords: Any
) -> Explanation:
    """Select all that ``call(*inputs)`` uses, before serving or capturing a CUDA graph.

    Runs the call once, with gradients for all parameters and inputs that require them, and shows
    progress on a terminal. The output's tensors may be in containers and in attributes of objects;
    a warning says where no gradient could be taken. A function that runs a backward pass itself is
    left with that one: give a whole step of training where the model is wrapped for several
    processes, as FSDP's first version and DistributedDataParallel's static graph want one. What
    :func:`explain` leaves as it is stays so here too.

    Args:
        call: a layer, a model, or a function around one.
        inputs, keywords: its arguments, of the shapes, types and layouts that will be used.
        backward: select for the gradients too. Default True.
    """
    console = Console(stderr=True, soft_wrap=True)
    progress = Progress(
        SpinnerColumn(),
        TextColumn("selecting: {task.completed} calls so far"),
        console=console,
        disable=not console.is_terminal,
    )
    task = progress.add_task("", total=None)
    # Told by events: a hook on a layer would have torch.compile compile the model anew.
    with watching(lambda _: progress.advance(task)) as events, progress:
        _rehearse(call, inputs, keywords, backward)
    return Explanation(events)


def _rehearse(
    call: Callable[..., Any], inputs: tuple[Any, ...], keywords: dict[str, Any], backward: bool
) -> None:
    name = getattr(call, "__qualname__", type(call).__name__)
    wrapper = _wrapper(call) if backward else None
    if wrapper is not None:
        log.without_gradients(name, f"{wrapper} wants a whole step; {_A_STEP}")
    backward = backward and wrapper is None
    with undisturbed(call), torch.set_grad_enabled(backward):
        if not backward:
            call(*inputs, **keywords)
            return
        passes = _backward_passes()
        begin = torch._C._autograd._get_sequence_nr()
        output = call(*inputs, **keywords)
        if _backward_passes() > passes + 1 and not isinstance(call, torch.nn.Module):
            return  # a step of training: it has taken its gradients, and its graph is gone
        found = list(_tensors(output))
        outputs = [t for t in found if t.requires_grad and t.layout is torch.strided]
        # The first two are in the third, but for what a call does in other threads.
        sources: list[Any] = [t for t in _tensors((inputs, keywords)) if t.requires_grad]
        parameters = [p for m in modules_of(call) for p in m.parameters(False) if not is_lazy(p)]
        sources += [p for p in parameters if p.requires_grad]
        ends = _ends(outputs, begin)
        if any(getattr(getattr(e.node, "variable", 0), "_is_flat_param", False) for e in ends):
            # Of FSDP's first version inside a function, see _wrapper().
            log.without_gradients(name, f"FullyShardedDataParallel wants a whole step; {_A_STEP}")
            return
        sources += ends
        if outputs and sources:
            gradients = [torch.ones_like(t) for t in outputs]
            try:
                torch.autograd.grad(outputs, sources, gradients, allow_unused=True)
            except RuntimeError as error:
                if "use_reentrant" not in str(error):
                    raise
                log.without_gradients(name, f"a reentrant checkpoint wants a step; {_A_STEP}")
        elif found:
            log.without_gradients(
                name,
                "no tensor of its output requires one; let parameters or inputs require gradients, "
                "return tensors with their graph",
            )
        else:
            kind = type(output).__name__
            why = f"no tensor was found in its output, a {kind}; let it return tensors"
            log.without_gradients(name, why)


def _wrapper(call: object) -> str | None:
    """What around the model takes a backward pass of ours for a whole one, or None.

    Its hooks would be left in the middle of a step: FSDP's first version then has no parameters
    left, and the processes of a static graph no longer train as one.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # costs much to import
    sharded = getattr(fsdp, "FullyShardedDataParallel", None)
    for module in modules_of(call):
        if sharded is not None and isinstance(module, sharded):
            return "FullyShardedDataParallel"
        static = getattr(module, "static_graph", False)
        if isinstance(module, torch.nn.parallel.DistributedDataParallel) and static:
            return "DistributedDataParallel(static_graph=True)"
    return None


def _backward_passes() -> int:
    """How many backward passes have begun in this process, with the one that asks."""
    numbers: list[int] = []
    with torch.inference_mode(False), torch.enable_grad():
        source = torch.zeros((), requires_grad=True)
        result = source.clone()
        result.register_hook(lambda _: numbers.append(torch._C._current_graph_task_id()))
        torch.autograd.grad(result, source)
    return numbers[0]


def _tensors(value: object) -> Iterator[Tensor]:
    """The tensors in containers and in attributes of objects, each once."""
    seen: dict[int, object] = {}  # with what has the id, so that no other gets it
    left = [value]
    while left:
        part = left.pop()
        if id(part) in seen:
            continue
        seen[id(part)] = part
        if isinstance(part, Tensor):
            yield part
        else:
            left += _parts(part)


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset)):
        return value
    if isinstance(value, (type, ModuleType, torch.nn.Module)):
        return ()  # no part of an output, and it leads far
    parts = list(getattr(value, "__dict__", {}).values())
    if is_dataclass(value):  # its fields may be slots
        parts += [getattr(value, field.name, None) for field in fields(value)]
    return parts


def _ends(outputs: Iterable[Tensor], begin: int) -> list[GradientEdge]:
    """Where the graph ends that a call has made: at leaves, and at nodes older than ``begin``.

    A function does not tell its parameters, but this graph does. Older nodes are not its own:
    running them would free what their owner's backward pass needs.
    """
    left = [t.grad_fn for t in outputs if t.grad_fn and t.grad_fn._sequence_nr() >= begin]
    seen = set(left)
    found: dict[GradientEdge, None] = {}
    while left:
        for node, place in left.pop().next_functions:
            if node is None or node in seen:
                continue
            if node.next_functions and node._sequence_nr() >= begin:
                seen.add(node)
                left.append(node)
            else:
                found[GradientEdge(node, place)] = None
    return list(found)
