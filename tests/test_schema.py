"""The JSON Schema of a selection's record tells right records from wrong ones."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
import torch

import dgrad
from dgrad import _loader, config, log

pytest.importorskip("jsonschema", reason="needs jsonschema, of the extra 'test'")

from jsonschema import Draft202012Validator, FormatChecker

SCHEMA = json.loads(resources.files("dgrad").joinpath("selection.schema.json").read_text())
VALIDATOR = Draft202012Validator(SCHEMA, format_checker=FormatChecker())
Record = dict[str, Any]

_OUT_OF_MEMORY = "out of memory: no room for its workspace of 4.0 GiB"


def _problem(**changes: Any) -> Any:
    fields: Record = {
        "direction": "dgrad",
        "dtype": "float32",
        "tf32": True,
        "layout": "nchw",
        "x": (8, 32, 19, 20),
        "w": (64, 16, 3, 4),
        "y": (8, 64, 9, 9),
        "padding": (0, 0),
        "stride": (2, 2),
        "dilation": (1, 1),
        "groups": 2,
        "bias": False,
        "alignment": 16,
        "device": 0,
    }
    return _loader.require().Problem(**(fields | changes))


def _selection(**changes: Any) -> dgrad.Selection:
    best = dgrad.Candidate("legacy", "ALGO_1", "TENSOR_OP_MATH", True, 1 << 20, time_ms=0.5)
    others = (
        replace(best, algorithm="ALGO_0", deterministic=False, time_ms=0.75),
        replace(best, algorithm="FFT", time_ms=None, skipped=True),
        replace(best, algorithm="WINOGRAD", time_ms=None, rejected="NOT_SUPPORTED"),
        replace(
            best, algorithm="FFT_TILING", rejected=_OUT_OF_MEMORY, out_of_memory=True, time_ms=None
        ),
        dgrad.Candidate("graph", "eng5_k2=3_k24=0+identity", "FMA_MATH", True, 0, time_ms=0.9),
        dgrad.Candidate("graph", "eng5_k2=4", "FMA_MATH", True, 0),
    )
    fields: Record = {
        "problem": _problem(),
        "candidates": (best, *others),
        "chosen": 0,
        "objections": tuple(candidate.rejected for candidate in (best, *others)),
        "source": "measured",
    }
    return dgrad.Selection(**(fields | changes))


def _record(monkeypatch: pytest.MonkeyPatch, policy: Any = None, **changes: Any) -> Record:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"NVIDIA GPU {device}")
    # as written to the file and read again
    line = json.dumps(log.record(_selection(**changes), policy or config.policy()))
    record: Record = json.loads(line)
    return record


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Record:
    return _record(monkeypatch)


def test_the_schema_itself_is_valid() -> None:
    Draft202012Validator.check_schema(SCHEMA)


def test_a_record_validates_and_holds_every_field(record: Record) -> None:
    VALIDATOR.validate(record)
    definitions = SCHEMA["$defs"]
    selection = definitions["selection"]["properties"]
    assert set(record) == {*SCHEMA["properties"], *selection}
    for name, part in (
        ("flags", record["flags"]),
        ("problem", record["problem"]),
        ("candidate", record["candidates"][0]),
    ):
        assert (
            set(part) == set(definitions[name]["properties"]) == set(definitions[name]["required"])
        )


def test_records_under_all_flags_and_sources_validate(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: Record = {"workspace_limit": "1MiB", "measure_budget": 0, "deterministic": True}
    command = {"dgrad": ["graph:eng5_k2=3", "legacy"], "wgrad": ["legacy:ALGO_0", "graph"]}
    for flags in (dgrad.Flags(**limits), dgrad.Flags(selection="heuristic", algorithm=command)):
        VALIDATOR.validate(_record(monkeypatch, config.policy(flags)))
    for source in ("forced", "heuristic", "stored"):
        VALIDATOR.validate(_record(monkeypatch, source=source))
    for changes in (
        {"dtype": "bfloat16", "tf32": False, "layout": "nhwc", "alignment": 2},
        {"direction": "wgrad", "tf32": False, "device": 3},
    ):
        VALIDATOR.validate(_record(monkeypatch, problem=_problem(**changes)))


@pytest.mark.parametrize("bias", ["fused", "add", "eng1_k24=4"])
def test_records_of_each_way_to_add_a_bias_validate(
    bias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _selection()
    candidates = tuple(replace(candidate, bias=bias) for candidate in plain.candidates)
    record = _record(monkeypatch, problem=_problem(bias=True), candidates=candidates)
    VALIDATOR.validate(record)
    assert record["problem"]["bias"] is True
    assert {candidate["bias"] for candidate in record["candidates"]} == {bias}


def test_what_explain_prints_as_json_is_the_schemas_selection() -> None:
    part = {"$ref": "#/$defs/selection", "$defs": SCHEMA["$defs"]}
    selection = json.loads(json.dumps(_selection().to_dict()))
    Draft202012Validator(part).validate(selection)
    del selection["problem"]["stride"]
    assert not Draft202012Validator(part).is_valid(selection)


def _every_object(value: Any) -> list[Record]:
    """The value and all that it holds, as far as they are JSON objects with fixed fields."""
    if isinstance(value, list):
        return [found for part in value for found in _every_object(part)]
    if not isinstance(value, dict):
        return []
    parts = [part for name, part in value.items() if name != "algorithm"]
    return [value, *_every_object(parts)]


def test_no_field_may_lack_be_added_or_have_another_type(record: Record) -> None:
    count = len(_every_object(record))
    assert count == 3 + len(record["candidates"])
    for index in range(count):
        for name in list(_every_object(record)[index]):
            wrong = copy.deepcopy(record)
            del _every_object(wrong)[index][name]
            assert not VALIDATOR.is_valid(wrong), f"without {name}"
            wrong = copy.deepcopy(record)
            _every_object(wrong)[index][name] = {"of": "another type"}
            assert not VALIDATOR.is_valid(wrong), f"{name} is an object"
        wrong = copy.deepcopy(record)
        _every_object(wrong)[index]["extra"] = 1
        assert not VALIDATOR.is_valid(wrong)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r.update(format=3),
        lambda r: r.update(format=5),
        lambda r: r.update(time="yesterday"),
        lambda r: r.update(gpu=None),
        lambda r: r.update(cudnn="nine"),
        lambda r: r.update(candidates=[]),
        lambda r: r.update(chosen=-1),
        lambda r: r.update(chosen=0.5),
        lambda r: r.update(captured=-1),
        lambda r: r.update(source="guessed"),
        lambda r: r["flags"].update(selection="fastest"),
        lambda r: r["flags"].update(algorithm={"forward": ["legacy:ALGO_1"]}),
        lambda r: r["flags"].update(algorithm={"dgrad": "legacy:ALGO_1"}),
        lambda r: r["flags"].update(algorithm={"dgrad": ["kernel"]}),
        lambda r: r["flags"].update(algorithm={"dgrad": ["graphs"]}),
        lambda r: r["flags"].update(workspace_limit="1MiB"),
        lambda r: r["problem"].update(direction="forward"),
        lambda r: r["problem"].update(dtype="float16"),  # and tf32
        lambda r: r["problem"].update(x=[1, 2, 3]),
        lambda r: r["problem"].update(x=[1, 2, 3, 0]),
        lambda r: r["problem"].update(stride=[0, 1]),
        lambda r: r["problem"].update(padding=[0, -1]),
        lambda r: r["problem"].update(alignment=3),
        lambda r: r["problem"].update(bias=0),
        lambda r: r["problem"].update(bias=None),
        lambda r: r["candidates"][0].update(time_ms="0.5 ms"),
        lambda r: r["candidates"][0].update(deterministic=1),
        lambda r: r["candidates"][0].update(workspace_bytes=0.5),
        lambda r: r["candidates"][0].update(provider="other"),
        lambda r: r["candidates"][0].update(out_of_memory=True),  # and not rejected
        lambda r: r["candidates"][0].update(verdict=None),
        lambda r: r["candidates"][0].update(bias=""),
        lambda r: r["candidates"][0].update(bias=True),
    ],
)
def test_a_wrong_value_is_refused(record: Record, spoil: Callable[[Record], None]) -> None:
    assert VALIDATOR.is_valid(record)
    spoil(record)
    assert not VALIDATOR.is_valid(record)
