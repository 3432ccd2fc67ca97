"""The commands explain and tune, on any machine: what is asked, told and returned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import dgrad
from dgrad import _layers, config, tune
from dgrad._watch import note
from dgrad.cli import main
from pretended import LAYER, LAYERS, MODEL, Pretended, pretend, problem, selection, told

pytestmark = pytest.mark.usefixtures("own_store")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    return pretend(monkeypatch)


# --- explain ------------------------------------------------------------------------------------


def test_explain_prints_each_candidate_with_its_verdict(
    pretended: Pretended, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LAYER, "--direction", "fprop"]) == 0
    out, err = capsys.readouterr()
    title, header, chosen, other = out.rstrip().splitlines()
    assert err == ""
    assert title.startswith("fprop float32/tf32 nchw x=2x6x")
    assert title.endswith("source measured")
    columns = ["candidate", "layout", "workspace", "time", "device", "deterministic", "verdict"]
    assert header.split() == columns
    words = ["legacy:ALGO_1", "(TENSOR_OP_MATH)", "nchw", "2.0", "KiB", "0.5", "ms", "yes"]
    assert chosen.split() == [*words, "chosen"]
    assert other.rstrip().endswith("50.0 % slower")


def test_explain_prints_a_table_for_each_direction_or_json(
    pretended: Pretended, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LAYER, "--direction", "all"]) == 0
    assert capsys.readouterr().out.count("candidate") == 3
    assert main([*LAYER, "--direction", "all", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["notes"] == []
    directions = [entry["problem"]["direction"] for entry in told["selections"]]
    assert directions == ["dgrad", "fprop", "wgrad"]
    assert told["selections"][0]["candidates"][0]["verdict"] == "chosen"


def test_explain_passes_every_argument_on(pretended: Pretended) -> None:
    more = ["--stride", "2", "--padding", "1,2", "--output-padding", "1,0", "--dilation", "1,3"]
    more += ["--groups", "2", "--bias", "--dtype", "bfloat16", "--channels-last", "--strict"]
    more += ["--selection", "exhaustive", "--workspace-limit", "1MiB", "--deterministic"]
    assert main([*LAYER, *more]) == 0
    [(layer, directions)] = pretended.asked
    assert directions == ("dgrad",)
    assert layer == _layers.Layer(
        (2, 4, 9, 9),
        6,
        (3, 5),
        stride=(2, 2),
        padding=(1, 2),
        output_padding=(1, 0),
        dilation=(1, 3),
        groups=2,
        bias=True,
        dtype=torch.bfloat16,
        channels_last=True,
    )
    [policy] = pretended.policies
    assert (policy.selection, policy.workspace_limit) == ("exhaustive", 2**20)
    assert (policy.deterministic, policy.fallback) == (True, "error")
    assert pretended.strict == [True]


def test_explain_says_why_nothing_runs(
    pretended: Pretended, capsys: pytest.CaptureFixture[str]
) -> None:
    pretended.error = dgrad.NotSupportedError("dgrad has no usable candidate for it\n  reasons")
    assert main(LAYER) == 1
    assert capsys.readouterr() == ("", f"explain: {pretended.error}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--input", "2,4,9"], "--input: '2,4,9': expected N,C_in,H,W"),
        (["--input", "2,4,0,9"], "--input: '2,4,0,9': expected N,C_in,H,W of at least 1"),
        (["--input", "8,64"], "--input: '8,64': expected N,C_in,H,W"),
        (["--input", "a,b,c,d"], "--input: 'a,b,c,d': expected N,C_in,H,W"),
        (["--input=-2,4,9,9"], "--input: '-2,4,9,9': expected N,C_in,H,W"),
        (["--input", f"{2**70},4,9,9"], f"N,C_in,H,W of at least 1, not above {2**63 - 1}"),
        (["--input", f"{2**63 - 1},4,9,9"], "explain: "),
        (["--out", ""], "--out: '': expected a positive integer"),
        (["--out", "1e3"], "--out: '1e3': expected a positive integer"),
        (["--out", "9" * 5000], f"expected a positive integer, not above {2**63 - 1}"),
        (["--kernel", "3,"], "--kernel: '3,': expected 'a' or 'a,b' of at least 1"),
        (["--kernel", "1_0"], "--kernel: '1_0': expected 'a' or 'a,b' of at least 1"),
        (["--kernel", "\u0663"], "--kernel: '\u0663': expected 'a' or 'a,b' of at least 1"),
        (["--dilation", str(2**70)], f"'a' or 'a,b' of at least 1, not above {2**63 - 1}"),
        (["--workspace-limit=-1"], "--workspace-limit: workspace_limit is '-1'"),
        (["--out", "0"], "--out: '0': expected a positive integer"),
        (["--kernel", "3,x"], "--kernel: '3,x': expected 'a' or 'a,b' of at least 1"),
        (["--kernel", "3,3,3"], "--kernel"),
        (["--stride", "0"], "--stride"),
        (["--padding", "-1"], "--padding"),
        (["--dtype", "int8"], "--dtype"),
        (["--direction", "forward"], "--direction"),
        (["--selection", "fastest"], "--selection"),
        (["--workspace-limit", "much"], "--workspace-limit"),
        (["--groups", "3"], "groups is 3"),
        (["--groups", "4"], "out_channels is 6, expected a multiple of groups 4"),
        (["--output-padding", "1"], "output_padding is (1, 1)"),
        (["--padding", "9"], "padding (9, 9)"),
        (["--input", f"1,{2**40},{2**40},1"], "explain: "),
    ],
)
def test_explain_names_a_wrong_argument(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    try:
        code: object = main([*LAYER, *arguments])
    except SystemExit as exit_:
        code = exit_.code
    assert code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.startswith(("explain: ", "usage: "))
    assert err.splitlines()[-1].startswith(
        ("explain: ", "python -m dgrad explain: error: argument")
    )


def test_explain_needs_sizes() -> None:
    with pytest.raises(SystemExit) as caught:
        main(["explain", "--input", "2,4,9,9", "--out", "6"])
    assert caught.value.code == 2


def test_explain_and_tune_say_why_no_gpu_can_be_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], file: Callable[..., str]
) -> None:
    monkeypatch.setattr(dgrad, "unavailable_reason", lambda: "there is no such thing")
    for arguments in (LAYER, ["tune", file(LAYERS)], ["tune", file(MODEL, "model.py"), "--json"]):
        assert main(arguments) == 3
        out, err = capsys.readouterr()
        assert out == ""
        assert err == f"{arguments[0]}: dgrad cannot run on a GPU here: there is no such thing\n"


@pytest.mark.parametrize(
    "command", [[], ["compare"], ["explain"], ["tune"], ["bench"], ["store"], ["store", "load"]]
)
def test_help_documents_the_exit_codes(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*command, "--help"])
    assert caught.value.code == 0
    assert re.search(r"^exit codes.*:\n  0  ", capsys.readouterr().out, re.MULTILINE)


# --- tune: what comes of it ---------------------------------------------------------------------


def test_tune_selects_once_and_finds_it_again(
    pretended: Pretended, capsys: pytest.CaptureFixture[str], file: Callable[..., str]
) -> None:
    path = file(LAYERS)
    assert main(["tune", path, "--json"]) == 0
    asked = {"file": path, "selection": "exhaustive", "backward": False}
    counts = {"problems": 3, "new": 3, "known": 0, "alone": 0, "failed": []}
    assert told(capsys) == asked | counts
    assert main(["tune", path, "--json", "--backward", "--selection", "measure"]) == 0
    asked |= {"selection": "measure", "backward": True}
    assert told(capsys) == asked | counts | {"problems": 9, "new": 6, "known": 3}
    assert {policy.selection for policy in pretended.policies[:3]} == {"exhaustive"}
    assert {policy.selection for policy in pretended.policies[3:]} == {"measure"}
    assert {policy.fallback for policy in pretended.policies} == {"error"}


def test_tune_prints_a_summary(
    pretended: Pretended, capsys: pytest.CaptureFixture[str], file: Callable[..., str]
) -> None:
    assert main(["tune", file(LAYERS), "--limit", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = dict(line.rsplit(maxsplit=1) for line in out.splitlines())
    assert {name.strip(): count for name, count in lines.items()} == {
        "problems": "2",
        "new, measured now": "2",
        "known, from the store": "0",
        "with one usable candidate": "0",
        "failed": "0",
        "seconds": lines["seconds"],
    }


def test_tune_counts_out_of_memory_as_a_failure_of_one_layer(
    pretended: Pretended,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: Callable[..., str],
) -> None:
    real = pretended.explain

    def explain(layer: _layers.Layer, directions: Sequence[str]) -> dgrad.Explanation:
        if layer.dtype is torch.float16:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried 1 TiB.\nmore words")
        return real(layer, directions)

    monkeypatch.setattr(pretended, "explain", explain)
    assert main(["tune", file(LAYERS), "--json"]) == 1
    summary = told(capsys)
    assert summary["new"] == 2
    reason = "CUDA out of memory. Tried 1 TiB."
    assert summary["failed"] == [{"where": "entry 2 (net/up2)", "reason": reason}]


def test_tune_says_that_the_store_is_off(
    pretended: Pretended,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: Callable[..., str],
) -> None:
    monkeypatch.setenv("DGRAD_STORE", "off")
    assert main(["tune", file(LAYERS)]) == 0
    assert "tune: the store is off: what is measured is not kept" in capsys.readouterr().err


def test_tune_warms_a_model_up_and_keeps_its_words_apart(
    pretended: Pretended,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    file: Callable[..., str],
) -> None:
    seen: list[bool] = []

    def warm_up(model: Any, *inputs: torch.Tensor, backward: bool) -> None:
        seen.append(backward)
        assert isinstance(model.up, dgrad.ConvTranspose2d)
        assert inputs[0].shape == (2, 8, 6, 6)
        with config.flags(fallback="pytorch"):
            model(*inputs)
        note(selection(problem()))

    monkeypatch.setattr(tune, "warm_up", warm_up)
    monkeypatch.setattr(torch.Tensor, "to", lambda self, device: self)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)
    assert main(["tune", file(MODEL, "model.py"), "--json", "--backward"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["new"] == 1
    assert "the model may print" in err
    assert seen == [True]
