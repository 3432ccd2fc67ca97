"""`python -m dgrad explain | tune`: what runs and why, and selecting it ahead of time."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any

import torch

import dgrad
from dgrad import store
from dgrad._cli_common import (
    Commands,
    add_command,
    integers,
    positive,
    print_json,
    print_table,
    refuse,
    tracked,
)
from dgrad._layers import DIRECTIONS, DTYPES, Layer
from dgrad.exceptions import first_line
from dgrad.tune import Entry, FileError, Tuning, read

_EXPLAIN_EPILOG = """\
Pairs are 'a' or 'vertical,horizontal'. What is not stored yet is measured and stored, as by any
call. A gradient comes after its forward pass, which is then selected too.

exit codes:
  0  explained
  1  no candidate can run it, or the memory does not suffice
  2  an argument is wrong
  3  dgrad cannot run on a GPU here
"""
_TUNE_EPILOG = """\
FILE is one of
  a log of selections (DGRAD_LOG_FILE): JSON lines, each with a problem
  a JSON list of layers: objects with N, C_in, H, W, C_out, kernel, and optionally name, stride,
    padding, output_padding, dilation, groups, bias, dtype ("fp32"; "fp32/fp16" is both) and
    layout ("nchw" or "contiguous"; "nhwc" or "channels_last")
  a Python file as KernelBench has them (*.py): Model, get_inputs() and get_init_inputs()

What the store has already costs nothing: repeat the command after an interruption.

exit codes:
  0  everything is selected
  1  something failed: stderr says what and why
  2  FILE or an argument is wrong
  3  dgrad cannot run on a GPU here
"""


def _no_gpu(command: str) -> bool:
    reason = dgrad.unavailable_reason()
    if reason is not None:
        print(f"{command}: dgrad cannot run on a GPU here: {reason}", file=sys.stderr)
    return reason is not None


# --- explain ------------------------------------------------------------------------------------


def _pair(least: int) -> Callable[[str], tuple[int, ...]]:
    expected = f"'a' or 'a,b' of at least {least}"
    return lambda text: (integers(text, (1, 2), least, expected) * 2)[:2]


def _sizes(text: str) -> tuple[int, ...]:
    return integers(text, (4,), 1, "N,C_in,H,W of at least 1")


def _bytes(text: str) -> Any:
    try:
        return dgrad.Flags(workspace_limit=text).workspace_limit
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_explain(commands: Commands) -> None:
    summary = "Say what runs for a layer, and why each other candidate does not."
    parser = add_command(commands, "explain", _explain, summary, _EXPLAIN_EPILOG)
    add = parser.add_argument
    add("--input", type=_sizes, required=True, metavar="N,C_in,H,W", help="shape of the input")
    add("--out", type=positive, required=True, metavar="C_out", help="channels of the output")
    add("--kernel", type=_pair(1), required=True, metavar="a[,b]", help="size of the kernel")
    add("--stride", type=_pair(1), default=(1, 1), metavar="a[,b]", help="default 1")
    add("--padding", type=_pair(0), default=(0, 0), metavar="a[,b]", help="default 0")
    add("--output-padding", type=_pair(0), default=(0, 0), metavar="a[,b]", help="default 0")
    add("--dilation", type=_pair(1), default=(1, 1), metavar="a[,b]", help="default 1")
    add("--groups", type=positive, default=1, metavar="N", help="default 1")
    add("--bias", action="store_true", help="add a bias")
    dtypes = ("float32", "float16", "bfloat16", "float64")
    add("--dtype", choices=dtypes, default="float32", help="default float32")
    add("--channels-last", action="store_true", help="tensors in channels_last")
    add("--strict", action="store_true", help="float32 without tf32")
    add("--direction", choices=(*DIRECTIONS, "all"), default="dgrad", help="default dgrad")
    _add_selection(parser, ("heuristic", "measure", "exhaustive"), "measure")
    add("--workspace-limit", type=_bytes, metavar="BYTES", help="such as 256MiB; default none")
    add("--deterministic", action="store_true", help="only deterministic candidates")


def _add_selection(parser: argparse.ArgumentParser, names: tuple[str, ...], default: str) -> None:
    parser.add_argument("--selection", choices=names, default=default, help=f"default {default}")


def _explain(arguments: argparse.Namespace) -> int:
    try:
        layer = _layer(arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        return refuse("explain", first_line(error))
    if _no_gpu("explain"):
        return 3
    directions = DIRECTIONS if arguments.direction == "all" else (arguments.direction,)
    try:
        with dgrad.flags(
            selection=arguments.selection,
            workspace_limit=arguments.workspace_limit,
            deterministic=arguments.deterministic or None,
            allow_tf32=False if arguments.strict else None,
            fallback="error",
        ):
            explanation = layer.explain(directions)
    except RuntimeError as error:  # NotSupportedError, or memory for the tensors themselves
        print(f"explain: {error}", file=sys.stderr)
        return 1
    explanation.selections = [
        selection
        for selection in explanation.selections
        if selection.problem.direction in directions
    ]
    if arguments.json:
        print_json(explanation.to_dict())
    else:
        _print_explanation(explanation)
    return 0


def _layer(arguments: argparse.Namespace) -> Layer:
    same = ("input", "kernel", "stride", "padding", "output_padding", "dilation", "groups", "bias")
    return Layer(
        out_channels=arguments.out,
        dtype=DTYPES[arguments.dtype],
        channels_last=arguments.channels_last,
        **{name: getattr(arguments, name) for name in same},
    )


def _print_explanation(explanation: dgrad.Explanation) -> None:
    for index, selection in enumerate(explanation.selections):
        if index:
            print()
        print(f"{selection.problem}, source {selection.source}")
        header, *rows = selection.table()
        print_table(header, rows, right=("workspace", "time"))
    for text in explanation.notes:
        print(text)


# --- tune ---------------------------------------------------------------------------------------


def _add_tune(commands: Commands) -> None:
    summary = "Select for all layers of a file ahead of time, so that the store has them."
    parser = add_command(commands, "tune", _tune, summary, _TUNE_EPILOG)
    parser.add_argument("file", metavar="FILE", help="what to select for (see below)")
    _add_selection(parser, ("measure", "exhaustive"), "exhaustive")
    parser.add_argument("--backward", action="store_true", help="select for the gradients too")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N layers or lines"
    )


def _tune(arguments: argparse.Namespace) -> int:
    try:
        entries = read(arguments.file)[: arguments.limit]
    except FileError as error:
        return refuse("tune", error)
    if _no_gpu("tune"):
        return 3
    if store.path() is None:
        print("tune: the store is off: what is measured is not kept", file=sys.stderr)
    tuning = Tuning(arguments.selection, arguments.backward, torch.cuda.current_device())
    try:
        _run_all(tuning, entries)
    except FileError as error:
        return refuse("tune", error)
    summary = tuning.summary()
    if arguments.json:
        asked = {name: getattr(arguments, name) for name in ("file", "selection", "backward")}
        print_json({**asked, **summary})
    else:
        _print_summary(summary)
    return 1 if summary["failed"] else 0


def _run_all(tuning: Tuning, entries: list[Entry]) -> None:
    # One entry may be a model, and warming it up shows a progress of its own.
    hidden = len(entries) == 1
    with contextlib.redirect_stdout(sys.stderr):  # a model may print
        for entry in tracked(entries, lambda entry: entry.where, hidden):
            for where, reason in tuning.add(entry):
                print(f"tune: {where}: {reason}", file=sys.stderr)


def _print_summary(summary: dict[str, Any]) -> None:
    rows = [
        ("problems", summary["problems"]),
        ("  new, measured now", summary["new"]),
        ("  known, from the store", summary["known"]),
        ("  with one usable candidate", summary["alone"]),
        ("failed", len(summary["failed"])),
        ("seconds", f"{summary['seconds']:.1f}"),
    ]
    print_table([], [(name, str(value)) for name, value in rows])


COMMANDS: tuple[Callable[[Commands], None], ...] = (_add_explain, _add_tune)
