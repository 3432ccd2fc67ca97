"""Make one record of the parts that `pytest -m gpu --part K/N` wrote: python tests/merge_gpu.py

The parts may run at once, each on a GPU of its own. All must be of the same code and versions.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

_RESULTS = Path(__file__).resolve().parent / "results"
_PART = re.compile(r"(?P<name>gpu(?:-\w+)?)\.part-(?P<number>\d+)-of-(?P<count>\d+)\.json")
_SUMMED = ("passed", "failed", "skipped", "failures", "duration_s")
_EACH_ITS_OWN = ("command", "date")


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One record; ValueError where parts are of different code, versions or devices."""
    whole = dict(parts[0])
    for part in parts[1:]:
        for field, value in part.items():
            if field in _SUMMED:
                whole[field] += value
            elif field not in _EACH_ITS_OWN and whole[field] != value:
                raise ValueError(f"{field} is {whole[field]!r} in one part, {value!r} in another")
    whole["duration_s"] = round(whole["duration_s"], 1)
    whole["command"] = " & ".join(part["command"] for part in parts)
    whole["date"] = max(part["date"] for part in parts)
    return whole


def main(folder: Path = _RESULTS) -> int:
    found: dict[tuple[str, int], dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = _PART.fullmatch(path.name)
        if match:
            which = match["name"], int(match["count"])
            found.setdefault(which, {})[int(match["number"])] = path
    names = [name for name, _ in found]
    for (name, count), paths in found.items():
        if names.count(name) > 1:
            print(f"{name}: there are parts of two runs: remove one's", file=sys.stderr)
            return 1
        missing = sorted({*range(1, count + 1)} - paths.keys())
        if missing:
            print(f"{name}: of {count} parts these are missing: {missing}", file=sys.stderr)
            return 1
        record = merged([json.loads(paths[n].read_text()) for n in range(1, count + 1)])
        (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        for path in paths.values():
            path.unlink()
        print(f"{name}: {record['passed']} passed, {record['failed']} failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
