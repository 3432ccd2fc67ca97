"""How `compare` takes times in turn: what slows the machine for a while hits all alike."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

import pytest
import torch

from dgrad.bench import compare, timing
from dgrad.bench.timing import Sampler

PEERS = ["pytorch", "pytorch_benchmark"]


class Machine:
    """One on which only a clock runs, and which may be three times slower half of the time.

    Each contestant's time of a run is given, in seconds; `turns` is who was asked, and for how
    long, and `chosen` each one's setting of benchmark.
    """

    def __init__(self, slow_s: float = 0.0, now: float = 0.0, **run_s: float) -> None:
        self.slow_s, self.run_s, self.now = slow_s, run_s, now
        self.turns: list[tuple[str, float]] = []
        self.chosen: dict[str, bool] = {}

    def samples(self, budget_s: float = 1.0) -> dict[str, list[float]]:
        workers: Any = {name: Contestant(self, name) for name in self.run_s}
        return compare._samples(workers, budget_s)

    def run(self, name: str) -> float:
        slow = self.slow_s > 0 and self.now % (2 * self.slow_s) < self.slow_s
        took = self.run_s[name] * (3 if slow else 1)
        self.now += took
        return took * 1e3


class Contestant:
    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name

    def ask(self, do: str, seconds: float = 0.0, benchmark: bool = False) -> dict[str, Any]:
        machine, name = self.machine, self.name
        if do == "prepare":
            machine.chosen[name] = benchmark
            return {"run_s": machine.run_s[name]}
        machine.turns.append((name, seconds))
        runs = max(1, int(seconds / machine.run_s[name]))
        return {"samples_ms": [machine.run(name) for _ in range(runs)]}


@pytest.mark.parametrize("slow_s", [0.25, 0.4, 0.75, 1.0, 1.5])
def test_a_machine_that_is_slow_for_a_while_changes_no_ratio(slow_s: float) -> None:
    runs = {"pytorch": 0.0012, "pytorch_benchmark": 0.0011, "dgrad": 0.001}
    for begin in range(20):
        machine = Machine(slow_s, begin / 10 * slow_s, **runs)
        medians = {name: statistics.median(each) for name, each in machine.samples().items()}
        assert medians["pytorch"] / medians["dgrad"] == pytest.approx(1.2)
        assert medians["pytorch_benchmark"] / medians["dgrad"] == pytest.approx(1.1)


def test_the_turns_are_short_and_take_no_more_time_than_is_given() -> None:
    machine = Machine(pytorch=0.001, pytorch_benchmark=0.001, dgrad=0.001)
    samples = machine.samples(budget_s=2.0)
    spent = Counter[str]()
    for name, seconds in machine.turns:
        spent[name] += seconds
        assert seconds <= 2.0 / 20
    assert max(spent.values()) == pytest.approx(2.0)
    assert Counter(name for name, _ in machine.turns)["dgrad"] == 20
    # those beside dgrad's, in alternating order
    names = [name for name, _ in machine.turns]
    assert names[-60:] == [*PEERS, "dgrad", "dgrad", *PEERS[::-1]] * 10
    assert [len(each) for each in samples.values()] == [pytest.approx(1600, abs=20)] * 3


@pytest.mark.parametrize(("run_s", "most"), [(0.1, 10), (0.3, 5), (30.0, 5)])
def test_long_runs_have_fewer_turns_so_that_the_time_does_not_grow(run_s: float, most: int) -> None:
    machine = Machine(pytorch=run_s, pytorch_benchmark=run_s / 2, dgrad=run_s / 2)
    samples = machine.samples()
    turns = Counter(name for name, _ in machine.turns)
    assert turns["pytorch"] == turns["pytorch_benchmark"] == most
    assert all(len(each) >= turns["dgrad"] >= 4 for each in samples.values())


@pytest.mark.parametrize("faster", PEERS)
def test_the_first_turns_say_which_setting_dgrads_model_has(faster: str) -> None:
    machine = Machine(**{**dict.fromkeys(PEERS, 0.002), faster: 0.001}, dgrad=0.001)
    machine.samples()
    expected = faster == "pytorch_benchmark"
    assert machine.chosen == {"pytorch": False, "pytorch_benchmark": True, "dgrad": expected}


def test_each_turn_warms_up_before_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cold, now, run_s = [True], [0.0], 2.0**-10

    def call() -> None:
        now[0] += 5 * run_s if cold[0] else run_s
        cold[0] = False

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    sampler = Sampler(call, torch.device("cpu"))
    assert sampler.run_s == run_s
    for runs, counted in ((40, 30), (4, 3)):
        cold[0], begin = True, now[0]
        assert sampler.sample(runs * run_s) == [run_s * 1e3] * counted
        assert now[0] - begin == (runs + 4) * run_s  # what the cold one took longer
    assert len(sampler.sample(3 * run_s)) == 3
    begin = now[0]
    assert len(sampler.sample(10.0)) == 400
    assert now[0] - begin == 800 * run_s
    assert len(sampler.sample(0.0, least=2)) == 2
