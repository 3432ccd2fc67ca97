"""A record of `bench` in words: rows of text for tables."""

from __future__ import annotations

from typing import Any

from dgrad.bench.contest import OURS
from dgrad.bench.record import SLOWER, Record

Rows = list[tuple[str, ...]]


def heading(record: Record) -> str:
    """The machine, and the ceilings of its roofline."""
    meta = record.meta
    versions, ceilings = meta["versions"], meta["ceilings"]
    rates = ", ".join(
        f"{dtype} {rate / 1e12:.4g} TFLOP/s"
        for dtype, rate in ceilings["matmul_flops_per_s"].items()
    )
    return (
        f"{meta['device']}, driver {meta['driver'] or 'none'}, PyTorch {versions['torch']}, "
        f"cuDNN {versions['cudnn_loaded'] or 'none'}\n"
        f"ceilings: copy {ceilings['copy_bytes_per_s'] / 1e12:.3g} TB/s, matrix product {rates}"
    )


def cases(record: Record) -> Rows:
    """One row for each case, the header first.

    Device times ("ms") and host times ("us") of one call are medians.
    """
    names = [*record.meta["options"]["against"], OURS]
    header = (
        "case",
        "dtype",
        "layout",
        *(f"{name} ms" for name in names),
        *(f"{name} us" for name in names),
        "ratio",
        "eager ratio",
        "of roofline",
        "selection",
    )
    rows = []
    for case in record.cases.values():
        each = [case["contestants"][name] for name in names]
        rows.append(
            (
                case["name"],
                case["dtype"],
                case["layout"],
                *("failed" if "error" in c else f"{c['device_ms']['median']:.4g}" for c in each),
                *("failed" if "error" in c else f"{c['host_us']:.1f}" for c in each),
                _number(case["ratio"]),
                _number(case["eager_ratio"]),
                _percent(case["achieved"]),
                _selected(case["selected"]),
            )
        )
    return [header, *rows]


def groups(record: Record) -> Rows:
    """One row for each dtype and layout and one for all, the header first."""
    header = (
        "",
        "cases",
        "failed",
        f"below {SLOWER}",
        "geomean ratio",
        "min ratio",
        "eager ratio",
        "of roofline",
    )
    summary = record.summary()
    named = [(f"{each['dtype']} {each['layout']}", each) for each in summary["groups"]]
    rows = [
        (
            name,
            *(str(each[count]) for count in ("cases", "failed", "slower")),
            *(_number(each[f"{kind}ratio"]) for kind in ("geomean_", "min_", "geomean_eager_")),
            _percent(each["geomean_achieved"]),
        )
        for name, each in [*named, ("all", summary)]
    ]
    return [header, *rows]


def extremes(record: Record) -> Rows:
    """The best and the worst cases side by side, the header first."""
    summary = record.summary()
    rows = [
        (_number(best["ratio"]), best["case"], _number(worst["ratio"]), worst["case"])
        for best, worst in zip(summary["best"], summary["worst"], strict=True)
    ]
    return [("ratio", "best cases", "ratio", "worst cases"), *rows]


def troubles(case: dict[str, Any]) -> list[str]:
    """What did not go as it should, of one case."""
    found = []
    for name, each in case["contestants"].items():
        if "error" in each:
            found.append(f"{name}: {each['error']}")
        elif each["not_captured"] is not None:
            found.append(f"{name}: timed without a CUDA graph: {each['not_captured']}")
    return found


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value * 100:.0f} %"


def _selected(selected: list[dict[str, Any]]) -> str:
    several = len(selected) > 1
    return "; ".join(
        f"{one['direction'] + ' ' if several else ''}{one['candidate']}, {one['source']}"
        + (f", in graphs {one['captured']}" if one.get("captured") else "")
        for one in selected
    )
