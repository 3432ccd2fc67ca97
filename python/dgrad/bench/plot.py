"""A record of `bench` as a picture: speed-ups of all layers, and how near they are to the roofline.

Needs matplotlib, of the extra 'plot'.
"""

from __future__ import annotations

import importlib.util
import statistics
from pathlib import Path
from typing import Any

from dgrad.bench.contest import OURS
from dgrad.bench.record import SLOWER, Record

# Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = {
    "float32": "#0072B2",
    "bfloat16": "#D55E00",
    "float16": "#009E73",
    "float64": "#CC79A7",
}
_MARKERS = {"nchw": "o", "nhwc": "s"}
_PEER = "#999999"
_FINE = (0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.3, 1.5, 1.7, 2, 2.5, 3, 4, 5, 7)
_COARSE = (0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 1000)
_ROW_INCHES = 0.17
_DPI = 130


class PlotError(Exception):
    """No picture can be drawn. The message says why."""


def require(path: str | Path) -> None:
    """Raises PlotError where matplotlib is missing, or `path` names no type of image."""
    if importlib.util.find_spec("matplotlib") is None:
        raise PlotError("--plot needs matplotlib: pip install 'dgrad[plot]'")
    from matplotlib.figure import Figure

    known = [name for name in Figure().canvas.get_supported_filetypes() if name != "pgf"]  # LaTeX's
    if Path(path).suffix[1:].lower() not in known:
        raise PlotError(f"{path}: expected a name that ends in one of .{', .'.join(known)}")


def plot(record: Record, path: str | Path) -> None:
    """Draw the record's cases into an image file, whose suffix says its type.

    Left: each layer's ratio on a logarithmic axis, sorted by its geometric mean. Right: for each
    dtype the reached TFLOP/s over operations per byte, with dgrad's and the faster peer's joined.

    Raises PlotError as :func:`require` does, and where no case has a ratio.
    """
    require(path)
    from matplotlib.figure import Figure

    cases = [case for case in record.cases.values() if case["ratio"] is not None]
    if not cases:
        raise PlotError("there is no case to plot: none has a ratio")
    dtypes = [name for name in _COLOURS if any(case["dtype"] == name for case in cases)]
    rows = len({case["name"] for case in cases})
    height = max(4.0 * len(dtypes), _ROW_INCHES * rows, 4.0) + 1.5
    figure = Figure(figsize=(15.0, height), dpi=_DPI, layout="constrained")
    grid = figure.add_gridspec(len(dtypes), 2)
    _draw_ratios(figure.add_subplot(grid[:, 0]), cases, record.meta["options"])
    for row, dtype in enumerate(dtypes):
        members = [case for case in cases if case["dtype"] == dtype]
        _draw_roofline(figure.add_subplot(grid[row, 1]), members, record.meta["ceilings"])
    versions = record.meta["versions"]
    figure.suptitle(
        f"dgrad against PyTorch {versions['torch']}, {record.meta['options']['direction']}, "
        f"suite {record.meta['options']['suite']}\n"
        f"{record.meta['device']}, cuDNN {versions['cudnn_loaded']}"
    )
    figure.savefig(path)


def _draw_ratios(axes: Any, cases: list[dict[str, Any]], options: dict[str, Any]) -> None:
    ratios: dict[str, list[float]] = {}
    for case in cases:
        ratios.setdefault(case["name"], []).append(case["ratio"])
    order = sorted(ratios, key=lambda name: statistics.geometric_mean(ratios[name]))
    rows = {name: row for row, name in enumerate(order)}
    for row in rows.values():
        axes.axhline(row, color="#e8e8e8", linewidth=0.6, zorder=0)
    for dtype, layout in dict.fromkeys((case["dtype"], case["layout"]) for case in cases):
        members = [case for case in cases if (case["dtype"], case["layout"]) == (dtype, layout)]
        mean = statistics.geometric_mean(case["ratio"] for case in members)
        axes.scatter(
            [case["ratio"] for case in members],
            [rows[case["name"]] for case in members],
            s=22,
            marker=_MARKERS[layout],
            color=_COLOURS[dtype],
            alpha=0.8,
            linewidths=0,
            label=f"{dtype} {layout}, geometric mean {mean:.2f}",
        )
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.axvspan(SLOWER, 1 / SLOWER, color="black", alpha=0.06, linewidth=0)
    axes.set_xscale("log")
    low = min(min(case["ratio"] for case in cases) / 1.05, 0.9)
    high = max(max(case["ratio"] for case in cases) * 1.05, 1.12)
    axes.set_xlim(low, high)
    ticks = _FINE if high / low < 8 else _COARSE
    axes.set_xticks([tick for tick in ticks if low <= tick <= high])
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(order)), order, fontsize=7)
    axes.set_ylim(-1, len(order))
    axes.set_xlabel(f"the better of {' and '.join(options['against'])} / dgrad, device time")
    axes.set_title("speed-up (right of 1: dgrad is faster)")
    axes.grid(axis="x", color="#d0d0d0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", fontsize=8)


def _draw_roofline(axes: Any, cases: list[dict[str, Any]], ceilings: dict[str, Any]) -> None:
    dtype = cases[0]["dtype"]
    bandwidth, rate = ceilings["copy_bytes_per_s"], ceilings["matmul_flops_per_s"][dtype]
    intensity = [case["flops"] / case["bytes"] for case in cases]
    ours = [_tflops(case, OURS) for case in cases]
    theirs = [_tflops(case, case["best"]) for case in cases]
    ridge = rate / bandwidth
    low, high = min(*intensity, ridge) / 2, max(*intensity, ridge) * 2
    axes.plot(
        [low, ridge, high],
        [low * bandwidth / 1e12, rate / 1e12, rate / 1e12],
        color="black",
        linewidth=1.2,
        label=f"copy {bandwidth / 1e12:.3g} TB/s, matrix product {rate / 1e12:.3g} TFLOP/s",
    )
    for x, a, b in zip(intensity, theirs, ours, strict=True):
        axes.plot([x, x], [a, b], color=_PEER, linewidth=0.6, zorder=1)
    axes.scatter(
        intensity, theirs, s=14, facecolors="white", edgecolors=_PEER, label="the better PyTorch"
    )
    for layout in dict.fromkeys(case["layout"] for case in cases):
        chosen = [i for i, case in enumerate(cases) if case["layout"] == layout]
        axes.scatter(
            [intensity[i] for i in chosen],
            [ours[i] for i in chosen],
            s=22,
            marker=_MARKERS[layout],
            color=_COLOURS[dtype],
            alpha=0.5 if layout == "nchw" else 1.0,
            linewidths=0,
            label=f"dgrad {layout}",
            zorder=3,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte (real multiply-adds, each byte once a pass)")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{dtype}: achieved against the roofline")
    axes.grid(color="#e0e0e0", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", fontsize=8)


def _tflops(case: dict[str, Any], name: str) -> float:
    time_ms: float = case["contestants"][name]["device_ms"]["median"]
    flops: int = case["flops"]
    return flops / time_ms / 1e9
