"""What all commands of `python -m dgrad` share: their parsers, and how results are printed."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

_T = TypeVar("_T")
Commands = Any  # argparse does not name the type of its sub-parsers in public


class _Output(Console):
    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # main() ends all commands alike


def add_parser(
    commands: Commands, name: str, summary: str, epilog: str | None = None
) -> argparse.ArgumentParser:
    """Add the command `name`, whose help keeps the lines of `epilog`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
    epilog: str | None = None,
) -> argparse.ArgumentParser:
    """Add the command `name`; `run` gets its arguments and returns the exit code."""
    parser = add_parser(commands, name, summary, epilog)
    parser.add_argument("--json", action="store_true", help="print one JSON object, for programs")
    parser.set_defaults(run=run)
    return parser


def integers(
    text: str, counts: Collection[int], least: int, expected: str, most: int = 2**63 - 1
) -> tuple[int, ...]:
    """An argument's numbers, separated by commas: so many of them, each within the limits.

    `expected` says in words what is. By default `most` is what PyTorch takes as a size.
    """
    parts = [part.strip() for part in text.split(",")]
    # Not int(), which takes 1_0, other scripts' digits, and only so many of them.
    if len(parts) not in counts or not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    if any(len(part.lstrip("0")) > len(str(most)) or int(part) > most for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}, not above {most}")
    values = tuple(int(part) for part in parts)
    if min(values) < least:
        raise argparse.ArgumentTypeError(f"{text!r}: expected {expected}")
    return values


def positive(text: str) -> int:
    return integers(text, (1,), 1, "a positive integer")[0]


def refuse(command: str, reason: object) -> int:
    """Say on stderr why a command cannot be done; the exit code for that."""
    print(f"{command}: {reason}", file=sys.stderr)
    return 2


def tracked(items: Sequence[_T], label: Callable[[_T], str], hidden: bool = False) -> Iterator[_T]:
    """The items one by one; a bar on stderr, where that is a terminal, shows which."""
    hidden = hidden or not sys.stderr.isatty()
    name = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), name)
    console = Console(stderr=True, quiet=hidden, soft_wrap=True)
    with Progress(*columns, console=console, disable=hidden) as progress:
        task = progress.add_task("", total=len(items))
        for item in items:
            progress.update(task, description=label(item))
            yield item
            progress.advance(task)


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2, allow_nan=False))


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[str] | None = None
) -> None:
    """Print with lines on a terminal, plainly elsewhere; a narrow one wraps, but nothing is cut.

    `right` names the columns that are aligned at the right: by default all but the first.
    """
    console = _Output(highlight=False)
    lines = box.SIMPLE if console.is_terminal and header else None
    table = Table(*[""] * len(rows[0]), box=lines, show_header=bool(header), pad_edge=False)
    right = header[1:] if right is None else right
    for i, column in enumerate(table.columns):
        column.header = Text(header[i]) if header else ""
        column.no_wrap = True
        column.justify = "right" if header and header[i] in right else "left"
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: a path may hold [brackets]
    unlimited = console.options.update(max_width=1_000_000)
    console.width = max(console.width, Measurement.get(console, unlimited, table).maximum)
    console.print(table, crop=False, soft_wrap=False)
