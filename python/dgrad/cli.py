"""`python -m dgrad`: its commands, of which `info` and `compare` are here."""

from __future__ import annotations

import argparse
import errno
import io
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dgrad import _cli_bench, _cli_selection, _cli_store
from dgrad._cli_common import Commands, add_command, integers, print_json, print_table

if TYPE_CHECKING:
    from dgrad.bench.compare import Comparison
    from dgrad.bench.timing import Timing

_INTERRUPTED = 128 + 2  # as of a process that SIGINT has ended
_PIPE_CLOSED = 128 + 13  # SIGPIPE
_NOT_WRITTEN = 74  # EX_IOERR of sysexits.h
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

_EPILOG = """\
exit codes of all commands, beside those that each one's --help lists:
  0    it is done
  2    an argument or a file is wrong
 74    the output cannot be written
130    interrupted
141    nobody reads the output any more
"""

_COMPARE_EPILOG = """\
FILE is a Python file as KernelBench has them: a class Model, get_inputs() and get_init_inputs().
Without FILE: ConvTranspose2d(64, 64, (3, 7), bias=False) on an input of (8, 64, 512, 512).

Outputs are equal where shape and dtype are, and torch.allclose holds with atol = rtol = 1e-4
(1e-2 for half types) against PyTorch with its defaults, NaN in the same places being equal.
PyTorch, PyTorch with cudnn.benchmark on, and dgrad are each timed in a fresh process, in short
turns. The model is used as constructed, under no_grad; the last column is the part of its time that
passes in its transposed convolutions.
On the CPU PyTorch's own operator runs in dgrad's layers. There the batch of FILE's inputs is cut
to 1, and without FILE the input is (1, 64, 128, 128); --full-size keeps them as they are.

exit codes:
  0  the outputs are equal
  1  the outputs differ
  2  FILE or the arguments are wrong (also: FILE has no ConvTranspose2d layer)
  3  a contestant failed or died, or dgrad cannot run on this GPU
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Wrong usage raises SystemExit(2).

    Where nobody reads the output any more, as behind ``| head``, it is 141, without a word.
    """
    if sys.stderr is None:  # closed: what is for it must not go to stdout
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may have what it cannot write
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            return _run(argv)
        finally:
            print(end="", flush=True)  # here, where a closed pipe can still be answered
    except BrokenPipeError:
        _discard(1, 2)  # either may be the pipe, and both are flushed at the end
        return _PIPE_CLOSED
    except OSError as error:
        if error.errno not in _DISK or error.filename is not None:
            raise
        _discard(1)
        print(f"the output cannot be written: {error.strerror}", file=sys.stderr)
        return _NOT_WRITTEN
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED


def _discard(*descriptors: int) -> None:
    """Let what is written there go nowhere."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    for descriptor in descriptors:
        os.dup2(nothing, descriptor)
    os.close(nothing)


def _run(argv: Sequence[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dgrad",
        description="PyTorch's ConvTranspose2d on cuDNN's data gradient.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for add in _COMMANDS:
        add(commands)
    arguments = parser.parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


# --- info ---------------------------------------------------------------------------------------


def _add_info(commands: Commands) -> None:
    add_command(
        commands, "info", _info, "Print versions, devices, and what is usable. Always exits 0."
    )


def _info(arguments: argparse.Namespace) -> int:
    from dgrad.bench import environment

    versions, devices = environment.versions(), environment.devices()
    providers = environment.providers()
    if arguments.json:
        print_json({"versions": versions, "devices": devices, "providers": providers})
        return 0
    rows = [
        ("dgrad", versions["dgrad"]),
        ("Python", versions["python"]),
        ("PyTorch", versions["torch"]),
        ("CUDA of PyTorch", versions["cuda"]),
        ("NVIDIA driver", versions["driver"]),
        ("cuDNN compiled against", versions["cudnn_compiled"]),
        ("cuDNN loaded", versions["cudnn_loaded"]),
        ("cuDNN loaded from", versions["cudnn_path"]),
    ]
    for device in devices:
        memory_gib = int(str(device["memory_bytes"])) / 2**30
        words = f"{device['name']}, sm {device['compute_capability']}, {memory_gib:.0f} GiB"
        rows.append((f"GPU {device['index']}", words))
    if not devices:
        rows.append(("GPU", None))
    for name, provider in providers.items():
        words = "usable" if provider["usable"] else f"not usable: {provider['reason']}"
        rows.append((f"provider {name}", words))
    print_table([], [(name, value or "none") for name, value in rows])
    return 0


# --- compare ------------------------------------------------------------------------------------


def _add_compare(commands: Commands) -> None:
    summary = "Run a model with PyTorch's layers and with dgrad's; compare outputs and times."
    parser = add_command(commands, "compare", _compare, summary, _COMPARE_EPILOG)
    parser.add_argument("file", metavar="FILE", nargs="?", help="the model (see below)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    parser.add_argument("--seed", type=_seed, default=42, help="of weights and inputs (default 42)")
    parser.add_argument(
        "--budget",
        type=_seconds,
        metavar="SECONDS",
        help="spent on runs of each contestant (default 1)",
    )
    parser.add_argument(
        "--selection",
        choices=("measure", "exhaustive", "heuristic"),
        help="how dgrad chooses (default measure)",
    )
    parser.add_argument(
        "--training",
        action="store_true",
        help="time forward, backward and SGD's update, and compare gradients",
    )
    parser.add_argument("--full-size", action="store_true", help="keep the inputs' size on the CPU")


def _seed(text: str) -> int:
    return integers(text, (1,), 0, "a number from 0 to 2**32 - 1, as NumPy", 2**32 - 1)[0]


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number of seconds")
    return value


def _compare(arguments: argparse.Namespace) -> int:
    from dgrad.bench.compare import CompareError, compare

    try:
        comparison = compare(
            arguments.file,
            device=arguments.device,
            seed=arguments.seed,
            budget_s=arguments.budget,
            full_size=arguments.full_size,
            selection=arguments.selection,
            training=arguments.training,
        )
    except CompareError as error:
        print(f"compare: {error}", file=sys.stderr)
        return error.exit_code
    if arguments.json:
        print_json(comparison.to_dict())
    else:
        _print_comparison(comparison)
    for difference in comparison.differences:
        print(f"compare: outputs differ: {difference}", file=sys.stderr)
    if comparison.float64_errors is not None:
        words = ", ".join(f"{who} {e:.2g}" for who, e in comparison.float64_errors.items())
        print(f"compare: relative error against float64: {words}", file=sys.stderr)
    return 0 if comparison.equal else 1


def _print_comparison(c: Comparison) -> None:
    layers = f"{c.layers} layer{'' if c.layers == 1 else 's'}"
    what = ", training" if c.training else ""
    print(
        f"{c.file or 'built-in model'}{what}: {layers} swapped, {c.dtype}, "
        f"{c.device} ({c.device_name})"
    )
    largest = "none" if c.max_abs_diff is None else f"{c.max_abs_diff:.3g}"
    limit = "" if c.tolerance is None else f", atol = rtol = {c.tolerance:g}"
    print(f"outputs equal: {'yes' if c.equal else 'NO'} (largest difference {largest}{limit})")
    share = "of forward in these layers" if c.training else "in these layers"
    header = ["", "median ms", "quartiles ms", "min ms", "runs", share]
    rows = [
        (name, *_times(timing), f"{c.shares[setting]:.0%}")
        for name, timing, setting in (
            ("PyTorch", c.pytorch, "pytorch"),
            ("PyTorch, benchmark on", c.pytorch_benchmark, "pytorch_benchmark"),
            ("dgrad", c.dgrad, "dgrad"),
        )
    ]
    print_table(header, rows)
    print(f"ratio (better PyTorch / dgrad): {c.ratio:.3f}")
    for title, lines in (("dgrad's log", c.selected), ("notes", c.notes)):
        if lines:
            print("\n  ".join([f"{title}:", *lines]))


def _times(t: Timing) -> tuple[str, str, str, str]:
    return (
        f"{t.median_ms:.4f}",
        f"{t.q1_ms:.4f} to {t.q3_ms:.4f}",
        f"{t.min_ms:.4f}",
        f"{t.runs}",
    )


_COMMANDS: tuple[Callable[[Commands], None], ...] = (
    _add_info,
    _add_compare,
    *_cli_selection.COMMANDS,
    _cli_bench.add_bench,
    _cli_store.add_store,
)
