"""`python -m dgrad store`: what is kept on disk of earlier selections."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

from dgrad import store
from dgrad._cli_common import Commands, add_command, print_json, print_table, refuse
from dgrad.selection import format_ms

_EPILOG = """\
DGRAD_STORE names the folder; DGRAD_STORE=off turns the store off.

list and export leave spoiled entries out: stderr names them and says why, and the exit code is 0,
as such entries count as absent everywhere. forget removes them.

exit codes:
  0  done
  2  it could not be done: stderr says why
"""


def add_store(commands: Commands) -> None:
    summary = "Show, move or remove what earlier processes have selected. Needs no GPU."
    parser: argparse.ArgumentParser = commands.add_parser(
        "store",
        help=summary,
        description=summary,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    for name, (run, words, needs_file) in _ACTIONS.items():
        action = add_command(actions, name, partial(_act, name, run), words, _EPILOG)
        if needs_file:
            action.add_argument("file", metavar="FILE", help="one JSON file")


def _act(
    name: str, run: Callable[[argparse.Namespace], None], arguments: argparse.Namespace
) -> int:
    try:
        run(arguments)
    except BrokenPipeError:
        raise  # of the output, and no fault of the store
    except (OSError, RuntimeError, ValueError) as error:
        return refuse(f"store {name}", error)
    return 0


def _path(arguments: argparse.Namespace) -> None:
    path = store.path()
    if arguments.json:
        print_json({"path": None if path is None else str(path)})
    else:
        print("off" if path is None else path)


def _list(arguments: argparse.Namespace) -> None:
    entries = store.list()
    if arguments.json:
        print_json({"entries": entries})
        _tell_spoiled("list")
        return
    header = ("problem", "fastest", "time", "folder")
    rows = [
        (
            str(entry["problem"]),
            str(entry["best"] or "not timed"),
            "" if entry["time_ms"] is None else format_ms(entry["time_ms"]),
            str(entry["folder"]),
        )
        for entry in entries
    ]
    if rows:
        print_table(header, rows, right=("time",))
    print(_located(_entries(len(rows))))
    _tell_spoiled("list")


def _export(arguments: argparse.Namespace) -> None:
    count = store.export(arguments.file)
    _tell(arguments, "exported", count, f"{_entries(count)} written to {arguments.file}")
    _tell_spoiled("export")


def _load(arguments: argparse.Namespace) -> None:
    count = store.load(arguments.file)
    _tell(arguments, "loaded", count, _located(f"{_entries(count)} loaded"))


def _forget(arguments: argparse.Namespace) -> None:
    count = store.forget()
    _tell(arguments, "removed", count, _located(f"{_entries(count)} removed"))


def _tell_spoiled(action: str) -> None:
    spoiled = store.spoiled()
    if spoiled:
        lines = [f"  {file}: {reason}" for file, reason in spoiled.items()]
        words = f"store {action}: left out as spoiled: {_entries(len(spoiled))}"
        print("\n".join([words, *lines]), file=sys.stderr)


def _tell(arguments: argparse.Namespace, done: str, count: int, words: str) -> None:
    if arguments.json:
        print_json({done: count})
    else:
        print(words)


def _entries(count: int) -> str:
    return f"{count} {'entry' if count == 1 else 'entries'}"


def _located(words: str) -> str:
    path = store.path()
    return f"{words}: the store is off" if path is None else f"{words}, store {path}"


_ACTIONS: dict[str, tuple[Callable[[argparse.Namespace], None], str, bool]] = {
    "list": (_list, "Print what is stored: the fastest candidate of each problem.", False),
    "export": (_export, "Write all entries to one file.", True),
    "load": (_load, "Add the entries of an exported file.", True),
    "forget": (_forget, "Remove all entries.", False),
    "path": (_path, "Print the folder in use, or off.", False),
}
