"""Writes the README's numbers from the recorded runs: `python tests/readme_table.py`.

With `--check` nothing is written, and the exit status says whether the README is up to date.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "tests" / "results"


def table(record: dict[str, Any]) -> str:
    """The comparison as a Markdown table, and what it was measured with."""
    lines = [
        "| problem | equal | PyTorch, ms | PyTorch benchmark, ms | dgrad, ms | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for case in record["cases"]:
        lines.append(_row(case["problem"], case))
        if "heuristic" in case:
            lines.append(_row(f'{case["problem"]}, `selection="heuristic"`', case["heuristic"]))
    meta = record["meta"]
    versions = meta["versions"]
    lines.append("")
    lines.append(
        f"{meta['device']}, driver {meta['driver']}, PyTorch {versions['torch']}, "
        f"cuDNN {versions['cudnn_loaded']}."
    )
    for case in record["cases"]:
        errors = case["float64_errors"]
        if errors is not None:
            lines.append(
                f"\n{case['problem']}: the relative error against float64 is "
                f"{errors['dgrad']:.1g} for dgrad and {errors['pytorch']:.1g} for PyTorch."
            )
    return "\n".join(lines)


def models_table(record: dict[str, Any]) -> str:
    """Whole models, forward and a training step, with the relative errors against float64."""
    lines = [
        "| model | | PyTorch, ms | PyTorch benchmark, ms | dgrad, ms | ratio "
        "| error of PyTorch | of dgrad |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in record["cases"]:
        for what, part in (("forward", case), ("step", case["training"])):
            times = [part[which] for which in ("pytorch_ms", "pytorch_benchmark_ms", "dgrad_ms")]
            errors = part["float64_errors"] or {}
            cells = [f"{time:.3f}" for time in times] + [f"{part['ratio']:.2f}"]
            unknown = "equal" if part["equal"] else "not known"
            cells += [
                f"{errors[who]:.1g}" if who in errors else unknown for who in ("pytorch", "dgrad")
            ]
            lines.append(f"| {case['problem']} | {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _row(name: str, case: dict[str, Any]) -> str:
    times = [case[which] for which in ("pytorch_ms", "pytorch_benchmark_ms", "dgrad_ms")]
    return (
        f"| {name} | {'yes' if case['equal'] else 'no'} | "
        + " | ".join(f"{time:.3f}" for time in times)
        + f" | {case['ratio']:.2f} |"
    )


def log_line(record: dict[str, Any]) -> str:
    """The selection that the recorded run of kb65 logged."""
    case = next(case for case in record["cases"] if case["problem"] == "kb65")
    return f"```\n[dgrad] {case['selected'][0]}\n```"


def host_table(record: dict[str, Any]) -> str:
    """The host's time of one call of the smallest layer, and how it compares for all of them."""
    lines = [
        "| tiny layer | bias | PyTorch, us (99 %) | dgrad, us (99 %) | dgrad / PyTorch |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {case['call']} | {'yes' if case['bias'] else 'no'} | "
        f"{case['pytorch_us']:.1f} ({case['pytorch_p99_us']:.1f}) | "
        f"{case['dgrad_us']:.1f} ({case['dgrad_p99_us']:.1f}) | {case['ratio']:.2f} |"
        for case in record["cases"]
        if case["layer"] == "tiny"
    ]
    by_call: dict[str, list[dict[str, Any]]] = {}
    for case in record["cases"]:
        by_call.setdefault(case["call"], []).append(case)
    layers = len({case["layer"] for case in record["cases"]})
    lines += [
        f"\n| {layers} layers, dgrad / PyTorch | geometric mean | largest |",
        "|---|---|---|",
    ]
    for call, cases in by_call.items():
        worst = max(cases, key=lambda case: case["ratio"])
        name = worst["layer"] + (" with bias" if worst["bias"] else "")
        lines.append(f"| {call} | {_geomean(cases):.2f} | {worst['ratio']:.2f} ({name}) |")
    return "\n".join(lines)


def bias_table(record: dict[str, Any]) -> str:
    """The layers with a bias against the same without, by dtype and layout."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in record["cases"]:
        groups.setdefault(f"{case['dtype']} {case['layout']}", []).append(case)
    lines = [
        "| dtype, layout | layers | more than 1.15 | geometric mean | largest |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {len(cases)} | {sum(case['ratio'] > 1.15 for case in cases)} | "
        f"{_geomean(cases):.2f} | {max(case['ratio'] for case in cases):.2f} |"
        for name, cases in [*groups.items(), ("all", record["cases"])]
    ]
    return "\n".join(lines)


def _geomean(cases: list[dict[str, Any]]) -> float:
    return statistics.geometric_mean(case["ratio"] for case in cases)


def bench_table(record: dict[str, Any]) -> str:
    """The groups of a bench, and its best and worst cases."""
    summary = record["summary"]
    lines = [
        "| dtype, layout | layers | slower than 0.97 | geometric mean | smallest | eager mode |",
        "|---|---|---|---|---|---|",
    ]
    rows = [(f"{g['dtype']} {g['layout']}", g) for g in summary["groups"]]
    lines += [
        f"| {name} | {g['cases']} | {g['slower']} | {g['geomean_ratio']:.2f} | "
        f"{g['min_ratio']:.2f} | {g['geomean_eager_ratio']:.2f} |"
        for name, g in [*rows, ("all", summary)]
    ]
    for which in ("best", "worst"):
        lines.append(f"\n<details><summary>The ten {which}</summary>\n")
        lines += [f"- {each['case']}: {each['ratio']:.2f}" for each in summary[which]]
        lines.append("\n</details>")
    return "\n".join(lines)


def updated(readme: str) -> str:
    """The README's text with every marked part made again."""
    for kind, make in (
        ("table", table),
        ("models", models_table),
        ("bench", bench_table),
        ("log", log_line),
        ("host", host_table),
        ("bias", bias_table),
    ):
        pattern = rf"(<!-- {kind}: (\S+) -->\n).*?(<!-- end -->)"

        def replacement(match: re.Match[str], make: Any = make) -> str:
            record = json.loads((RESULTS / match[2]).read_text())
            return f"{match[1]}{make(record)}\n{match[3]}"

        readme = re.sub(pattern, replacement, readme, flags=re.DOTALL)
    return readme


def main() -> int:
    before = README.read_text()
    after = updated(before)
    if "--check" in sys.argv:
        return int(after != before)
    README.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
