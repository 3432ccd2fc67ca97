"""Who watches is told of what its own call runs, on whatever thread, and of nothing else."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad import _autograd, _watch
from dgrad._watch import note, observers, seen_by, watchers, watching

UP, X = dgrad.ConvTranspose2d(2, 2, 2), torch.randn(1, 2, 3, 3)


def on_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.fixture
def other_thread() -> Any:
    """A thread that is there before anybody watches."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(int).result()
        yield pool


def test_threads_that_start_after_an_inner_block_has_ended_are_told_of() -> None:
    with watching() as outer:
        with watching() as inner:
            pass
        on_a_thread(lambda: note("ran"))
    assert (outer, inner) == (["ran"], [])


def test_what_other_threads_run_meanwhile_is_not_told(other_thread: ThreadPoolExecutor) -> None:
    def call(x: Tensor) -> Tensor:
        other_thread.submit(UP, x).result()
        other_thread.submit(on_a_thread, lambda: UP(x)).result()
        return x

    assert str(dgrad.explain(call, X)) == "no transposed convolution ran"
    assert dgrad.explain(lambda: call(UP(X))).notes != []


def test_what_the_threads_run_that_a_call_starts_is_told() -> None:
    def call(x: Tensor) -> None:
        on_a_thread(lambda: on_a_thread(lambda: UP(x)))

    assert len(dgrad.explain(call, X).notes) == 1
    with ThreadPoolExecutor(1) as pool:
        assert len(dgrad.explain(lambda: pool.submit(UP, X).result()).notes) == 1


def test_blocks_of_several_threads_are_told_apart() -> None:
    together = threading.Barrier(4, timeout=20)

    def watch(name: str) -> list[Any]:
        with watching() as events:
            together.wait()
            note(name)
            on_a_thread(lambda: note(f"{name} started"))
            together.wait()
        return events

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(watch, "abcd"))
    assert found == [[name, f"{name} started"] for name in "abcd"]


def test_a_block_in_a_block_is_told_of_its_own_and_tells_the_outer_one() -> None:
    told: list[Any] = []
    with watching(told.append) as outer:
        note("first")
        with watching() as inner:
            note("second")
        note("third")
    note("after")
    assert inner == ["second"]
    assert outer == told == ["first", "second", "third"]


class Noting(torch.autograd.Function):
    """Its backward pass has others in it, so many that autograd takes further threads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, depth: int, threads: set[int]) -> Tensor:
        ctx.left = depth, threads
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        depth, threads = ctx.left
        threads.add(threading.get_ident())
        note(f"{depth}")
        if depth:
            backward(depth - 1, threads)
        return grads[0], None, None


def backward(depth: int, threads: set[int]) -> None:
    with torch.enable_grad():
        x = torch.ones(1, requires_grad=True)
        Noting.apply(x, depth, threads).sum().backward()  # type: ignore[no-untyped-call]


def test_what_autograds_threads_run_is_told() -> None:
    threads: set[int] = set()
    with watching() as events:
        backward(70, threads)
    assert len(threads) > 1
    assert events == [f"{depth}" for depth in range(70, -1, -1)]


def test_gradients_are_told_to_those_who_watched_their_call(
    other_thread: ThreadPoolExecutor,
) -> None:
    with watching() as events:
        by = observers()

        def gradients(seen: Any, name: str) -> None:
            with seen_by(seen):
                note(name)
                on_a_thread(lambda: note(f"{name}, on a thread"))
            note("after")

        other_thread.submit(gradients, by, "ours").result()
        other_thread.submit(gradients, (), "theirs").result()
    assert events == ["ours", "ours, on a thread"]
    with seen_by(by):
        assert observers() == ()


def test_a_thread_that_outlives_the_block_is_not_watched_any_more() -> None:
    go_on, told = threading.Event(), []
    with watching() as events:
        thread = threading.Thread(target=lambda: (go_on.wait(20), told.append(observers())))
        thread.start()
        with watching():
            pass
    with watching() as later:
        go_on.set()
        thread.join()
    assert (told, events, later) == ([()], [], [])


def test_threads_start_as_ever_where_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    before = threading.Thread.start
    with watching(), watching():
        assert threading.Thread.start is not before
    assert threading.Thread.start is before
    assert not watchers
    # Another may put its own around what is there, and leave it for a while.
    with monkeypatch.context() as patch:
        for _ in range(3):
            with watching():
                inside = threading.Thread.start
                around = lambda thread, inside=inside: inside(thread)  # noqa: E731
                patch.setattr(threading.Thread, "start", around)
        with watching() as events:
            on_a_thread(lambda: note("told"))
        assert events == ["told"]
    with watching():
        pass
    assert threading.Thread.start is before


def test_an_interrupt_leaves_nobody_watching() -> None:
    def interrupt(_event: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), watching(interrupt):
        note("x")
    assert not watchers
    assert observers() == ()


def test_threads_of_a_call_are_freed_without_the_garbage_collector() -> None:
    gc.disable()
    try:
        with watching():
            thread = threading.Thread(target=int)
            thread.start()
            thread.join()
            gone = weakref.ref(thread)
            del thread
        assert gone() is None
    finally:
        gc.enable()


def test_a_process_ends_well_after_threads_that_were_watched() -> None:
    code = """
from concurrent.futures import ThreadPoolExecutor
import torch, dgrad
up, x = dgrad.ConvTranspose2d(2, 2, 2), torch.randn(1, 2, 3, 3)
pool = ThreadPoolExecutor(4)
dgrad.explain(lambda: list(pool.map(up, [x] * 8)))
"""
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


def test_gradients_that_nobody_watched_are_not_told_to_who_begins_while_they_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[object] = []

    def long_way(*_: object) -> tuple[None, ...]:
        watcher = object()
        _watch._enter(watcher, lambda event: None)  # as another thread may meanwhile
        told.extend(observers())
        _watch._leave(watcher)
        return (None,) * 4

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            recorded = SimpleNamespace(saved_tensors=(), made=None)
            _autograd._Convolution.backward(recorded, *grads)
            return grads[0]

    monkeypatch.setattr(_autograd, "_long_way", long_way)
    monkeypatch.setattr(_autograd, "plan_cache", SimpleNamespace(ready=None))
    y = Backward.apply(torch.ones(1, requires_grad=True))  # type: ignore[no-untyped-call]
    y.backward()
    assert told == []
