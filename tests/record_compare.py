"""Record `compare` for each problem of tests/kernelbench, or for each model of tests/models.

python tests/record_compare.py --out tests/results/compare-h200.json
python tests/record_compare.py --models --out tests/results/models-h200.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

from dgrad.bench.compare import CompareError, Comparison, compare

_HERE = Path(__file__).resolve().parent
_KEPT = (
    "equal",
    "max_abs_diff",
    "tolerance",
    "differences",
    "float64_errors",
    "dtype",
    "pytorch_ms",
    "pytorch_benchmark_ms",
    "dgrad_ms",
    "shares",
    "ratio",
    "spreads",
    "selected",
    "notes",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--models", action="store_true", help="those of tests/models")
    parser.add_argument("--device", help="default: the GPU, else the CPU")
    parser.add_argument("--budget", type=float, help="seconds of timed runs of each contestant")
    arguments = parser.parse_args()
    os.environ["DGRAD_STORE"] = "off"  # each problem is selected here, not by an earlier run

    meta: dict[str, Any] = {
        "command": " ".join(["python", "tests/record_compare.py", *sys.argv[1:]]),
        "code_hash": _code_hash(),
    }
    cases: list[dict[str, Any]] = []
    for file in sorted((_HERE / ("models" if arguments.models else "kernelbench")).glob("*.py")):
        try:
            comparison = compare(str(file), device=arguments.device, budget_s=arguments.budget)
            case = {"problem": file.stem} | _kept(comparison)
            if arguments.models:
                step = compare(
                    str(file), device=arguments.device, budget_s=arguments.budget, training=True
                )
                case["training"] = _kept(step)
            if not comparison.equal:
                # Measuring may choose another precision than PyTorch's heuristic; this does not.
                case["heuristic"] = _kept(
                    compare(
                        str(file),
                        device=arguments.device,
                        budget_s=arguments.budget,
                        selection="heuristic",
                    )
                )
        except CompareError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        meta |= _machine(comparison)
        cases.append(case)
        print(
            f"{file.stem}: equal {comparison.equal}, "
            f"PyTorch {comparison.pytorch.median_ms:.3f} ms, "
            f"benchmark on {comparison.pytorch_benchmark.median_ms:.3f} ms, "
            f"dgrad {comparison.dgrad.median_ms:.3f} ms, ratio {comparison.ratio:.3f}",
            flush=True,
        )
        _write(arguments.out, {"meta": meta, "cases": cases})  # what is done may be all there is
    equal = all(case["equal"] or case["heuristic"]["equal"] for case in cases)
    right = all(_right(case.get("training", case)) for case in cases)
    return 0 if equal and right else 1


def _right(result: dict[str, Any]) -> bool:
    """Whether a result is PyTorch's, or about as near to float64."""
    errors = result["float64_errors"]
    return result["equal"] or (errors is not None and errors["dgrad"] <= 2 * errors["pytorch"])


def _write(out: Path, record: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_suffix(".tmp")
    unfinished.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(unfinished, out)


def _kept(comparison: Comparison) -> dict[str, Any]:
    result = comparison.to_dict()
    return {key: result[key] for key in _KEPT}


def _machine(comparison: Comparison) -> dict[str, Any]:
    """Versions and device, without the paths of this machine."""
    versions = dict(comparison.versions)
    versions.pop("cudnn_path", None)
    driver = versions.pop("driver", None)
    return {"versions": versions, "device": comparison.device_name, "driver": driver}


def _code_hash() -> str:
    spec = importlib.util.spec_from_file_location("code_hash", _HERE / "code_hash.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.code_hash())


if __name__ == "__main__":
    sys.exit(main())
