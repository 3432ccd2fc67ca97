"""Flags follow PyTorch's switches unless dgrad's own say otherwise."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

import dgrad
from dgrad import config

pytestmark = pytest.mark.usefixtures("restored_flags")


NAMES = (
    "selection",
    "measure_budget",
    "algorithm",
    "workspace_limit",
    "deterministic",
    "allow_tf32",
    "fallback",
)


def run_python(code: str, **environment: str) -> str:
    """What a fresh Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_by_default_nothing_is_asked_for() -> None:
    torch.backends.cudnn.deterministic = False
    assert config.policy() == config.Policy("measure", 0.3, (), None, False, "pytorch")


def test_deterministic_follows_both_of_pytorchs_switches() -> None:
    for cudnn, algorithms in ((False, False), (True, False), (False, True), (True, True)):
        torch.backends.cudnn.deterministic = cudnn
        torch.use_deterministic_algorithms(algorithms)
        assert config.policy().deterministic is (cudnn or algorithms)


def test_deterministic_follows_algorithms_that_only_warn() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert config.policy().deterministic


def test_the_own_flag_for_deterministic_wins() -> None:
    torch.backends.cudnn.deterministic = True
    with dgrad.flags(deterministic=False):
        assert not config.policy().deterministic
        with dgrad.flags(deterministic=None):
            assert config.policy().deterministic
    torch.backends.cudnn.deterministic = False
    with dgrad.flags(deterministic=True):
        assert config.policy().deterministic


@pytest.mark.parametrize("pytorchs", [True, False])
def test_the_own_flag_for_tf32_wins(pytorchs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_tf32_switch", lambda: pytorchs)
    monkeypatch.setattr(config, "tf32_overridden", lambda: False)
    assert config.tf32_allowed() is pytorchs
    with dgrad.flags(allow_tf32=not pytorchs):
        assert config.tf32_allowed() is not pytorchs
    with dgrad.flags(allow_tf32=None):
        assert config.tf32_allowed() is pytorchs


def test_tf32_follows_the_switch_of_cudnn_and_not_that_of_matmul() -> None:
    printed = run_python("""
        import torch
        from dgrad import config
        print(config.tf32_allowed())
        for value in (False, True):
            torch.backends.cudnn.allow_tf32 = value
            torch.backends.cuda.matmul.allow_tf32 = not value
            print(config.tf32_allowed())
    """)
    assert printed.split() == ["True", "False", "True"]


new_switches = pytest.mark.skipif(
    not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch has fp32_precision since 2.9"
)


@new_switches
def test_tf32_follows_the_new_switches_also_mixed_with_the_old_one() -> None:
    # PyTorch's own allow_tf32 raises in some of these states, so conv.fp32_precision is the
    # oracle: it is the value that the convolution reads.
    printed = run_python("""
        import torch
        from dgrad import config

        def compare():
            print(config.tf32_allowed(), torch.backends.cudnn.conv.fp32_precision == "tf32")

        compare()
        for first in ("ieee", "tf32"):
            for second in ("ieee", "tf32"):
                torch.backends.cudnn.conv.fp32_precision = first
                compare()
                torch.backends.cudnn.rnn.fp32_precision = second
                compare()
                torch.backends.cudnn.allow_tf32 = second == "ieee"
                compare()
                torch.backends.cudnn.fp32_precision = first
                compare()
                torch.backends.fp32_precision = second
                compare()
                torch.backends.cudnn.conv.fp32_precision = "none"
                compare()
                torch.backends.cudnn.fp32_precision = "none"
                compare()
    """)
    rows = [line.split() for line in printed.splitlines()]
    assert len(rows) == 29
    assert all(found == expected for found, expected in rows)
    assert {found for found, _ in rows} == {"True", "False"}


@pytest.mark.parametrize(("value", "expected"), [("0", False), ("1", True), ("", True)])
def test_nvidias_variable_forbids_tf32_if_it_is_0(
    value: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", value)
    monkeypatch.setattr(config, "tf32_overridden", config.tf32_overridden.__wrapped__)
    with dgrad.flags(allow_tf32=True):
        assert config.tf32_allowed() is expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (0, 0),
        (12345, 12345),
        (2**40, 2**40),
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        ("1KB", 1000),
        ("1KiB", 1024),
        ("256MiB", 256 * 1024**2),
        ("1.5KiB", 1536),
        ("9007199254740993", 2**53 + 1),
        ("9223372036854775807", 2**63 - 1),
        ("256 MiB", 256 * 1024**2),
        (" 1.5 GiB ", 3 * 2**29),
        ("1GB", 10**9),
        ("2TiB", 2 * 1024**4),
        ("2TB", 2 * 10**12),
    ],
)
def test_workspace_limit_is_read(value: Any, expected: int | None) -> None:
    with dgrad.flags(workspace_limit=value):
        assert config.policy().workspace_limit == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ()),
        ({}, ()),
        ("legacy:ALGO_1", (("dgrad", ("legacy:ALGO_1",)),)),
        (["legacy:FFT", "legacy:ALGO_1"], (("dgrad", ("legacy:FFT", "legacy:ALGO_1")),)),
        ({"wgrad": "legacy:FFT"}, (("wgrad", ("legacy:FFT",)),)),
        ("graph", (("dgrad", ("graph",)),)),
        (("legacy", "graph"), (("dgrad", ("legacy", "graph")),)),
        (["graph:eng5_k2=3", "legacy"], (("dgrad", ("graph:eng5_k2=3", "legacy")),)),
        ({"fprop": "graph", "wgrad": ["legacy"]}, (("fprop", ("graph",)), ("wgrad", ("legacy",)))),
        (
            {"wgrad": "legacy:FFT", "dgrad": "legacy:ALGO_0"},
            (("dgrad", ("legacy:ALGO_0",)), ("wgrad", ("legacy:FFT",))),
        ),
    ],
    ids=str,
)
def test_algorithm_is_read(value: Any, expected: config.Algorithms) -> None:
    with dgrad.flags(algorithm=value):
        assert config.policy().algorithm == expected


BAD: list[tuple[str, Any, type[Exception]]] = [
    ("deterministic", 1, TypeError),
    ("deterministic", "yes", TypeError),
    ("allow_tf32", 0, TypeError),
    ("allow_tf32", "tf32", TypeError),
    ("workspace_limit", -1, ValueError),
    ("workspace_limit", True, ValueError),
    ("workspace_limit", 1.5, ValueError),
    ("workspace_limit", "", ValueError),
    ("workspace_limit", "much", ValueError),
    ("workspace_limit", "-1MiB", ValueError),
    ("workspace_limit", "1 XiB", ValueError),
    ("workspace_limit", "1MiB more", ValueError),
    ("workspace_limit", "9223372036854775808", ValueError),
    ("workspace_limit", "9" * 5000, ValueError),
    ("workspace_limit", "nan", ValueError),
    ("workspace_limit", [1], ValueError),
    ("workspace_limit", "12 bananas", ValueError),
    ("workspace_limit", 2**63, ValueError),
    ("workspace_limit", "9999999999999TiB", ValueError),
    ("workspace_limit", float("inf"), ValueError),
    ("selection", "fastest", ValueError),
    ("selection", 1, ValueError),
    ("measure_budget", -0.1, ValueError),
    ("measure_budget", float("nan"), ValueError),
    ("measure_budget", "1s", ValueError),
    ("measure_budget", float("inf"), ValueError),
    ("measure_budget", 2**2000, ValueError),
    ("measure_budget", True, ValueError),
    ("measure_budget", torch.tensor(1), ValueError),
    ("algorithm", 1, ValueError),
    ("algorithm", ["ALGO_1"], ValueError),
    ("algorithm", ["legacy:ALGO_1", 1], ValueError),
    ("algorithm", "ALGO_1", ValueError),
    ("algorithm", "", ValueError),
    ("algorithm", {"up": "legacy:ALGO_1"}, ValueError),
    ("algorithm", {"dgrad": 1}, ValueError),
    ("algorithm", {"dgrad": None}, ValueError),
    ("algorithm", "kernel", ValueError),
    ("algorithm", "kernel:ALGO_1", ValueError),
    ("algorithm", "legacy:", ValueError),
    ("algorithm", ":ALGO_1", ValueError),
    ("algorithm", ["legacy:ALGO_1", ["graph"]], ValueError),
    ("algorithm", ((),), ValueError),
    ("algorithm", (("dgrad", "graph", "more"),), ValueError),
    ("algorithm", ((["dgrad"], "graph"),), ValueError),
    ("algorithm", "Graph", ValueError),
    ("algorithm", "graph ", ValueError),
    ("algorithm", ["graph", "ALGO_1"], ValueError),
    ("algorithm", {"dgrad": "provider"}, ValueError),
    ("fallback", "cpu", ValueError),
    ("fallback", True, ValueError),
]


@pytest.mark.parametrize(("name", "value", "expected"), BAD, ids=lambda value: str(value))
def test_a_bad_value_raises_with_the_flag_and_the_value_and_changes_nothing(
    name: str, value: Any, expected: type[Exception]
) -> None:
    before = config.current()
    for attempt in (dgrad.set_flags, dgrad.flags, dgrad.Flags):
        with pytest.raises(expected, match=f"^{name} is .*expected") as caught:
            attempt(**{name: value})
        assert repr(value)[:200] in str(caught.value)
        # The good one beside the bad one is not set either.
        with pytest.raises(expected):
            attempt(**{"deterministic": True, "fallback": "error", name: value})
        assert config.current() is before


def test_an_unknown_flag_lists_the_known_ones() -> None:
    for attempt in (dgrad.set_flags, dgrad.flags):
        with pytest.raises(TypeError, match="unknown flag 'determinism', expected one of") as error:
            attempt(determinism=True)
        assert all(name in str(error.value) for name in NAMES)


def test_policies_are_keys_that_differ_in_every_flag() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"deterministic": True},
        {"workspace_limit": 0},
        {"workspace_limit": 1},
        {"algorithm": "legacy:ALGO_0"},
        {"algorithm": {"fprop": "legacy:ALGO_0"}},
        {"fallback": "error"},
    ]
    policies = set()
    for change in changes:
        with dgrad.flags(**change):
            policies.add(config.policy())
    assert len(policies) == len(changes)


def test_a_layers_flags_lie_over_the_processs() -> None:
    layer = dgrad.Flags(workspace_limit="1KiB", selection="exhaustive")
    with dgrad.flags(workspace_limit=5, deterministic=True, selection="heuristic"):
        policy = config.policy(layer)
        assert (policy.workspace_limit, policy.deterministic) == (1024, True)
        assert policy.selection == "exhaustive"
        assert config.policy().workspace_limit == 5
        assert config.tf32_allowed(dgrad.Flags(allow_tf32=False)) is False


def test_a_bad_algorithm_is_told_the_providers() -> None:
    with pytest.raises(
        ValueError, match=r"such as 'legacy:ALGO_1', a provider \(graph or legacy\)"
    ):
        dgrad.set_flags(algorithm="eng5")


def test_flags_that_name_a_provider_can_be_taken_over_by_others() -> None:
    flags = dgrad.Flags(algorithm={"dgrad": ["graph", "legacy:ALGO_1"], "wgrad": "legacy"})
    with dgrad.flags(algorithm=flags.algorithm):
        assert config.policy().wanted("dgrad") == ("graph", "legacy:ALGO_1")
        assert config.policy().wanted("wgrad") == ("legacy",)
        assert config.policy().wanted("fprop") == ()
        assert config.commands("wgrad")
        assert not config.commands("fprop")


@pytest.mark.skipif(
    not hasattr(torch.serialization, "safe_globals"), reason="PyTorch 2.4 has no such block"
)
@pytest.mark.parametrize(
    "flags",
    [dgrad.Flags(), dgrad.Flags(algorithm={"dgrad": "legacy"}, workspace_limit="1MiB")],
)
def test_flags_in_a_checkpoint_need_no_other_permission_than_their_own(flags: dgrad.Flags) -> None:
    file = io.BytesIO()
    torch.save({"flags": flags}, file)
    file.seek(0)
    with torch.serialization.safe_globals([dgrad.Flags]):
        assert torch.load(file, weights_only=True) == {"flags": flags}
