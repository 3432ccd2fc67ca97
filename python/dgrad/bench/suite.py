"""What `bench` runs: the layers of a suite, crossed with dtypes and layouts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dgrad._layers import Layer, layers
from dgrad.exceptions import first_line
from dgrad.tune import FileError, read

_FOLDER = Path(__file__).with_name("suites")
SUITES = ("layers", "kernelbench")
LAYOUTS = ("nchw", "nhwc")
DIRECTIONS = ("forward", "training")
_PAIRS = ("kernel", "stride", "padding", "output_padding", "dilation")


@dataclass(frozen=True, slots=True)
class Case:
    """One layer in one dtype and layout, and what is timed of it.

    Attributes:
        name: the layer's, unique in its suite.
        source: where the layer comes from, or None.
        layer: its sizes, with dtype and layout.
        direction: "forward", or "training": the forward pass and all its gradients as one step.
    """

    name: str
    source: str | None
    layer: Layer
    direction: str

    @property
    def dtype(self) -> str:
        return str(self.layer.dtype).removeprefix("torch.")

    @property
    def layout(self) -> str:
        return LAYOUTS[self.layer.channels_last]

    @property
    def label(self) -> str:
        """Unique in a record, such as "dcgan/G2 float32 nchw"."""
        return f"{self.name} {self.dtype} {self.layout}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, from which :meth:`from_dict` makes the same case again."""
        sizes = dict(zip(("N", "C_in", "H", "W"), self.layer.input, strict=True))
        return {
            "name": self.name,
            "source": self.source,
            "dtype": self.dtype,
            "layout": self.layout,
            "direction": self.direction,
            "layer": {
                **sizes,
                "C_out": self.layer.out_channels,
                **{name: list(getattr(self.layer, name)) for name in _PAIRS},
                "groups": self.layer.groups,
                "bias": self.layer.bias,
            },
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Case:
        layer = _layer(value["layer"], value["dtype"], value["layout"])
        return cls(value["name"], value["source"], layer, value["direction"])


def cases(
    suite: str,
    dtypes: Sequence[str] = ("float32",),
    layouts: Sequence[str] = ("nchw",),
    direction: str = "forward",
    only: str = "",
) -> list[Case]:
    """All cases of a suite, in its order: each layer in each dtype and layout.

    Args:
        suite: "layers", "kernelbench", or a file: a JSON list or JSON lines of layers, as
            ``python -m dgrad tune`` takes them. The dtype and layout that one names are not used.
        dtypes, layouts, direction: see :class:`Case`.
        only: a regular expression; layers whose name does not match it anywhere are left out.

    Raises:
        FileError: the file cannot be read, an entry is no layer, a name occurs twice, or none
            matches; the message says which.
    """
    try:
        wanted = re.compile(only)
    except re.error as error:
        raise FileError(f"{only!r} is no regular expression: {error}") from error
    entries = _entries(suite)
    found = [
        Case(name, entry.get("source"), _layer(entry, dtype, layout), direction)
        for name, entry in entries.items()
        if wanted.search(name)
        for dtype in dtypes
        for layout in layouts
    ]
    if not found:
        raise FileError(f"no layer of {suite} matches {only!r}")
    return found


def _entries(suite: str) -> dict[str, Mapping[str, Any]]:
    """The entries by name, each of which is a layer."""
    file = str(_FOLDER / f"{suite}.json") if suite in SUITES else suite
    found: dict[str, Mapping[str, Any]] = {}
    for entry in read(file):
        where, value = f"{suite}: {entry.where}", entry.value
        if not isinstance(value, dict):
            raise FileError(f"{where}: expected a layer, not {value!s:.80}")
        try:
            _layer(value, "float32", "nchw")
        except (RuntimeError, TypeError, ValueError) as error:
            raise FileError(f"{where}: {first_line(error)}") from error
        name = str(value.get("name") or entry.where)
        if name in found:
            raise FileError(f"{where}: the name {name!r} occurs twice")
        found[name] = value
    return found


def _layer(entry: Mapping[str, Any], dtype: str, layout: str) -> Layer:
    (layer,) = layers({**entry, "dtype": dtype})
    return replace(layer, channels_last=layout == "nhwc")
