"""Run every candidate of many problems and compare each with float64, not only the chosen ones.

python tests/record_values.py --out tests/results/values-h200.json

A kernel that faults ends its process, so candidates run in child processes that say what they
begin: one that dies is recorded, and the next child goes on behind it. Some work at once, each on
every n-th trial. Candidates that dgrad leaves out for their precision are run too: this is where
the reasons come from.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from code_hash import code_hash
from dgrad import _candidates, _fallback, _loader, config
from dgrad._call import Call
from dgrad._geometry import Geometry
from dgrad._operands import INPUTS, OUTPUT
from dgrad.bench import environment
from dgrad.selection import FUSED, IDENTITY, Candidate
from reference import TOLERANCES, Case, Expected, arguments, errors, expected, random_case

_SEED = 20261121
_RANDOM = 40
_CHILDREN = 6
_COMPILED = 2  # so many of a problem's engines that cuDNN compiles, a tenth of a second each
_LARGER = (  # of real models, cut down
    Case(4, 32, 32, (48, 48), (7, 7), padding=(3, 3)),
    Case(8, 64, 32, (16, 16), (4, 4), (2, 2), (1, 1)),
    Case(2, 64, 64, (24, 40), (3, 7)),
    Case(2, 32, 64, (16, 24), (3, 5), (2, 3), (1, 2), dilation=(2, 1), groups=4),
    Case(4, 32, 32, (16, 16), (4, 4), (2, 2), (1, 1), groups=32),
    Case(2, 56, 1, (20, 32), (9, 9), (4, 4), (4, 4), (3, 3)),
    Case(1, 21, 21, (7, 9), (16, 16), (8, 8), (4, 4)),
    Case(16, 100, 64, (1, 1), (4, 4)),
)


def _aligned(case: Case) -> Case:
    """With channels by eights in each group, as tensor cores want them."""
    c_in, c_out = (-(-c // (8 * case.groups)) * 8 * case.groups for c in (case.c_in, case.c_out))
    return replace(case, c_in=c_in, c_out=c_out)


def cases() -> list[Case]:
    """Random ones of every kind, with channels by eights too, then the larger ones in every
    precision and layout."""
    found = [
        Case(**{**vars(case), "precision": precision, "layout": layout, "grad_layout": layout})
        for case in _LARGER
        for precision in TOLERANCES
        for layout in ("nchw", "channels_last")
    ]
    drawn = [random_case(_SEED, index) for index in range(_RANDOM)]
    drawn += [_aligned(random_case(_SEED, _RANDOM + index)) for index in range(_RANDOM)]
    drawn.append(random_case(20260117, 224))  # tf32 at an address of 4 bytes' alignment
    entering = [
        case
        for case in drawn
        if all(case.output_padding[i] < case.stride[i] for i in (0, 1))  # else rows are appended
    ]
    return entering + found


class Trial:
    """One direction of a case: its tensors, its candidates, and what is right."""

    def __init__(self, case: Case, direction: str) -> None:
        given = arguments(case)
        x, w, grad, bias = (
            None if t is None else t.detach()
            for t in (given.input, given.weight, given.grad_output, given.bias)
        )
        assert x is not None
        assert w is not None
        assert grad is not None
        x, grad = (t if t.dim() == 4 else t.unsqueeze(0) for t in (x, grad))
        slots = {"y": x, "w": w, "x": grad}
        geometry = Geometry(case.padding, case.stride, case.dilation, case.groups)
        size = tuple(slots[OUTPUT[direction]].shape[2:])
        a, b = (slots[slot] for slot in INPUTS[direction])
        self.bias = bias if direction == "dgrad" else None
        strict = config.Flags(allow_tf32=case.precision == "tf32", selection="heuristic")
        deciding = config.deciding(direction, strict)
        call = Call(direction, a, b, geometry, size, deciding, self.bias)
        runner = call._single
        assert runner is not None
        self.problem, self.runner = runner._problem, runner
        memory_format = call._format
        self.inputs = [t.contiguous(memory_format=memory_format) for t in (a, b)]
        self.out = torch.empty(
            call._out_shape, dtype=x.dtype, device="cuda", memory_format=memory_format
        )
        self.direction, self.geometry, self.size = direction, geometry, size
        name = {"dgrad": "output", "fprop": "grad_input", "wgrad": "grad_weight"}[direction]
        right = expected(case, given)[name]
        self.right = Expected(*(t.reshape(self.out.shape) for t in (right.value, right.size)))
        self.spoiled = self.inputs[0].clone(memory_format=torch.preserve_format)
        self.spoiled[tuple(n // 2 for n in self.spoiled.shape)] = math.nan
        exact = _fallback.run(
            direction,
            self.spoiled.double().cpu(),
            self.inputs[1].double().cpu(),
            geometry,
            size,
        )
        self.nan = exact.isnan()
        found = _candidates.gather(self.problem)
        compiled = [c for c in found if c.bias == FUSED or c.algorithm.endswith(IDENTITY)]
        self.candidates = [c for c in found if c not in compiled[_COMPILED:]]

    def run(self, candidate: Candidate) -> dict[str, Any]:
        """The candidate's error, and how NaN flows through it; or why it does not run."""
        try:
            plan = _candidates.plan_of(self.problem, candidate)
            if plan.workspace_bytes > 2**33:
                return {"refused": f"workspace of {plan.workspace_bytes} bytes"}
            self._execute(plan, candidate, self.inputs[0])
            error = errors(self.out, self.right)[0]
            self._execute(plan, candidate, self.spoiled)
        except RuntimeError as failure:  # cuDNN's errors too
            if "CUDA error" in str(failure):
                raise  # a fault: nothing more runs in this process
            return {"refused": str(failure).splitlines()[0][:200]}
        nan = self.out.isnan().cpu()
        return {
            "notes": [n for n in plan.notes if n != "TENSOR_CORE"],
            "error": None if math.isinf(error) else error,
            "nan_lost": int((self.nan & ~nan).sum()),
            "nan_spread": int((nan & ~self.nan).sum()),
        }

    def _execute(self, plan: Any, candidate: Candidate, first: torch.Tensor) -> None:
        slots = dict(zip(INPUTS[self.direction], (first, self.inputs[1]), strict=True))
        slots[OUTPUT[self.direction]] = self.out
        self.out.fill_(math.nan if first is self.inputs[0] else 0.0)
        self.runner._execute(plan, candidate.bias, slots["x"], slots["w"], slots["y"], self.bias)
        torch.cuda.synchronize()


def _jobs() -> list[tuple[Case, str]]:
    return [(case, direction) for case in cases() for direction in OUTPUT]


def _child(start: int, skip: int, end: float) -> None:
    """Run every ``_CHILDREN``-th trial from ``start``, its first candidate being ``skip``; one line
    before each candidate, one after. None is begun after ``end``, in seconds since the epoch."""
    jobs = _jobs()
    for number in range(start, len(jobs), _CHILDREN):
        if time.time() > end:
            break
        case, direction = jobs[number]
        trial = Trial(case, direction)
        for index, candidate in enumerate(trial.candidates):
            if number == start and index < skip:
                continue
            what = {
                "trial": number,
                "index": index,
                "problem": str(trial.problem).rpartition(" device=")[0],
                "direction": direction,
                "precision": case.precision,
                "candidate": str(candidate),
                "rejected": candidate.rejected,
            }
            print(json.dumps({"begin": what}), flush=True)
            print(json.dumps({"end": trial.run(candidate)}), flush=True)
    print(json.dumps({"finished": len(jobs)}), flush=True)


def _run_share(first: int, end: float) -> list[dict[str, Any]]:
    """What comes of every ``_CHILDREN``-th trial from the first."""
    runs: list[dict[str, Any]] = []
    start, skip = first, 0
    while True:
        command = [sys.executable, __file__, "--child", *map(str, (start, skip, end))]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert child.stdout is not None
        begun: dict[str, Any] | None = None
        finished = False
        for line in child.stdout:
            message = json.loads(line)
            if "begin" in message:
                begun = message["begin"]
            elif "end" in message:
                assert begun is not None
                runs.append(begun | message["end"])
                begun = None
            else:
                finished = True
        _, complaint = child.communicate()
        if finished:
            return runs
        if begun is None:
            raise RuntimeError(f"a child ended before it began anything:\n{complaint[-2000:]}")
        words = [line for line in complaint.splitlines() if "CUDA error" in line]
        fault = words[0] if words else f"exit code {child.returncode}"
        print(json.dumps(begun | {"fault": fault}), file=sys.stderr, flush=True)
        runs.append(begun | {"fault": fault})
        start, skip = begun["trial"], begun["index"] + 1


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Per engine, direction and precision the worst; and each run that is wrong."""
    engines: dict[str, dict[str, Any]] = {}
    wrong = []
    for run in runs:
        name = run["candidate"].split("_k")[0].split(" + ")[0]
        key = " ".join((run["direction"], run["precision"], name))
        one = engines.setdefault(
            key,
            {"runs": 0, "refused": 0, "error": 0.0, "nan_lost": 0, "nan_spread": 0, "notes": []},
        )
        one["runs"] += 1
        if "refused" in run:
            one["refused"] += 1
            continue
        if "fault" not in run:
            one["notes"] = sorted({*one["notes"], *run["notes"]})
            errors = one["error"], run["error"]  # None is of a result that is not finite
            one["error"] = None if None in errors else max(errors)
            one["nan_lost"] = max(one["nan_lost"], run["nan_lost"])
            one["nan_spread"] = max(one["nan_spread"], run["nan_spread"])
        bad = "fault" in run or run["error"] is None or run["nan_lost"]
        if bad or run["error"] > TOLERANCES[run["precision"]]:
            wrong.append(run)
    accepted = [run for run in runs if run["rejected"] is None and "refused" not in run]
    return {
        "trials": len({run["trial"] for run in runs}),
        "problems": len({run["problem"] for run in runs}),
        "candidates": len(runs),
        "accepted": len(accepted),
        "accepted_and_wrong": sum(run["rejected"] is None for run in wrong),
        "wrong": wrong,
        "engines": dict(sorted(engines.items())),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument(
        "--seconds", type=float, default=1e6, help="begin no trial after so many seconds"
    )
    parser.add_argument("--child", type=float, nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    _loader.require()
    if options.child:
        start, skip, end = options.child
        _child(int(start), int(skip), end)
        return 0
    end = time.time() + options.seconds
    with ThreadPoolExecutor(_CHILDREN) as pool:
        shares = list(pool.map(partial(_run_share, end=end), range(_CHILDREN)))
    runs = sorted(itertools.chain(*shares), key=lambda run: (run["trial"], run["index"]))
    summary = _summary(runs)
    versions = environment.versions()
    versions.pop("cudnn_path")
    meta = {
        "command": "python tests/record_values.py",
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "code_hash": code_hash(),
        "trials": len(_jobs()),
    }
    if options.out:
        options.out.write_text(json.dumps({"meta": meta, **summary}, indent=1) + "\n")
    print(json.dumps({k: v for k, v in summary.items() if k not in ("wrong", "engines")}))
    for run in summary["wrong"]:
        if run["rejected"] is None:
            print(json.dumps(run))
    return int(summary["accepted_and_wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
