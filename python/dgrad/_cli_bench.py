"""`python -m dgrad bench`: dgrad against PyTorch's settings, over a suite of layers."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dgrad
from dgrad._cli_common import Commands, add_parser, positive, print_table, refuse, tracked
from dgrad._layers import DTYPES
from dgrad.bench import plot, report
from dgrad.bench._model_file import unreadable
from dgrad.bench.contest import PEERS, SELECTIONS, Contest, ContestError, Settings
from dgrad.bench.record import DAMAGED, Record, RecordError, unfinished
from dgrad.bench.suite import DIRECTIONS, LAYOUTS, SUITES, Case, cases
from dgrad.tune import FileError

_EPILOG = """\
A suite is layers (89 layers of published models, with their sources), kernelbench (the seven
transposed convolutions of KernelBench level 1) or a FILE: a JSON list or JSON lines of layers, as
for tune, whose dtype and layout do not count: --dtype and --layout do. Lists are separated by
commas.

Each contestant has a process of its own: PyTorch with cudnn.benchmark off (torch) and on
(torch-benchmark), torch.compile with it on (torch-compile), and dgrad. All hold a case at once and
are sampled in turn. Device time is that of a CUDA graph of many calls, which goes round more copies
of the tensors (up to 512) than the device's cache holds; host time is until the call returns; the
eager ratio compares calls back to back, on the same tensors. Ratio is the faster peer's device time
over dgrad's: above 1 dgrad is faster. dgrad selects in a process of its own, what its store has not
yet, and is timed in one that has the selection from the store.

The roofline is the larger of bytes / copy bandwidth and operations / rate of a matrix product,
both measured in the same run; bytes count once in each pass, of which a training step has two, and
only multiply-adds that reach the output count.

--json is written after each case. --resume keeps its finished cases and times the others, so a long
run may be stopped, by --seconds too, and repeated. --from prints and plots records again, several
as one, and needs no GPU.

exit codes:
  0  all cases are timed
  1  a contestant failed in a case: stderr says how
  2  an argument or a file is wrong
  3  dgrad cannot run on a GPU here, or a process does not start
  4  --seconds ended the run: repeat it with --resume
"""


def add_bench(commands: Commands) -> None:
    summary = "Time the layers of a suite with PyTorch and with dgrad, and against the roofline."
    parser = add_parser(commands, "bench", summary, _EPILOG)
    parser.set_defaults(run=_bench)
    add = parser.add_argument
    dtypes = {name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()}
    same = Settings()
    add("--suite", default="layers", metavar="layers|kernelbench|FILE", help="default layers")
    add("--only", default="", metavar="REGEX", help="only layers whose name matches")
    add("--dtype", type=_listed(dtypes), default="float32", help="list; default float32")
    add("--layout", type=_listed(LAYOUTS), default="nchw", help="list of nchw, nhwc; default nchw")
    add("--direction", choices=DIRECTIONS, default="forward", help="default forward")
    peers = ",".join(same.against)
    add("--against", type=_listed(PEERS), default=peers, help=f"list; default {peers}")
    add("--selection", choices=SELECTIONS, default=same.selection, help="default exhaustive")
    add("--rounds", type=positive, default=same.rounds, help="samples of each; default 5")
    add("--device", choices=("cuda", "cpu"), default=same.device, help="cpu only rehearses")
    add("--seconds", type=positive, metavar="N", help="begin no case after N seconds")
    add("--json", metavar="FILE", help="write the record to FILE, after each case")
    add("--resume", action="store_true", help="go on with the record in the --json FILE")
    add("--from", dest="records", nargs="+", metavar="FILE", help="time nothing: show records")
    add("--plot", metavar="IMAGE", help="draw the record, for example into bench.png")


def _listed(known: Collection[str] | dict[str, str]) -> Callable[[str], tuple[str, ...]]:
    names = known if isinstance(known, dict) else {name: name for name in known}

    def parse(text: str) -> tuple[str, ...]:
        parts = [part.strip() for part in text.split(",")]
        wrong = [part for part in parts if part not in names]
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r}: expected of {', '.join(names)}")
        return tuple(dict.fromkeys(names[part] for part in parts))

    return parse


def _bench(arguments: argparse.Namespace) -> int:
    try:
        _check(arguments)
        if arguments.records is None:
            record, stopped = _timed(arguments)
        else:
            record, stopped = _merged(arguments.records), False
            if arguments.json is not None:
                record.save(arguments.json)
        _print(record)
        if arguments.plot is not None:
            plot.plot(record, arguments.plot)
    except BrokenPipeError:
        raise  # of the output, and no fault of the record
    except (FileError, RecordError, plot.PlotError, OSError) as error:
        return refuse("bench", error)
    except ContestError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 3
    if stopped:
        print("bench: stopped by --seconds: repeat with --resume", file=sys.stderr)
        return 4
    return 1 if record.summary()["failed"] else 0


def _check(arguments: argparse.Namespace) -> None:
    """Raises what would otherwise come up after an hour."""
    if arguments.plot is not None:
        plot.require(arguments.plot)
        _try_to_write(arguments.plot, arguments.plot)
    if arguments.json is not None:
        _try_to_write(arguments.json, unfinished(arguments.json))
        both = arguments.json, arguments.plot
        if arguments.plot is not None and len({os.path.realpath(path) for path in both}) == 1:
            raise FileError(f"--json and --plot both name {arguments.json}, expected two files")
    if arguments.resume and (arguments.json is None or arguments.records is not None):
        raise FileError("--resume goes on with the FILE of --json")


def _try_to_write(path: str, first: str | Path) -> None:
    """FileError for a file that cannot be written, of which `first` is; leaves nothing behind."""
    if os.path.exists(path) and (reason := unreadable(path)) is not None:
        raise FileError(f"{path}: {reason}")
    if not os.path.basename(path):
        raise FileError(f"{path!r} names no file")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise FileError(f"{path}: there is no such folder")
    existed = os.path.lexists(first)
    try:
        with open(first, "ab"):
            pass
    except OSError as error:
        raise FileError(f"{path}: {error.strerror}") from error
    if not existed:
        os.unlink(first)


def _loaded(path: str) -> Record:
    """A record of which all can be shown and kept; RecordError for another."""
    record = Record.load(path)
    try:
        for show in (report.heading, report.cases, report.groups, report.extremes):
            show(record)
        json.dumps(record.to_dict(), allow_nan=False)
    except DAMAGED as error:
        raise RecordError(f"{path} is no record of bench: {error!r}") from error
    return record


def _merged(paths: list[str]) -> Record:
    record, *others = map(_loaded, paths)
    for other in others:
        record.absorb(other)
    return record


# --- timing -------------------------------------------------------------------------------------


def _timed(arguments: argparse.Namespace) -> tuple[Record, bool]:
    """The record, and whether --seconds ended the run before its last case."""
    begin = time.monotonic()
    wanted = cases(
        arguments.suite, arguments.dtype, arguments.layout, arguments.direction, arguments.only
    )
    options = _options(arguments)
    earlier = None
    if arguments.resume and Path(arguments.json).exists():
        earlier = _loaded(arguments.json)
        earlier.expect(options=options)
        wanted = [case for case in wanted if not earlier.has(case)]
        if not wanted:
            return earlier, False
    if arguments.device == "cuda" and (reason := dgrad.unavailable_reason()) is not None:
        raise ContestError(f"dgrad cannot run on a GPU here: {reason}")
    names = ("against", "selection", "rounds", "device")
    with Contest(Settings(**{name: getattr(arguments, name) for name in names})) as contest:
        record = Record(
            {
                "command": _command(arguments, options),
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                **contest.machine,
                "options": options,
                "ceilings": contest.ceilings(arguments.dtype),
            }
        )
        if earlier is not None:
            record.absorb(earlier)
        limit = arguments.seconds
        deadline = None if limit is None else begin + limit
        done = _run_all(contest, wanted, record, arguments.json, deadline)
    return record, not done


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all cases of a record share."""
    suite = arguments.suite if arguments.suite in SUITES else Path(arguments.suite).name
    names = ("direction", "selection", "rounds")
    return {
        "suite": suite,
        "against": list(arguments.against),
        **{name: getattr(arguments, name) for name in names},
    }


def _command(arguments: argparse.Namespace, options: dict[str, Any]) -> str:
    """The command that makes the record again, without the files of this machine."""
    lists = {"dtype": arguments.dtype, "layout": arguments.layout}
    only = {"only": arguments.only} if arguments.only else {}
    device = {} if arguments.device == "cuda" else {"device": arguments.device}
    words = ["python", "-m", "dgrad", "bench"]
    for name, value in {**options, **lists, **only, **device}.items():
        words += [f"--{name}", str(value) if isinstance(value, (str, int)) else ",".join(value)]
    return shlex.join(words)


def _run_all(
    contest: Contest, wanted: list[Case], record: Record, path: str | None, deadline: float | None
) -> bool:
    """Time each case and keep it; False where the deadline came before the last one."""
    for case in tracked(wanted, lambda case: case.label):
        if deadline is not None and time.monotonic() > deadline:
            return False
        timed = record.add(contest.run(case))
        for trouble in report.troubles(timed):
            print(f"bench: {case.label}: {trouble}", file=sys.stderr)
        if path is not None:
            record.save(path)
    return True


# --- printing -----------------------------------------------------------------------------------


def _print(record: Record) -> None:
    print(report.heading(record))
    for header, *rows in (report.cases(record), report.groups(record), report.extremes(record)):
        if rows:
            print()
            left = ("case", "dtype", "layout", "selection", "", "best cases", "worst cases")
            print_table(header, rows, right=[name for name in header if name not in left])
