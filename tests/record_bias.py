"""What the bias costs: every layer of the suite that has one, with it and without.

python tests/record_bias.py --out tests/results/bias-h200.json

Device time of dgrad alone. A pass of its own for the bias reads and writes the output once more:
"pass_ms" is what that takes at the speed of a copy. "ways_ms" has the fastest candidate of each way
to add the bias, as the selection timed it, and of none.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dgrad
from code_hash import code_hash
from dgrad.bench._bench_worker import Contestant
from dgrad.bench.roofline import output_shape
from dgrad.bench.suite import LAYOUTS, Case, cases
from dgrad.selection import ADD, FUSED

_DTYPES = ("float32", "bfloat16")
_SAMPLES = 3
_TARGET = 1.15
_NAMED = 10


def _device_ms(contestant: Contestant, case: Case) -> tuple[float, str, dict[str, float]]:
    """The median, what was selected, and how long the fastest takes by how it adds the bias."""
    answer = contestant.prepare(case.to_dict())
    times = [ms for _ in range(_SAMPLES) for ms in contestant.sample()["device_ms"]]
    ways: dict[str, float] = {}
    for selection, _ in dgrad.selections():  # of this case alone
        for each in selection.candidates:
            way = each.bias if each.bias in (None, FUSED, ADD) else "pass"
            time_ms = each.time_ms if each.device_ms is None else each.device_ms
            if time_ms is not None:
                ways[way or "none"] = min(time_ms, ways.get(way or "none", math.inf))
    contestant.release()
    selected = answer["selected"]
    return statistics.median(times), selected[0]["candidate"] if selected else "", ways


def _timed(
    contestant: Contestant, wanted: list[Case], bytes_per_s: float, seconds: float
) -> Iterator[Any]:
    end = time.monotonic() + seconds
    for case in wanted:
        if time.monotonic() > end:
            return
        with_ms, selected, ways = _device_ms(contestant, case)
        without = replace(case, layer=replace(case.layer, bias=False))
        without_ms, selected_without, ways_without = _device_ms(contestant, without)
        moved = 2 * math.prod(output_shape(case.layer)) * case.layer.dtype.itemsize
        result = {
            "name": case.name,
            "dtype": case.dtype,
            "layout": case.layout,
            "biased_ms": with_ms,
            "unbiased_ms": without_ms,
            "pass_ms": moved / bytes_per_s * 1e3,
            "ratio": with_ms / without_ms,
            "selected": [selected, selected_without],
            "ways_ms": ways | ways_without,
            "code_hash": code_hash(),
        }
        print(f"{case.label}: {result['ratio']:.3f} ({selected})", flush=True)
        yield result


def _summary(timed: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [case["ratio"] for case in timed]
    worst = sorted(timed, key=lambda case: -case["ratio"])[:_NAMED]
    return {
        "cases": len(timed),
        "geomean_ratio": math.exp(statistics.fmean(map(math.log, ratios))),
        "max_ratio": max(ratios),
        "over_target": sum(ratio > _TARGET for ratio in ratios),
        "over_target_where_a_pass_fits": sum(
            case["ratio"] > _TARGET > 1 + case["pass_ms"] / case["unbiased_ms"] for case in timed
        ),
        "worst": [[case["name"], case["dtype"], case["layout"], case["ratio"]] for case in worst],
    }


def _kept(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["cases"] if path.exists() else []
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--only", default="", help="a regular expression of layers' names")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="begin no case after so many seconds"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep what the file has, of whatever code"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    options = parser.parse_args()
    contestant = Contestant("dgrad", options.device, "measure")
    ceilings = contestant.ceilings(["float32"])
    wanted = [
        case
        for dtype in _DTYPES
        for case in cases("layers", [dtype], LAYOUTS, only=options.only)
        if case.layer.bias
    ]
    timed = _kept(options.out) if options.resume else []
    known = {(case["name"], case["dtype"], case["layout"]) for case in timed}
    missing = [case for case in wanted if (case.name, case.dtype, case.layout) not in known]
    timed += _timed(contestant, missing, ceilings["copy_bytes_per_s"], options.seconds)
    meta = {
        "command": "python tests/record_bias.py",
        **contestant.describe(),
        "copy_bytes_per_s": ceilings["copy_bytes_per_s"],
        "wanted": len(wanted),
    }
    record = {"meta": meta, "cases": timed, "summary": _summary(timed)}
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["summary"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
