"""Which algorithm runs: forced ones, precision, determinism, workspace, memory, the log."""

from __future__ import annotations

import gc
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad import _loader, log
from dgrad.config import Policy
from dgrad.selection import Candidate, Selection
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

DIRECTIONS = ("dgrad", "fprop", "wgrad")
RESULT = dict(zip(DIRECTIONS, NAMES, strict=False))
BOTH_LAYOUTS = ("nchw", "channels_last")

# Small: the slowest algorithm may be 500 times slower than the best.
PROBLEMS = {
    "3x3": Case(n=2, c_in=16, c_out=16, size=(12, 12), padding=(1, 1)),
    "5x5": Case(n=2, c_in=8, c_out=16, size=(10, 11), kernel=(5, 5), padding=(2, 2)),
    "3x7": Case(n=1, c_in=16, c_out=8, size=(9, 10), kernel=(3, 7)),
    "1x1": Case(n=2, c_in=32, c_out=16, size=(7, 7), kernel=(1, 1)),
    "2x2 s2": Case(n=2, c_in=16, c_out=8, size=(8, 8), kernel=(2, 2), stride=(2, 2)),
    "4x4 s2": Case(
        n=2, c_in=16, c_out=16, size=(8, 8), kernel=(4, 4), stride=(2, 2), padding=(1, 1)
    ),
    "groups and dilation": Case(
        n=2, c_in=16, c_out=32, size=(6, 7), stride=(2, 3), dilation=(2, 1), groups=4
    ),
    "depthwise": Case(n=2, c_in=16, c_out=16, groups=16, stride=(2, 2), padding=(1, 1)),
}
PLAIN = replace(PROBLEMS["3x3"], bias=False)


def with_layout(case: Case, layout: str) -> Case:
    return replace(case, layout=layout, weight_layout=layout, grad_layout=layout)


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Selection]]:
    """All new selections of the test, in order; what earlier tests chose is forgotten."""
    made: list[Selection] = []
    tell = log.selected

    def selected(selection: Selection, policy: Policy) -> None:
        made.append(selection)
        tell(selection, policy)

    monkeypatch.setattr(log, "selected", selected)
    dgrad.plan_cache.clear()
    # What cuDNN's order says is what these tests know; test_gpu_selection.py measures.
    with dgrad.flags(selection="heuristic"):
        yield made
    dgrad.plan_cache.clear()


def verdict(selection: Selection, candidate: Candidate) -> str:
    return selection.verdicts()[selection.candidates.index(candidate)]


def forward(case: Case, given: Arguments) -> Tensor:
    with torch.no_grad():
        return dgrad.conv_transpose2d(given.input, given.weight, given.bias, **case.options)


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


def assert_lists_candidates_with_reasons(message: str, wanted: str) -> None:
    lines = [line for line in message.splitlines() if re.match(r"  \w+:\w+ \(\w+\)", line)]
    assert lines, message
    for line in lines:
        assert re.fullmatch(r"  \w+:\w+ \(\w+\) +\S.*", line), f"no reason: {line!r}"
    # The others only are not the wanted one; the wanted one says why it cannot run.
    reasons = [line for line in lines if line.startswith(f"  {wanted} ")]
    assert all("is asked for" not in line for line in reasons), message
    assert wanted in message
    assert "import torch, dgrad" in message


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
        engines = [e.name for e in core.graph_heuristic(problem, "convolution")]
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

# Large enough for ALGO_1 to use the tensor cores where it may.
WIDE = Case(n=4, c_in=64, c_out=64, size=(48, 48), bias=False)


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


# --- workspace ----------------------------------------------------------------------------------


def test_a_workspace_limit_of_zero_picks_a_candidate_without(selections: list[Selection]) -> None:
    case = replace(WIDE, precision="tf32")
    given = arguments(case)
    wanted = expected(case, given)
    with dgrad.flags(allow_tf32=True):
        results(dgrad.conv_transpose2d, case, given)
        assert any(s.candidate.workspace_bytes > 0 for s in selections), "nothing to forbid"
        selections.clear()
        with dgrad.flags(workspace_limit=0, fallback="error"):
            found = results(dgrad.conv_transpose2d, case, given)
    assert len(selections) == 3
    assert all(s.candidate.workspace_bytes == 0 for s in selections)
    for name in found:
        assert_close(found[name], wanted[name], case.tolerance, f"{name} of {case}")


def test_the_chosen_workspace_keeps_to_the_limit(selections: list[Selection]) -> None:
    case = replace(WIDE, precision="tf32")
    given = arguments(case)
    with dgrad.flags(allow_tf32=True):
        forward(case, given)
        free = selections[0]
        sizes = sorted({c.workspace_bytes for c in free.candidates if c.rejected is None})
        for limit in (*sizes, sizes[-1] + 1):
            with dgrad.flags(workspace_limit=limit, fallback="error"):
                forward(case, given)
    assert all(
        s.candidate.workspace_bytes <= limit
        for s, limit in zip(selections[1:], (*sizes, sizes[-1] + 1), strict=True)
    )
    assert selections[-1].candidate.name == free.candidate.name


# --- memory -------------------------------------------------------------------------------------

_MIB = 2**20


@pytest.fixture
def large() -> Iterator[tuple[Tensor, Tensor]]:
    """An input and a weight whose fast algorithms take a large workspace."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    x = torch.randn(8, 64, 256, 256, device="cuda")
    yield x, torch.randn(64, 64, 3, 7, device="cuda") / 37
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()


def leave_room_for(count_bytes: int) -> None:
    """Let PyTorch's allocator have this much more memory than it holds now."""
    gc.collect()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    allowed = torch.cuda.memory_reserved() + count_bytes
    torch.cuda.set_per_process_memory_fraction(allowed / total)


def run_large(large: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad(), dgrad.flags(allow_tf32=True, fallback="error"):
        return dgrad.conv_transpose2d(*large)


def test_a_workspace_that_does_not_fit_makes_the_next_candidate_run(
    large: tuple[Tensor, Tensor],
    selections: list[Selection],
    caplog: pytest.LogCaptureFixture,
) -> None:
    wanted = run_large(large)
    greedy = selections[0].candidate
    size = wanted.numel() * wanted.element_size()
    assert greedy.workspace_bytes > 64 * _MIB, "this problem needs no large workspace here"
    torch.cuda.empty_cache()  # else the copy would hold the block of the workspace
    kept = wanted[-1].clone()
    del wanted
    dgrad.plan_cache.clear()
    selections.clear()
    leave_room_for(size + greedy.workspace_bytes // 2)

    caplog.set_level(logging.DEBUG, logger="dgrad")
    output = run_large(large)
    torch.testing.assert_close(output[-1], kept, rtol=1e-2, atol=1e-2)
    (selection,) = selections
    assert selection.candidate.workspace_bytes <= greedy.workspace_bytes // 2
    refused = [c for c in selection.candidates if c.out_of_memory]
    assert greedy.name in [c.name for c in refused]
    assert all("out of memory" in verdict(selection, c) for c in refused)
    assert any("out of memory" in text for text in caplog.messages)

    # Remembered: neither a second call, nor another thread, nor more memory tries it again.
    torch.cuda.set_per_process_memory_fraction(1.0)
    caplog.clear()
    del output
    run_large(large)
    in_thread(lambda: run_large(large))
    assert not [text for text in caplog.messages if text.startswith("rejected")]
    assert len(selections) == 1

    dgrad.plan_cache.clear()
    run_large(large)
    assert selections[-1].candidate.name == greedy.name, "clear() forgets what did not fit"


def test_out_of_memory_is_told_apart_and_asked_for_again(
    large: tuple[Tensor, Tensor], selections: list[Selection]
) -> None:
    output = run_large(large)
    size = output.numel() * output.element_size()
    del output
    forced, need = greediest(selections[0])
    assert need > 16 * _MIB, "no algorithm of this problem needs a large workspace here"
    dgrad.plan_cache.clear()
    selections.clear()
    leave_room_for(size + need // 2)

    with dgrad.flags(algorithm=forced):
        for _ in range(2):
            with pytest.raises(dgrad.OutOfMemoryError, match="out of memory") as caught:
                run_large(large)
            assert isinstance(caught.value, torch.cuda.OutOfMemoryError)
            assert isinstance(caught.value, dgrad.NotSupportedError)
            assert_lists_candidates_with_reasons(str(caught.value), forced)
            del caught  # its traceback holds the output
            gc.collect()
        assert not selections
        torch.cuda.set_per_process_memory_fraction(1.0)
        run_large(large)
    assert [selection.candidate.name for selection in selections] == [forced]


def test_an_algorithm_that_cudnn_refuses_is_not_out_of_memory(
    large: tuple[Tensor, Tensor], selections: list[Selection]
) -> None:
    """Also where another candidate of the same problem did not fit before."""
    output = run_large(large)
    greedy = selections[0].candidate
    size = output.numel() * output.element_size()
    del output
    dgrad.plan_cache.clear()
    leave_room_for(size + greedy.workspace_bytes // 2)
    run_large(large)
    with (
        dgrad.flags(algorithm="legacy:ALGO_99"),
        pytest.raises(dgrad.NotSupportedError) as caught,
    ):
        run_large(large)
    assert not isinstance(caught.value, dgrad.OutOfMemoryError)


def greediest(selection: Selection) -> tuple[str, int]:
    """The algorithm that needs most in the least of its variants, and how much that is."""
    least: dict[str, int] = {}
    for candidate in selection.candidates:
        if candidate.rejected is None:
            size = candidate.workspace_bytes
            least[candidate.name] = min(least.get(candidate.name, size), size)
    name = max(least, key=lambda name: least[name])
    return name, least[name]


def test_out_of_memory_for_the_output_is_pytorchs_error(large: tuple[Tensor, Tensor]) -> None:
    leave_room_for(8 * _MIB)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        run_large(large)
    torch.cuda.set_per_process_memory_fraction(1.0)
    run_large(large)


# --- the log ------------------------------------------------------------------------------------


def in_thread(work: Callable[[], Any]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The INFO lines about selections since the last call."""
    caplog.set_level(logging.INFO, logger="dgrad")
    dgrad.plan_cache.clear()

    def lines() -> list[str]:
        found = [
            record.getMessage()
            for record in caplog.records
            if record.name == "dgrad" and record.levelno == logging.INFO
        ]
        caplog.clear()
        return [line for line in found if line.startswith("selected ")]

    return lines


def test_one_line_for_each_new_selection_and_none_for_a_repeat(
    info: Callable[[], list[str]],
) -> None:
    given = arguments(PLAIN)
    with dgrad.flags(allow_tf32=False, selection="heuristic"):
        results(dgrad.conv_transpose2d, PLAIN, given)
        lines = info()
        assert len(lines) == 3
        for line, direction in zip(lines, DIRECTIONS, strict=True):
            assert re.search(
                rf"^selected (graph|legacy):\S+ \(\w+_MATH\) for {direction} float32/ieee nchw ",
                line,
            ), line
            assert re.search(r"workspace [\d.]+ ([KMG]i)?B\b", line), line
            assert "source heuristic" in line
            assert f"cuDNN {_loader.cudnn_version()}" in line
        results(dgrad.conv_transpose2d, PLAIN, given)
        assert info() == []
        in_thread(lambda: results(dgrad.conv_transpose2d, PLAIN, given))
        assert info() == []
        # The same problem at other addresses.
        results(dgrad.conv_transpose2d, PLAIN, arguments(replace(PLAIN, seed=1)))
        assert info() == []


def test_another_problem_or_other_flags_are_another_line(info: Callable[[], list[str]]) -> None:
    given = arguments(PLAIN)
    forward(PLAIN, given)
    assert len(info()) == 1
    with dgrad.flags(deterministic=True):
        forward(PLAIN, given)
    (line,) = info()
    assert re.search(r"(?<!not )deterministic", line)
    with dgrad.flags(algorithm="legacy:ALGO_1"):
        forward(PLAIN, given)
    (line,) = info()
    assert "legacy:ALGO_1" in line
    assert "source forced" in line
    taller = replace(PLAIN, size=(13, 12))
    forward(taller, arguments(taller))
    assert len(info()) == 1


def test_the_verdicts_cover_all_candidates(selections: list[Selection]) -> None:
    forward(PLAIN, arguments(PLAIN))
    (selection,) = selections
    verdicts: dict[Candidate, str] = {c: verdict(selection, c) for c in selection.candidates}
    assert list(verdicts.values()).count("chosen") == 1
    assert all(verdicts.values())
    assert selection.to_dict()["chosen"] == selection.chosen
