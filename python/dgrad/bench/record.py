"""What `bench` records: cases, what they come to, and a file that a later run can go on with."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dgrad.bench import roofline
from dgrad.bench.contest import OURS
from dgrad.bench.suite import Case

SLOWER = 0.97  # below it a ratio counts as a loss and not as noise
_NAMED = 10
_SAME = ("device", "driver", "versions", "tf32", "options")
# What reading a file that somebody has changed may raise.
DAMAGED = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError)
_NEEDED = (*_SAME, "ceilings", "command", "time")


class RecordError(Exception):
    """A file is no record, or records do not belong together. The message says why."""


def label(case: Mapping[str, Any]) -> str:
    """:attr:`dgrad.bench.suite.Case.label` of a recorded case."""
    return f"{case['name']} {case['dtype']} {case['layout']}"


def unfinished(path: str | Path) -> Path:
    """The name under which :meth:`Record.save` writes."""
    return Path(f"{path}.tmp")


class Record:
    """The cases of one or more runs on one machine under the same settings.

    Attributes:
        meta (dict): command, time, device, driver, versions, tf32, options, and the ceilings.
        cases (dict): by label, each as :meth:`add` leaves it.
    """

    def __init__(self, meta: Mapping[str, Any]) -> None:
        self.meta = dict(meta)
        self.cases: dict[str, dict[str, Any]] = {}

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Raises RecordError."""
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            record = cls({name: value["meta"][name] for name in (*value["meta"], *_NEEDED)})
            names = {*record.meta["options"]["against"], OURS}
            for case in value["cases"]:
                if case["contestants"].keys() != names:
                    raise ValueError(f"{label(case)} is not of {', '.join(names)}")
                record.add(case)
        except OSError as error:
            raise RecordError(f"{path}: {error.strerror or error}") from error
        except DAMAGED as error:
            raise RecordError(f"{path} is no record of bench: {error!r}") from error
        return record

    def add(self, case: Mapping[str, Any]) -> dict[str, Any]:
        """Add a timed case, in the place of an earlier one with its label.

        Returns:
            The case with "flops" and "bytes" (once a pass), "floor_ms", "best" (the fastest
            peer), "ratio" and "eager_ratio" (the better peer's time over dgrad's) and "achieved"
            (the floor over dgrad's time). What failed is None.
        """
        judged = _judged(case, self.meta["ceilings"])
        self.cases[label(case)] = judged
        return judged

    def has(self, case: Case) -> bool:
        """Whether the case is finished: one of which a contestant failed is not."""
        found = self.cases.get(case.label)
        return (
            found is not None and not _failed(found) and found["layer"] == case.to_dict()["layer"]
        )

    def expect(self, **wanted: Any) -> None:
        """Raises RecordError where the record's meta has other values."""
        for name, value in wanted.items():
            if self.meta[name] != value:
                raise RecordError(f"{name}: {_difference(self.meta[name], value)}")

    def absorb(self, other: Record) -> None:
        """Take the cases of another record too, and the larger of each ceiling.

        Raises RecordError where the records are of different machines, versions or options.
        """
        other.expect(**{name: self.meta[name] for name in _SAME})
        ceilings = roofline.larger(other.meta["ceilings"], self.meta["ceilings"])
        self.meta["ceilings"] = ceilings
        commands = dict.fromkeys((*other.meta["command"].split(" && "), self.meta["command"]))
        self.meta["command"] = " && ".join(commands)
        self.meta["time"] = min(self.meta["time"], other.meta["time"])
        own = {name: case for name, case in self.cases.items() if not _failed(case)}
        merged = {**self.cases, **other.cases, **own}
        self.cases = {}
        for case in merged.values():
            self.add(case)

    def summary(self) -> dict[str, Any]:
        """Counts and geometric means of all cases, of each dtype and layout, and the extremes."""
        cases = list(self.cases.values())
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for case in cases:
            groups.setdefault((case["dtype"], case["layout"]), []).append(case)
        ranked = sorted(
            ((case["ratio"], name) for name, case in self.cases.items() if case["ratio"]),
            reverse=True,
        )
        extremes = {"best": ranked[:_NAMED], "worst": ranked[::-1][:_NAMED]}
        return {
            **_counted(cases),
            "groups": [
                {"dtype": dtype, "layout": layout, **_counted(members)}
                for (dtype, layout), members in groups.items()
            ],
            **{
                which: [{"case": name, "ratio": ratio} for ratio, name in found]
                for which, found in extremes.items()
            },
        }

    def to_dict(self) -> dict[str, Any]:
        """The whole record as plain data: meta, cases, summary."""
        return {
            "meta": self.meta,
            "cases": list(self.cases.values()),
            "summary": self.summary(),
        }

    def save(self, path: str | Path) -> None:
        """Write it, a case a line, under another name first: no reader sees half of it."""
        whole = self.to_dict()
        cases = ",\n".join(json.dumps(case, allow_nan=False) for case in whole["cases"])
        text = (
            f'{{\n"meta": {json.dumps(whole["meta"], indent=1)},\n'
            f'"cases": [\n{cases}\n],\n'
            f'"summary": {json.dumps(whole["summary"], indent=1)}\n}}\n'
        )
        unfinished(path).write_text(text, encoding="utf-8")
        os.replace(unfinished(path), path)


def _judged(case: Mapping[str, Any], ceilings: roofline.Ceilings) -> dict[str, Any]:
    work = roofline.passes(Case.from_dict(case).layer, case["direction"])
    floor_ms = roofline.floor_ms(work, case["dtype"], ceilings)
    times = {
        name: (each["device_ms"]["median"], each["eager_ms"])
        for name, each in case["contestants"].items()
        if "error" not in each
    }
    ours = times.pop(OURS, None)
    best = min(times, key=lambda name: times[name][0], default=None)
    ratios: list[float | None] = [None, None]
    if ours is not None and times:
        ratios = [
            _over(min(theirs), mine)
            for theirs, mine in zip(zip(*times.values(), strict=True), ours, strict=True)
        ]
    return {
        **case,
        "flops": sum(each.flops for each in work),
        "bytes": sum(each.bytes for each in work),
        "floor_ms": float(f"{floor_ms:.5g}"),
        "best": best,
        "ratio": ratios[0],
        "eager_ratio": ratios[1],
        "achieved": None if ours is None else _over(floor_ms, ours[0]),
    }


def _failed(case: Mapping[str, Any]) -> bool:
    """Whether a contestant failed: what ratio there is may be one against the slower peer."""
    return case["ratio"] is None or any("error" in each for each in case["contestants"].values())


def _over(a: float, b: float) -> float | None:
    return float(f"{a / b:.5g}") if a > 0 and b > 0 else None


def _counted(cases: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    cases = list(cases)
    ratios = _known(cases, "ratio")
    return {
        "cases": len(cases),
        "failed": sum(map(_failed, cases)),
        "slower": sum(ratio < SLOWER for ratio in ratios),
        "geomean_ratio": _geomean(ratios),
        "min_ratio": min(ratios, default=None),
        "geomean_eager_ratio": _geomean(_known(cases, "eager_ratio")),
        "geomean_achieved": _geomean(_known(cases, "achieved")),
    }


def _known(cases: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    return [case[name] for case in cases if case[name] is not None]


def _geomean(values: list[float]) -> float | None:
    return round(statistics.geometric_mean(values), 4) if values else None


def _difference(recorded: Any, wanted: Any) -> str:
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        names = [name for name in {**recorded, **wanted} if recorded.get(name) != wanted.get(name)]
        parts = [(f"{name} ", recorded.get(name), wanted.get(name)) for name in names]
    else:
        parts = [("", recorded, wanted)]
    return ", ".join(f"{name}{old!r} was recorded, now {new!r}" for name, old, new in parts)
