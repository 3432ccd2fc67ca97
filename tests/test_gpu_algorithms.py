"""Which algorithm runs: forced ones, cuDNN's order, precision, determinism."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad import _loader
from dgrad.selection import Selection
from gpu_cases import (
    BOTH_LAYOUTS,
    DIRECTIONS,
    PLAIN,
    PROBLEMS,
    WIDE,
    assert_lists_candidates_with_reasons,
    forward,
    verdict,
    with_layout,
)
from reference import (
    NAMES,
    TOLERANCES,
    Arguments,
    Case,
    algorithm_tolerance,
    arguments,
    assert_close,
    errors,
    expected,
    results,
    set_pytorch_tf32,
)

pytestmark = pytest.mark.gpu

RESULT = dict(zip(DIRECTIONS, NAMES, strict=False))


class Directions:
    """Runs each direction of a case on its own, so that each can be given its own flags."""

    def __init__(self, case: Case, given: Arguments) -> None:
        self._case, self._given = case, given
        self._graph = dgrad.conv_transpose2d(given.input, given.weight, given.bias, **case.options)

    def __call__(self, direction: str) -> Tensor:
        if direction == "dgrad":
            return forward(self._case, self._given)
        leaf = self._given.input if direction == "fprop" else self._given.weight
        (grad,) = torch.autograd.grad(
            self._graph, [leaf], self._given.grad_output, retain_graph=True
        )
        return grad


def strictness(case: Case) -> Any:
    return dgrad.flags(allow_tf32=case.precision == "tf32")


# --- every algorithm in turn --------------------------------------------------------------------


def attempt(run: Directions, direction: str) -> tuple[Tensor | None, str]:
    """The result, or None and why there is none; out of memory is no reason here."""
    try:
        return run(direction), ""
    except dgrad.OutOfMemoryError:
        raise
    except dgrad.NotSupportedError as error:
        return None, str(error)


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_each_algorithm_runs_and_is_right_or_says_why_not(
    name: str, precision: str, layout: str, selections: list[Selection]
) -> None:
    case = with_layout(replace(PROBLEMS[name], precision=precision), layout)
    given = arguments(case)
    wanted = expected(case, given)
    with strictness(case):
        run = Directions(case, given)
        for direction in DIRECTIONS:
            ran = []
            for algorithm in _loader.require().legacy_algorithms(direction):
                forced = f"legacy:{algorithm}"
                selections.clear()
                with dgrad.flags(algorithm={direction: forced}):
                    actual, refusal = attempt(run, direction)
                if actual is None:
                    assert_lists_candidates_with_reasons(refusal, forced)
                    continue
                what = f"{direction} with {forced} of {case}"
                tolerance = algorithm_tolerance(case, algorithm)
                assert_close(actual, wanted[RESULT[direction]], tolerance, what)
                (selection,) = (s for s in selections if s.problem.direction == direction)
                assert selection.candidate.name == forced, what
                assert selection.source == "forced", what
                ran.append(algorithm)
            assert ran, f"no algorithm runs {direction} of {case}"


def test_cudnn_offers_several_algorithms_for_a_plain_problem(selections: list[Selection]) -> None:
    """Without this, the test of each algorithm might run one and refuse all others."""
    given = arguments(PLAIN)
    with strictness(PLAIN):
        run = Directions(PLAIN, given)
        for direction in DIRECTIONS:
            run(direction)
    for selection in selections:
        legacy = [c for c in selection.candidates if c.provider == "legacy" and c.rejected is None]
        assert len({candidate.name for candidate in legacy}) >= 2, selection.to_dict()
    assert [selection.problem.direction for selection in selections] == list(DIRECTIONS)


def test_an_unknown_algorithm_says_which_there_are() -> None:
    given = arguments(PLAIN)
    with (
        dgrad.flags(algorithm="legacy:ALGO_99"),
        pytest.raises(dgrad.NotSupportedError, match="'legacy:ALGO_99' is asked for") as caught,
    ):
        forward(PLAIN, given)
    assert "legacy:ALGO_1" in str(caught.value)


def test_the_order_is_cudnns_and_the_first_usable_one_runs(selections: list[Selection]) -> None:
    for precision in TOLERANCES:
        for layout in BOTH_LAYOUTS:
            case = with_layout(replace(PROBLEMS["4x4 s2"], precision=precision), layout)
            with strictness(case):
                results(dgrad.conv_transpose2d, case, arguments(case))
    assert len(selections) == 3 * (2 * len(TOLERANCES) - 1)  # float64 is NCHW in both layouts
    for selection in selections:
        core, problem = _loader.require(), selection.problem
        engines = [e.name for e in core.graph_heuristic(problem, "convolution")[0]]
        plain = [c for c in selection.candidates if c.bias in (None, "add")]
        assert [
            c.algorithm for c in plain if c.provider == "graph" and "+" not in c.algorithm
        ] == engines
        told = core.legacy_heuristic(problem)
        legacy = [c for c in plain if c.provider == "legacy"]
        # Where tf32 is allowed, those of strict float32 follow.
        assert [(c.algorithm, c.math_type) for c in legacy[: len(told)]] == [
            (result.algorithm, result.math_type) for result in told
        ]
        assert all(c.math_type == "FMA_MATH" for c in legacy[len(told) :])
        assert selection.source == "heuristic"
        place = selection.chosen
        for earlier in selection.candidates[:place]:
            assert verdict(selection, earlier).startswith("rejected: "), selection.to_dict()
        assert selection.verdicts()[selection.chosen] == "chosen"


# --- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_strict_float32_runs_fma_math_alone(layout: str, selections: list[Selection]) -> None:
    case = with_layout(WIDE, layout)
    given = arguments(case)
    wanted = expected(case, given)
    with dgrad.flags(allow_tf32=False, fallback="error"):
        found = results(dgrad.conv_transpose2d, case, given)
    for name in found:
        assert_close(found[name], wanted[name], 1e-5, f"{name} of {case}")
    assert {s.problem.direction for s in selections} == set(DIRECTIONS)
    for selection in selections:
        assert not selection.problem.tf32
        assert selection.candidate.math_type == "FMA_MATH"


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
def test_tf32_is_used_where_it_is_allowed(layout: str, selections: list[Selection]) -> None:
    case = with_layout(replace(WIDE, precision="tf32"), layout)
    given = arguments(case)
    wanted = expected(case, given)
    with dgrad.flags(allow_tf32=True, fallback="error"):
        output = forward(case, given)
    assert selections[0].problem.tf32
    norm, _ = errors(output, wanted["output"])
    assert 5e-5 < norm <= case.tolerance


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_follows_pytorchs_switch_and_the_flag_overrules_it(
    allowed: bool, selections: list[Selection]
) -> None:
    given = arguments(PLAIN)
    set_pytorch_tf32(allowed)
    forward(PLAIN, given)
    with dgrad.flags(allow_tf32=not allowed):
        forward(PLAIN, given)
    assert [selection.problem.tf32 for selection in selections] == [allowed, not allowed]


def test_half_types_use_tensor_cores(selections: list[Selection]) -> None:
    for precision in ("float16", "bfloat16"):
        case = with_layout(replace(WIDE, precision=precision), "channels_last")
        forward(case, arguments(case))
    assert [s.candidate.math_type for s in selections] == ["TENSOR_OP_MATH"] * 2


# --- determinism --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", BOTH_LAYOUTS)
@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", PROBLEMS)
def test_deterministic_repeats_bit_for_bit(
    name: str, precision: str, layout: str, selections: list[Selection]
) -> None:
    case = with_layout(replace(PROBLEMS[name], precision=precision), layout)
    given = arguments(case)
    with strictness(case), dgrad.flags(deterministic=True, fallback="error"):
        first = results(dgrad.conv_transpose2d, case, given)
        for _ in range(3):
            again = results(dgrad.conv_transpose2d, case, given)
            for key in ("output", "grad_input", "grad_weight"):
                assert torch.equal(first[key], again[key]), f"{key} of {case}"
    assert len(selections) == 3
    assert all(selection.candidate.deterministic for selection in selections)


def by_cudnn_deterministic() -> None:
    torch.backends.cudnn.deterministic = True


def by_deterministic_algorithms() -> None:
    torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize("switch", [by_cudnn_deterministic, by_deterministic_algorithms])
def test_determinism_follows_pytorchs_switches(
    switch: Callable[[], None], selections: list[Selection]
) -> None:
    """ALGO_0 adds with atomics."""
    given = arguments(PLAIN)
    with dgrad.flags(algorithm="legacy:ALGO_0"):
        forward(PLAIN, given)
        assert not selections[0].candidate.deterministic
        switch()
        with pytest.raises(dgrad.NotSupportedError, match=r"ALGO_0 .*not deterministic"):
            forward(PLAIN, given)
        with dgrad.flags(deterministic=False):
            forward(PLAIN, given)


def test_the_flag_deterministic_forbids_an_algorithm_with_atomics() -> None:
    given = arguments(PLAIN)
    with (
        dgrad.flags(algorithm="legacy:ALGO_0", deterministic=True),
        pytest.raises(dgrad.NotSupportedError, match=r"ALGO_0 .*not deterministic"),
    ):
        forward(PLAIN, given)
