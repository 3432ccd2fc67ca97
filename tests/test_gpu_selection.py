"""Choosing on a real GPU: measured, repeatable, commanded, and without a trace."""

from __future__ import annotations

import json
import logging
import math
import os
import pickle
import statistics
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dgrad
from dgrad import _measuring
from dgrad.measure import CLOSE, measure
from dgrad.planner import decisive_ms
from dgrad.selection import Candidate

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("own_store")]

# Layers whose candidates differ clearly and layers whose candidates tie, and of which kind.
SUITE = [
    ((8, 64, 128, 128), (64, 64, 3, 7), {}, {}),
    ((16, 32, 64, 128), (32, 64, 3, 3), {"stride": 5, "padding": 1, "dilation": 2}, {}),
    ((16, 32, 32, 64), (32, 16, 3, 5), {"stride": (2, 3), "padding": (1, 2), "groups": 4}, {}),
    ((8, 512, 32, 32), (512, 256, 2, 2), {"stride": 2}, {"dtype": "bfloat16"}),
    ((64, 256, 8, 8), (256, 128, 4, 4), {"stride": 2, "padding": 1}, {"backward": True}),
    ((2, 64, 64, 64), (64, 1, 4, 4), {"stride": 2, "padding": 1, "groups": 64}, {}),
    ((1, 8, 4, 4), (8, 8, 3, 3), {"stride": 2, "padding": 1}, {"bias": True}),
    (
        (16, 128, 32, 32),
        (128, 64, 3, 3),
        {"stride": 2, "padding": 1},
        {"dtype": "float16", "layout": "channels_last", "bias": True},
    ),
]


def tensors(
    x: tuple[int, ...] = (8, 64, 64, 64),
    w: tuple[int, ...] = (64, 64, 3, 5),
    dtype: str = "float32",
) -> tuple[Tensor, Tensor]:
    kind = getattr(torch, dtype)
    return (
        torch.randn(x, device="cuda", dtype=kind),
        torch.randn(w, device="cuda", dtype=kind),
    )


def only_selection() -> dgrad.Selection:
    [(selection, _)] = dgrad.selections()
    return selection


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def test_every_candidate_that_can_run_gets_a_time_and_the_fastest_wins() -> None:
    x, w = tensors()
    with dgrad.flags(selection="exhaustive"):
        y = dgrad.conv_transpose2d(x, w)
    selection = only_selection()
    times = {
        i: candidate.time_ms
        for i, candidate in enumerate(selection.candidates)
        if selection.objections[i] is None
    }
    assert selection.source == "measured"
    assert len(times) >= 2
    assert all(value is not None and value > 0 for value in times.values())
    best = min(value for value in times.values() if value is not None)
    chosen = times[selection.chosen]
    assert chosen is not None
    assert chosen <= best * CLOSE
    on_device = [c.device_ms for i, c in enumerate(selection.candidates) if i in times]
    if selection.candidate.device_ms is not None:
        assert selection.candidate.device_ms <= min(t for t in on_device if t is not None) * 1.03
    assert relative_error(y, F.conv_transpose2d(x.double(), w.double())) < 2e-3


def test_measuring_leaves_no_trace() -> None:
    x, w = tensors()
    x0, w0 = x.clone(), w.clone()
    torch.cuda.synchronize()
    stream = torch.cuda.current_stream()
    host, device = torch.get_rng_state(), torch.cuda.get_rng_state()
    dgrad.conv_transpose2d(*tensors((1, 4, 4, 4), (4, 4, 3, 3)))  # loads what stays loaded
    torch.cuda.synchronize()
    torch.set_rng_state(host)
    torch.cuda.set_rng_state(device)
    before = torch.cuda.memory_allocated()
    y = dgrad.conv_transpose2d(x, w)
    size = torch.cuda.memory_allocated() - before
    assert size == -(-y.untyped_storage().nbytes() // 512) * 512
    assert torch.equal(x, x0)
    assert torch.equal(w, w0)
    assert torch.cuda.current_stream() == stream
    assert torch.equal(torch.get_rng_state(), host)
    assert torch.equal(torch.cuda.get_rng_state(), device)


@pytest.mark.seconds(20)
def test_the_workspaces_that_were_tried_are_given_back() -> None:
    slack = 64 * 2**20
    given_back = 0
    for shape, kernel, tf32 in (
        ((16, 64, 128, 128), (64, 64, 3, 5), True),
        ((16, 64, 128, 128), (64, 64, 3, 5), False),
        ((64, 3, 256, 256), (3, 16, 5, 5), True),
        ((32, 128, 64, 64), (128, 128, 1, 1), True),
    ):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            dgrad.plan_cache.clear()
            x, w = (t.to(memory_format=memory_format) for t in tensors(shape, kernel))
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            with dgrad.flags(selection="exhaustive", allow_tf32=tf32):
                y = dgrad.conv_transpose2d(x, w)
            selection = only_selection()
            tried = max(c.workspace_bytes for c in selection.candidates if c.time_ms is not None)
            used = y.untyped_storage().nbytes() + selection.candidate.workspace_bytes
            assert torch.cuda.memory_reserved() - before < used + slack
            given_back += y.untyped_storage().nbytes() + tried > used + slack
    assert given_back, "no problem tried a workspace that is much larger than the chosen one's"


def test_two_threads_that_meet_the_same_problem_measure_it_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def counted(*arguments: object) -> None:
        calls.append(1)
        measure(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(_measuring, "measure", counted)
    x, w = tensors()
    expected = F.conv_transpose2d(x.double(), w.double())
    torch.cuda.synchronize()
    barrier = threading.Barrier(4)
    results: list[Tensor] = []

    def work() -> None:
        barrier.wait()
        results.append(dgrad.conv_transpose2d(x, w))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(calls) == 1
    assert len(results) == 4
    assert all(relative_error(y, expected) < 2e-3 for y in results)


def test_another_limit_determinism_or_precision_needs_no_new_measuring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, w = tensors((8, 64, 128, 128), (64, 64, 3, 3))
    with dgrad.flags(selection="exhaustive"):
        dgrad.conv_transpose2d(x, w)
        monkeypatch.setattr(_measuring, "measure", lambda *_: pytest.fail("measured again"))
        with dgrad.flags(deterministic=True):
            dgrad.conv_transpose2d(x, w)
        with dgrad.flags(workspace_limit=0):
            dgrad.conv_transpose2d(x, w)
        with dgrad.flags(allow_tf32=False):
            dgrad.conv_transpose2d(x, w)
    chosen = [selection.candidate for selection, _ in dgrad.selections()]
    assert len(chosen) == 4
    assert chosen[3].math_type == "FMA_MATH"
    assert chosen[1].deterministic
    assert chosen[2].workspace_bytes == 0


@pytest.mark.parametrize("direction", ["dgrad", "fprop", "wgrad"])
def test_allowing_tf32_needs_no_new_measuring(
    monkeypatch: pytest.MonkeyPatch, direction: str
) -> None:
    x, w = (t.requires_grad_(direction != "dgrad") for t in tensors((8, 64, 64, 64)))

    def call() -> Tensor:
        y = dgrad.conv_transpose2d(x, w)
        if direction == "dgrad":
            return y
        (gradient,) = torch.autograd.grad(y, x if direction == "fprop" else w, torch.ones_like(y))
        return gradient

    with dgrad.flags(measure_budget=0.3):
        with dgrad.flags(allow_tf32=False):
            strict = call().detach()
        monkeypatch.setattr(_measuring, "measure", lambda *_: pytest.fail("measured again"))
        call()
        dgrad.plan_cache.clear()  # as another process
        call()
    leaves = [t.detach().double().requires_grad_() for t in (x, w)]
    y = F.conv_transpose2d(*leaves)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    expected = {"dgrad": y.detach(), "fprop": gradients[0], "wgrad": gradients[1]}[direction]
    assert relative_error(strict, expected) < 5e-5  # tf32 errs by 3e-4


def test_a_limit_that_costs_time_says_how_much() -> None:
    x, w = tensors((8, 64, 256, 256), (64, 64, 3, 3))
    with dgrad.flags(selection="exhaustive"):
        dgrad.conv_transpose2d(x, w)
        free = only_selection().candidate
        assert free.workspace_bytes > 0
        with dgrad.flags(workspace_limit=free.workspace_bytes - 1):
            dgrad.conv_transpose2d(x, w)
    limited = dgrad.selections()[1][0]
    assert limited.candidate.workspace_bytes < free.workspace_bytes
    assert "over workspace_limit" in limited.verdicts()[limited.candidates.index(free)]
    if limited.candidate.time_ms > free.time_ms:  # type: ignore[operator]
        assert "of workspace" in str(limited)


def test_the_first_usable_of_a_list_runs() -> None:
    x, w = tensors((2, 8, 16, 16), (8, 8, 3, 3))
    with dgrad.flags(algorithm=["legacy:FFT", "legacy:ALGO_1", "legacy:ALGO_0"]):
        dgrad.conv_transpose2d(x, w)
        assert only_selection().source == "forced"
        assert only_selection().candidate.name == "legacy:FFT"
        # With stride 2 cuDNN has no FFT.
        dgrad.conv_transpose2d(x, w, stride=2)
        assert dgrad.selections()[1][0].candidate.name == "legacy:ALGO_1"


def test_a_layers_flags_hold_for_its_gradients_too() -> None:
    layer = dgrad.ConvTranspose2d(8, 8, 3, device="cuda")
    layer.flags = dgrad.Flags(selection="heuristic", deterministic=True)
    layer(torch.randn(2, 8, 9, 9, device="cuda", requires_grad=True)).sum().backward()
    assert {s.problem.direction for s, _ in dgrad.selections()} == {"dgrad", "fprop", "wgrad"}
    assert all(s.source == "heuristic" for s, _ in dgrad.selections())
    assert all(s.candidate.deterministic for s, _ in dgrad.selections())


@pytest.mark.parametrize("selection", ["measure", "exhaustive"])
def test_strict_float32_never_runs_tf32(selection: str) -> None:
    for x_size, w_size, options, _ in SUITE:
        x, w = tensors(x_size, w_size)
        with dgrad.flags(allow_tf32=False, selection=selection):
            y = dgrad.conv_transpose2d(x, w, **options)  # type: ignore[arg-type]
        expected = F.conv_transpose2d(x.double(), w.double(), **options)
        error = relative_error(y, expected)
        assert error < 5e-6, (x_size, error, str(dgrad.selections()[-1][0]))
    assert all(s.candidate.math_type == "FMA_MATH" for s, _ in dgrad.selections())


# Times the first call of each stored problem, for the three directions of eight layers. The layers
# differ in their batch alone, so that most of their kernels are loaded by the one before them.
FIRST_CALLS = """
import json, statistics, time, torch, dgrad
from dgrad import _measuring
measured = []
measure = _measuring.measure
_measuring.measure = lambda *a: (measured.append(1), measure(*a))

def layer(n):
    return [torch.randn(shape, device="cuda", requires_grad=True)
            for shape in ((n, 32, 40, 40), (32, 32, 3, 3))]

def time_ms(call):
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - begin) * 1e3

def extra_ms(x, w):
    "What the first call costs more than a later one: forward, grad_input, grad_weight."
    def forward():
        return dgrad.conv_transpose2d(x, w, None, 2, 1)
    def gradient(leaf):
        return lambda: torch.autograd.grad(y, leaf, ones, retain_graph=True)
    def extra(call):
        first = time_ms(call)
        return round(first - statistics.median(time_ms(call) for _ in range(9)), 3)
    extras = [extra(forward)]
    y = forward()
    ones = torch.ones_like(y)
    return extras + [extra(gradient(x)), extra(gradient(w))]

def later_ms(x, w):
    "One of many forward calls back to back."
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples = []
    with torch.no_grad():
        for _ in range(9):
            start.record()
            for _ in range(20):
                dgrad.conv_transpose2d(x, w, None, 2, 1)
            end.record()
            end.synchronize()
            samples.append(start.elapsed_time(end) / 20)
    return min(samples)

def round_ms():
    return [extra for x, w in layers for extra in extra_ms(x, w)]

def told(what):
    return [what(s) for s, _ in dgrad.selections()]

extra_ms(*layer(3))  # makes the context and the handles, loads libraries and kernels
layers = [layer(n) for n in range(4, 12)]
first = {"extra_ms": round_ms(), "sources": told(lambda s: s.source)}
chosen = told(lambda s: str(s.candidate))
rounds = []
for _ in range(3):
    dgrad.plan_cache.clear()  # forgets all but the store; the kernels stay loaded
    rounds.append(round_ms())
again = {"extra_ms": [min(each) for each in zip(*rounds)], "sources": told(lambda s: s.source)}
later = [later_ms(x, w) for x, w in layers]
print(json.dumps({"measured": len(measured), "chosen": chosen, "first": first, "again": again,
                  "later_ms": later}))
"""


@pytest.mark.processes
@pytest.mark.seconds(20)
def test_a_second_process_measures_nothing_and_starts_at_once(own_store: Path) -> None:
    def run() -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-c", FIRST_CALLS], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    first, second = run(), run()
    assert first["measured"] == 27
    assert second["measured"] == 0
    assert set(first["again"]["sources"]) == {"stored"}, "clear() left something known"
    for calls in (second["first"], second["again"]):
        assert set(calls["sources"]) == {"stored"}
    assert second["chosen"] == first["chosen"]
    # Of up to three, as other processes take their share of the machine's time.
    speeds = [sum(process["later_ms"]) for process in (first, second)]
    while len(speeds) < 4 and min(speeds[1:]) >= 1.1 * speeds[0]:
        speeds.append(sum(run()["later_ms"]))
    print(f"later calls of the first process and of later ones: {speeds} ms")
    assert min(speeds[1:]) < 1.1 * speeds[0]

    # The CUDA driver loads a kernel at its first launch. That is no cost of a stored selection,
    # so the largest is asked for without it, where dgrad reads the store and builds plans again:
    # the least of three here too.
    loading, loaded = second["first"]["extra_ms"], second["again"]["extra_ms"]
    for name, extra in (("with kernels to load", loading), ("with loaded kernels", loaded)):
        print(f"first calls over later ones, {name}: {extra} ms")  # pytest -rP shows it
    assert len(loaded) == len(loading) == 24
    assert max(loaded) < 5.0, loaded
    assert statistics.median(loading) < 5.0, loading


# Meets some problems as soon as the others are there too.
MEET = """
import json, os, sys, time, torch, dgrad
from dgrad import _measuring
from pathlib import Path
folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.cuda.set_device(rank % torch.cuda.device_count())
measured, measure = [], _measuring.measure
_measuring.measure = lambda *a: (measured.append(1), measure(*a))

def tensors(n):
    return [torch.randn(shape, device="cuda") for shape in ((n, 32, 40, 40), (32, 32, 3, 3))]

inputs = [tensors(n) for n in range(4, 8)]
with dgrad.flags(selection="heuristic"):
    dgrad.conv_transpose2d(*tensors(3), None, 2, 1)  # loads what takes long
torch.cuda.synchronize()
os.environ["DGRAD_LOG_FILE"] = str(folder / "selections.jsonl")
(folder / f"ready{rank}").touch()
until = time.monotonic() + 120
while len([*folder.glob("ready*")]) < world:
    assert time.monotonic() < until, "the others did not come"
    time.sleep(0.001)
with torch.no_grad():
    for x, w in inputs:
        dgrad.conv_transpose2d(x, w, None, 2, 1)
torch.cuda.synchronize()
print(json.dumps([len(measured), [str(s.candidate) for s, _ in dgrad.selections()][-4:]]))
"""


@pytest.mark.processes
@pytest.mark.seconds(6)
def test_of_processes_that_start_at_once_one_measures_each_problem(tmp_path: Path) -> None:
    if len({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}) > 1:
        pytest.skip("needs GPUs of one name")
    world = 4
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, str(tmp_path), str(rank), str(world)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    results = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            results.append(json.loads(out))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    sources: dict[str, list[str]] = {}
    for line in map(json.loads, (tmp_path / "selections.jsonl").read_text().splitlines()):
        sources.setdefault(json.dumps(line["problem"]["x"]), []).append(line["source"])
    assert len(sources) == 4
    for each in sources.values():
        assert sorted(each) == ["measured"] + ["stored"] * (world - 1)
    assert sum(measured for measured, _ in results) == 4
    assert len({json.dumps(chosen) for _, chosen in results}) == 1
    assert len(dgrad.store.list()) == 4


# Chooses for all of SUITE and prints each problem, what is chosen, and the times that decide.
CHOOSE = """
import json, pickle, sys, torch, dgrad
sys.stdin.readline()  # begins when the process before it has ended
for x, w, options, how in json.loads(sys.argv[1]):
    torch.manual_seed(0)
    dtype = getattr(torch, how.get("dtype", "float32"))
    layout = getattr(torch, how.get("layout", "contiguous_format"))
    x, w = (torch.randn(shape, device="cuda", dtype=dtype).to(memory_format=layout)
            .requires_grad_() for shape in (x, w))
    out_channels = w.shape[1] * options.get("groups", 1)
    b = torch.randn(out_channels, device="cuda", dtype=dtype) if how.get("bias") else None
    y = dgrad.conv_transpose2d(x, w, b, **options)
    if how.get("backward"):
        y.sum().backward()
found = []
for s, _ in dgrad.selections():
    usable = [c for c, o in zip(s.candidates, s.objections) if o is None and c.time_ms is not None]
    found.append((str(s.problem), str(s.candidate), usable))
print(pickle.dumps(found).hex())
"""


def together(samples: list[Candidate], least: int) -> Candidate:
    """A candidate with the medians of its times in many processes, known if in so many."""
    medians: dict[str, float | None] = {}
    for name in ("time_ms", "device_ms"):
        times = [t for c in samples if (t := getattr(c, name)) is not None]
        medians[name] = statistics.median(times) if len(times) >= least else None
    return replace(samples[0], **medians)  # type: ignore[arg-type]


def choices(count: int) -> list[Any]:
    """What so many processes chose, one after the other; each loads PyTorch in advance."""
    command, pipe = [sys.executable, "-c", CHOOSE, json.dumps(SUITE)], subprocess.PIPE
    environment = {**os.environ, "DGRAD_STORE": "off"}
    found: list[Any] = []
    with ExitStack() as stack:

        def start() -> subprocess.Popen[str]:
            process = subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment
            )
            stack.callback(process.communicate)
            stack.callback(process.kill)
            return process

        following = start()
        for _ in range(count):
            process, following = following, start()
            out, err = process.communicate("begin\n", timeout=300)
            assert process.returncode == 0, err
            found.append(pickle.loads(bytes.fromhex(out)))
    return found


@pytest.mark.alone
@pytest.mark.processes
@pytest.mark.seconds(150)
def test_twenty_fresh_processes_choose_alike() -> None:
    runs = choices(20)
    unlike: list[tuple[str, str, dict[str, float]]] = []
    for problem in zip(*runs, strict=True):
        # What decides is of the median of all processes: one alone would judge itself.
        samples: dict[str, list[Candidate]] = {}
        for _, _, usable in problem:
            for candidate in usable:
                samples.setdefault(str(candidate), []).append(candidate)
        chosen_ones = {chosen for _, chosen, _ in problem}
        candidates = [  # few processes say little of what none has chosen
            together(each, 1 if name in chosen_ones else 6) for name, each in samples.items()
        ]
        known = decisive_ms(candidates, range(len(candidates)))
        takes = {str(candidates[i]): time for i, time in known.items()}
        for name, chosen, _ in problem:
            if takes and takes.get(chosen, math.inf) > 1.03 * min(takes.values()):
                unlike.append((name, chosen, takes))
    print(f"{len(unlike)} of {20 * len(runs[0])} choices are more than 3 % behind: {unlike}")
    assert not unlike


def test_a_capture_measures_nothing_and_names_warm_up(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    dgrad.conv_transpose2d(*tensors((1, 4, 4, 4), (4, 4, 3, 3)))  # the thread has its handle
    torch.cuda.synchronize()
    x, w = tensors()
    caplog.set_level(logging.INFO, "dgrad")
    real = _measuring.measure
    monkeypatch.setattr(_measuring, "measure", lambda *_: pytest.fail("measured in a capture"))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = dgrad.conv_transpose2d(x, w)
    assert "dgrad.warm_up" in caplog.text
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert relative_error(y, F.conv_transpose2d(x.double(), w.double())) < 2e-3
    # After the capture the problem is measured like any other.
    monkeypatch.setattr(_measuring, "measure", real)
    dgrad.conv_transpose2d(x, w)
    assert dgrad.selections()[-1][0].source == "measured"


def test_after_warm_up_a_training_step_is_captured_and_its_replays_stay_right() -> None:
    torch.manual_seed(0)
    make = [
        dgrad.ConvTranspose2d(16, 32, 4, 2, 1, device="cuda"),
        torch.nn.BatchNorm2d(32, device="cuda"),
        torch.nn.ReLU(),
        dgrad.ConvTranspose2d(32, 3, 4, 2, 1, device="cuda"),
    ]
    model = torch.nn.Sequential(*make)
    x = torch.randn(8, 16, 16, 16, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        explanation = dgrad.warm_up(model, x)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
    torch.cuda.current_stream().wait_stream(side)
    # The input needs no gradient, so the first layer has no fprop.
    directions = [s.problem.direction for s in explanation.selections]
    assert sorted(directions) == ["dgrad", "dgrad", "fprop", "wgrad", "wgrad"]

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for p in model.parameters():
            p.grad.zero_()  # type: ignore[union-attr]
        loss = model(x).square().mean()
        loss.backward()

    reference = torch.nn.Sequential(
        *(
            torch.nn.ConvTranspose2d(16, 32, 4, 2, 1, device="cuda"),
            torch.nn.BatchNorm2d(32, device="cuda"),
            torch.nn.ReLU(),
            torch.nn.ConvTranspose2d(32, 3, 4, 2, 1, device="cuda"),
        )
    ).double()
    reference.load_state_dict(
        {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    )
    for round_ in range(4):
        x.copy_(torch.randn_like(x))
        for n in range(3):  # other work between the replays, and nothing left in the caches
            dgrad.conv_transpose2d(*tensors((n + 1, 16, 9 + round_, 9), (16, 8, 3, 3)))
        dgrad.plan_cache.clear()
        torch.cuda.empty_cache()
        graph.replay()
        wanted = reference(x.double()).square().mean()
        reference.zero_grad()
        wanted.backward()
        assert float(loss.detach()) == pytest.approx(float(wanted.detach()), rel=1e-3)
        for mine, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert mine.grad is not None
            assert theirs.grad is not None
            if theirs.grad.norm() > 1e-9:  # the bias before a batch norm has none
                assert relative_error(mine.grad, theirs.grad) < 2e-2


def test_explain_disturbs_nothing_and_says_why() -> None:
    layer = dgrad.ConvTranspose2d(8, 8, 3, device="cuda")
    x = torch.randn(2, 8, 9, 9, device="cuda", requires_grad=True)
    host, device = torch.get_rng_state(), torch.cuda.get_rng_state()
    explanation = dgrad.explain(layer, x, backward=True)
    assert x.grad is None
    assert layer.weight.grad is None
    assert torch.equal(torch.get_rng_state(), host)
    assert torch.equal(torch.cuda.get_rng_state(), device)
    assert explanation.selections[0].problem.direction == "dgrad"
    assert len(explanation.selections) == 3
    text = str(explanation)
    assert "chosen" in text
    assert "rejected: " in text
    json.dumps(explanation.to_dict(), allow_nan=False)


def test_the_snippet_of_an_error_makes_the_same_error_when_pasted() -> None:
    x, w = tensors((2, 8, 16, 16), (8, 8, 3, 3))
    x = x.to(memory_format=torch.channels_last)
    with (
        dgrad.flags(algorithm="legacy:FFT", workspace_limit=64, allow_tf32=False),
        pytest.raises(dgrad.NotSupportedError) as error,
    ):
        dgrad.conv_transpose2d(x, w, None, 2, 1, 1)
    message = str(error.value)
    snippet = message.split("To reproduce:\n")[1]
    with pytest.raises(dgrad.NotSupportedError) as again:
        exec(snippet, {})
    assert str(again.value) == message


def test_selecting_takes_about_its_budget() -> None:
    x, w = tensors((8, 64, 512, 512), (64, 64, 3, 7))
    dgrad.conv_transpose2d(*tensors((1, 4, 4, 4), (4, 4, 3, 3)))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with dgrad.flags(measure_budget=0.05):
        dgrad.conv_transpose2d(x, w)
    torch.cuda.synchronize()
    # The candidate under way when the budget ends is finished, and plans are built besides.
    assert time.perf_counter() - begin < 1.0
