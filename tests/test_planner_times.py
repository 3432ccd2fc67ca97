"""The policy where times are known: what wins, and what is not measured again."""

from __future__ import annotations

from dataclasses import replace

import pytest

import dgrad
from dgrad import _measuring, config
from dgrad.planner import preference
from dgrad.selection import ADD, Candidate, Selection
from fake_cudnn import (
    MIB,
    THREE,
    FakeProblem,
    FakeResult,
    Start,
    fake_times,
    names,
    run,
)


def test_the_fastest_runs(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    core = start(*THREE)
    measured = fake_times(core, monkeypatch, {"ALGO_1": 2.0, "ALGO_0": 3.0, "GEMM": 1.0})
    run(selection="measure")
    assert measured == [["ALGO_1", "ALGO_0", "GEMM"]]
    assert names(core) == ["GEMM"]
    ((selection, count),) = dgrad.selections()
    assert count == 1
    assert selection.source == "measured"
    assert selection.verdicts() == ["100.0 % slower", "200.0 % slower", "chosen"]
    assert "next legacy:ALGO_1 (DEFAULT_MATH) 100.0 % slower" in str(selection)


@pytest.mark.parametrize(
    ("others", "chosen"),
    [((1.004, 1.008), "GEMM"), ((1.012, 1.012), "ALGO_0")],
    ids=["within a percent the deterministic and then the smaller", "beyond it the fastest"],
)
def test_what_wins_within_the_noise_and_beyond(
    start: Start, monkeypatch: pytest.MonkeyPatch, others: tuple[float, float], chosen: str
) -> None:
    core = start(*THREE)
    fake_times(core, monkeypatch, {"ALGO_1": others[0], "ALGO_0": 1.0, "GEMM": others[1]})
    run(selection="measure")
    assert names(core) == [chosen]


def timed(*times: tuple[float, float | None], workspace_bytes: int = 0) -> list[Candidate]:
    """Candidates with a time back to back and one on the device."""
    return [
        Candidate("graph", f"eng{i}", "FMA_MATH", True, workspace_bytes, t, device_ms)
        for i, (t, device_ms) in enumerate(times)
    ]


def first_choice(candidates: list[Candidate]) -> int:
    return preference(candidates, "dgrad", config.policy(dgrad.Flags(selection="measure")))[0]


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ([(0.030, 0.015), (0.031, 0.013)], 1),  # as close as the host can tell
        ([(0.030, 0.015), (0.046, 0.013)], 0),  # slower for who replays nothing
        ([(0.030, 0.015), (0.031, None)], 0),  # not timed there: it was far behind
        ([(0.031, 0.015), (0.030, None)], 1),  # not known: the time back to back decides
        ([(0.031, 0.0151), (0.030, 0.0150), (0.033, 0.0150)], 1),  # alike on the device
        ([(0.030, None), (0.031, 0.013)], 0),
    ],
)
def test_the_device_tells_apart_what_the_host_makes_alike(
    times: list[tuple[float, float | None]], chosen: int
) -> None:
    assert first_choice(timed(*times)) == chosen


def test_what_costs_the_host_more_must_be_as_much_faster_on_the_device() -> None:
    by_cudnn, by_pytorch = timed((0.0160, 0.0109), (0.0218, 0.0101))
    by_cudnn, by_pytorch = replace(by_cudnn, bias="eng1"), replace(by_pytorch, bias=ADD)
    assert first_choice([by_pytorch, by_cudnn]) == 1
    assert first_choice([replace(by_pytorch, device_ms=0.0070), by_cudnn]) == 0
    # Where the device takes longer than the host, that does not count.
    assert first_choice([replace(by_pytorch, device_ms=0.0220), by_cudnn]) == 1
    slow, slower = timed((0.0300, 0.0281), (0.0330, 0.0290))
    assert first_choice([replace(slower, bias=ADD, device_ms=0.0270), slow]) == 1
    assert first_choice([replace(slower, bias=ADD, time_ms=0.0280), slow]) == 0
    # Neither does what the host's share varies by between runs of one way.
    legacy, *graphs = timed((0.024, 0.0081), (0.020, 0.0090), (0.023, 0.0080))
    assert first_choice([replace(legacy, provider="legacy"), *graphs]) == 2


def test_alike_on_the_device_and_for_the_host_the_smaller_workspace_wins() -> None:
    large, small = timed((0.0300, 0.0150), (0.0305, 0.0151))
    assert first_choice([replace(large, workspace_bytes=MIB), small]) == 1


def test_both_times_are_told(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, other = timed((0.030, 0.010), (0.027, 0.015))
    selection = Selection(FakeProblem(), (chosen, other), 0, (None, None), "measured")  # type: ignore[arg-type]
    verdict = "50.0 % slower on the device, 10.0 % faster with the host's share"
    assert selection.verdicts() == ["chosen", verdict]
    assert f"next graph:eng1 (FMA_MATH) {verdict}" in str(selection)


@pytest.mark.parametrize(
    ("factor", "words"),
    [(0.5, "50.0 % faster"), (10.9, "990.0 % slower"), (11.0, "11 times slower")],
)
def test_what_is_far_behind_is_so_many_times_slower(factor: float, words: str) -> None:
    times = timed((1.0, 1.0), (2.0 * factor, factor), (factor, None))
    selection = Selection(FakeProblem(), tuple(times), 0, (None,) * 3, "measured")  # type: ignore[arg-type]
    _, on_device, back_to_back = selection.verdicts()
    assert on_device.startswith(f"{words} on the device, ")
    assert back_to_back.startswith(words)
    line = str(replace(selection, candidates=(times[0], times[2]), objections=(None, None)))
    assert f"next graph:eng2 (FMA_MATH) {words}" in line


def test_flags_choose_among_known_times_without_measuring(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*THREE)
    measured = fake_times(core, monkeypatch, {"ALGO_1": 1.0, "ALGO_0": 2.0, "GEMM": 3.0})
    run(selection="measure")
    run(selection="measure", workspace_limit=MIB)
    run(selection="measure", workspace_limit=MIB, deterministic=True)
    run(selection="heuristic")
    assert len(measured) == 1
    assert names(core) == ["ALGO_1", "ALGO_0", "GEMM", "ALGO_1"]
    limited = dgrad.selections()[1][0]
    assert limited.verdicts()[0].endswith("(50.0 % faster)")
    words = "with 2.0 MiB of workspace legacy:ALGO_1 (DEFAULT_MATH) would be 50.0 % faster"
    assert str(limited).endswith(f"; {words}")
    assert limited.policy is not None
    by_order = limited.policy._replace(selection="heuristic")
    for other in ({"source": "forced"}, {"policy": by_order}):  # no larger limit would let it run
        assert "of workspace" not in str(replace(limited, **other))


def test_a_larger_limit_is_told_of_what_was_chosen_before_it_was_measured(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*THREE)
    fake_times(core, monkeypatch, {"ALGO_1": 1.0, "ALGO_0": 2.0, "GEMM": 3.0})
    run(selection="measure", workspace_limit=0)
    assert "of workspace" not in str(dgrad.selections()[0][0])
    run(selection="measure")
    run(selection="measure", workspace_limit=0)
    words = "with 2.0 MiB of workspace legacy:ALGO_1 (DEFAULT_MATH) would be"
    assert words in str(dgrad.selections()[0][0])


@pytest.mark.parametrize(
    ("limited", "words"),
    [
        ([(0.031, 0.77)], "with 1.5 MiB of workspace graph:eng1 (FMA_MATH) would be 23.0 % faster"),
        ([(0.027, 1.1)], None),  # the device decides, and there it is slower
        ([(0.027, None)], "with 1.5 MiB of workspace graph:eng1 (FMA_MATH) would be 10.0 % faster"),
        ([(0.031, None)], None),
        ([(0.030, 0.99999)], None),  # it would read 0.0 %
        (
            [(0.020, 0.9), (0.031, 0.8)],
            "with 1.5 MiB of workspace graph:eng2 (FMA_MATH) would be 20.0 % faster",
        ),
    ],
)
def test_what_a_larger_workspace_would_bring_is_told_by_the_time_that_decides(
    limited: list[tuple[float, float | None]], words: str | None
) -> None:
    candidates = timed((0.030, 1.0), *limited, workspace_bytes=3 * MIB // 2)
    objections = (None, *["its workspace is over workspace_limit 1.0 MiB"] * len(limited))
    selection = Selection(FakeProblem(), tuple(candidates), 0, objections, "measured")  # type: ignore[arg-type]
    _, _, told = str(selection).partition("; ")
    assert told == (words or "")


def test_a_larger_limit_measures_what_the_smaller_left_out(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*THREE)
    measured = fake_times(core, monkeypatch, {"ALGO_1": 1.0, "ALGO_0": 2.0, "GEMM": 3.0})
    run(selection="measure", workspace_limit=MIB)
    run(selection="measure")
    assert measured == [["ALGO_0", "GEMM"], ["ALGO_1"]]
    assert names(core) == ["ALGO_0", "ALGO_1"]


def test_what_the_budget_left_out_is_timed_by_exhaustive_only(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*THREE)
    times: dict[str, float | None] = {"ALGO_1": 2.0, "ALGO_0": 3.0, "GEMM": None}
    measured = fake_times(core, monkeypatch, times)
    run(selection="measure")
    assert dgrad.selections()[0][0].verdicts()[2] == "not timed: the budget was spent"
    run(selection="measure", deterministic=True)
    assert len(measured) == 1
    times["GEMM"] = 1.0
    run(selection="exhaustive")
    assert measured[1] == ["GEMM"]
    assert names(core) == ["ALGO_1", "ALGO_1", "ALGO_1", "GEMM"]  # ALGO_1 for the check of GEMM


def test_what_is_chosen_anew_under_the_same_flags_is_announced_and_counted(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = start(*THREE)
    fake_times(core, monkeypatch, {"ALGO_1": 1.0, "ALGO_0": 2.0, "GEMM": None})
    run(selection="measure")
    fake_times(core, monkeypatch, {"ALGO_1": 1.0, "ALGO_0": 2.0, "GEMM": 0.5})
    run(selection="exhaustive")
    run(selection="measure")
    assert names(core)[-1] == "GEMM"
    told = [(s.candidate.algorithm, n) for s, n in dgrad.selections()]
    assert told == [("ALGO_1", 1), ("GEMM", 1), ("GEMM", 1)]


def test_one_usable_candidate_is_not_timed(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    core = start(FakeResult("ALGO_1"), FakeResult("GEMM", rejected="CUDNN_STATUS_NOT_SUPPORTED"))
    measured = fake_times(core, monkeypatch, {})
    run(selection="exhaustive")
    assert measured == []
    assert dgrad.selections()[0][0].source == "heuristic"


@pytest.mark.parametrize(("how", "expected"), [("measure", 1.5), ("exhaustive", None)])
def test_measure_has_the_budget_of_its_flag_and_exhaustive_has_none(
    start: Start, monkeypatch: pytest.MonkeyPatch, how: str, expected: float | None
) -> None:
    start(*THREE)
    budgets: list[float | None] = []

    def measure(contestants: object, budget_s: float | None, *_: object) -> None:
        budgets.append(budget_s)

    monkeypatch.setattr(_measuring, "measure", measure)
    run(selection=how, measure_budget=1.5)
    assert budgets == [expected]
