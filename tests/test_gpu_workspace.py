"""Limits on the workspace, and memory that does not suffice for it or for the output."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad.selection import Selection
from gpu_cases import (
    WIDE,
    assert_lists_candidates_with_reasons,
    forward,
    in_thread,
    room_for,
    verdict,
)
from reference import arguments, assert_close, expected, results

pytestmark = pytest.mark.gpu


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
    gc.collect()
    torch.cuda.empty_cache()


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

    caplog.set_level(logging.DEBUG, logger="dgrad")
    with room_for(size + greedy.workspace_bytes // 2):
        output = run_large(large)
    torch.testing.assert_close(output[-1], kept, rtol=1e-2, atol=1e-2)
    (selection,) = selections
    assert selection.candidate.workspace_bytes <= greedy.workspace_bytes // 2
    refused = [c for c in selection.candidates if c.out_of_memory]
    assert greedy.name in [c.name for c in refused]
    assert all("out of memory" in verdict(selection, c) for c in refused)
    assert any("out of memory" in text for text in caplog.messages)

    # Remembered: neither a second call, nor another thread, nor more memory tries it again.
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

    with dgrad.flags(algorithm=forced):
        with room_for(size + need // 2):
            for _ in range(2):
                with pytest.raises(dgrad.OutOfMemoryError, match="out of memory") as caught:
                    run_large(large)
                assert isinstance(caught.value, torch.cuda.OutOfMemoryError)
                assert isinstance(caught.value, dgrad.NotSupportedError)
                assert_lists_candidates_with_reasons(str(caught.value), forced)
                del caught  # its traceback holds the output
                gc.collect()
        assert not selections
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
    with room_for(size + greedy.workspace_bytes // 2):
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
    with room_for(8 * _MIB), pytest.raises(torch.cuda.OutOfMemoryError):
        run_large(large)
    run_large(large)
