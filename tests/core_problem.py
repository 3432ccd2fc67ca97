"""A problem of the native module, whose tests are skipped where it cannot be used."""

from __future__ import annotations

from typing import Any

import pytest

from dgrad import _loader

core, reason = _loader.load()
if core is None:
    pytest.skip(f"the native module cannot be used: {reason}", allow_module_level=True)

# Every size is another number where it can be, so that swapped fields show.
BASE: dict[str, Any] = {
    "direction": "dgrad",
    "dtype": "float32",
    "tf32": False,
    "layout": "nchw",
    "x": (2, 6, 9, 11),
    "w": (4, 3, 3, 2),
    "y": (2, 4, 5, 6),
    "padding": (1, 1),
    "stride": (2, 2),
    "dilation": (1, 2),
    "groups": 2,
    "bias": False,
    "alignment": 16,
    "device": 0,
}


def problem(**changes: Any) -> Any:
    assert core is not None
    return core.Problem(**(BASE | changes))
