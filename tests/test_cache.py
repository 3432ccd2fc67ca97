"""The bounded cache, and the one of plans that users see."""

from __future__ import annotations

import gc
import itertools
import random
import sys
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dgrad
from dgrad._cache import BoundedCache
from dgrad.planner import PlanCache


@pytest.fixture
def empty_plan_cache() -> Iterator[None]:
    before = dgrad.plan_cache.max_size
    dgrad.plan_cache.clear()
    yield
    dgrad.plan_cache.max_size = before
    dgrad.plan_cache.clear()


def test_it_returns_what_was_put_and_counts() -> None:
    cache: BoundedCache[str, int] = BoundedCache(max_size=2)
    assert cache.get("a") is None
    cache.put("a", 1)
    assert cache.get("a") == 1
    cache.put("a", 2)
    assert cache.get("a") == 2
    assert (cache.size, cache.hits, cache.misses) == (1, 2, 1)


def test_the_least_recently_used_entry_goes_first() -> None:
    cache: BoundedCache[str, int] = BoundedCache(max_size=2)
    cache.put("a", 1)
    cache.put("b", 2)
    cache.get("a")
    cache.put("c", 3)
    assert [cache.get(key) for key in "abc"] == [1, None, 3]


def test_putting_again_counts_as_use() -> None:
    cache: BoundedCache[str, int] = BoundedCache(max_size=2)
    cache.put("a", 1)
    cache.put("b", 2)
    cache.put("a", 10)
    cache.put("c", 3)
    assert [cache.get(key) for key in "abc"] == [10, None, 3]


@given(
    max_size=st.integers(1, 5),
    uses=st.lists(st.tuples(st.booleans(), st.integers(0, 8)), max_size=60),
)
def test_it_behaves_like_a_list_in_the_order_of_use(
    max_size: int, uses: list[tuple[bool, int]]
) -> None:
    cache: BoundedCache[int, str] = BoundedCache(max_size)
    model: list[int] = []  # keys, the most recently used last
    hits = misses = 0
    for puts, key in uses:
        known = key in model
        if known:
            model.remove(key)
        if puts:
            cache.put(key, f"value {key}")
            model = [*model, key][-max_size:]
            continue
        assert cache.get(key) == (f"value {key}" if known else None)
        hits, misses = hits + known, misses + (not known)
        model += [key] * known
    assert (cache.size, cache.hits, cache.misses) == (len(model), hits, misses)


def test_a_smaller_max_size_forgets_the_oldest_at_once() -> None:
    cache: BoundedCache[int, int] = BoundedCache(max_size=5)
    for key in range(5):
        cache.put(key, key)
    cache.max_size = 2
    assert (cache.size, cache.max_size) == (2, 2)
    assert [cache.get(key) for key in range(5)] == [None, None, None, 3, 4]
    cache.max_size = 3
    cache.put(5, 5)
    assert cache.size == 3


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", None])
def test_a_max_size_that_holds_nothing_is_refused(value: object) -> None:
    cache: BoundedCache[int, int] = BoundedCache(max_size=5)
    with pytest.raises(ValueError, match=r"max_size is .*expected an integer of at least 1"):
        cache.max_size = value  # type: ignore[assignment]
    assert cache.max_size == 5


def test_clear_forgets_entries_and_counts() -> None:
    cache: BoundedCache[str, int] = BoundedCache(max_size=2)
    cache.put("a", 1)
    cache.get("a")
    cache.get("b")
    cache.clear()
    assert (cache.size, cache.hits, cache.misses) == (0, 0, 0)
    assert cache.get("a") is None
    assert cache.max_size == 2


def test_the_text_says_the_counts() -> None:
    cache: BoundedCache[str, int] = BoundedCache(max_size=7)
    cache.put("a", 1)
    cache.get("a")
    cache.get("b")
    assert repr(cache) == "<BoundedCache size=1 max_size=7 hits=1 misses=1>"


def test_many_threads_at_once_break_nothing() -> None:
    cache: BoundedCache[int, tuple[int, str]] = BoundedCache(max_size=16)
    wrong: list[object] = []
    start = threading.Barrier(8)

    def work(seed: int) -> None:
        random_numbers = random.Random(seed)
        try:
            start.wait()
            for _ in range(4000):
                key = random_numbers.randrange(40)
                action = random_numbers.random()
                if action < 0.5:
                    found = cache.get(key)
                    if found not in (None, (key, "value")):
                        wrong.append((key, found))
                elif action < 0.98:
                    cache.put(key, (key, "value"))
                elif action < 0.99:
                    cache.max_size = random_numbers.randrange(8, 17)
                else:
                    cache.clear()
                if cache.size > 16 + 8:  # each thread may have put one that it has yet to trim
                    wrong.append(cache.size)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache.size <= cache.max_size


@pytest.mark.usefixtures("empty_plan_cache")
def test_a_call_like_one_before_finds_its_preparation() -> None:
    x, w = torch.ones(1, 2, 3, 3), torch.ones(2, 1, 3, 3)
    dgrad.conv_transpose2d(x, w)
    assert (dgrad.plan_cache.hits, dgrad.plan_cache.misses) == (0, 1)
    for _ in range(3):
        dgrad.conv_transpose2d(x, w)
    assert (dgrad.plan_cache.hits, dgrad.plan_cache.misses) == (3, 1)
    dgrad.conv_transpose2d(x, w, padding=1)
    assert (dgrad.plan_cache.hits, dgrad.plan_cache.misses) == (3, 2)


X = torch.ones(2, 4, 6, 6)
W = torch.ones(4, 2, 3, 3)
BIAS = torch.ones(2)
CHANGES = {
    "shape of input": ((X[:, :, 1:].contiguous(), W), {}),
    "strides of input": ((X.transpose(2, 3), W), {}),
    "alignment of input": ((torch.ones(X.numel() + 1)[1:].view(X.shape), W), {}),
    "shape of weight": ((X, W[:, :1].contiguous()), {}),
    "strides of weight": ((X, W.transpose(2, 3)), {}),
    "dtype": ((X.double(), W.double()), {}),
    "device": ((X.to("meta"), W.to("meta")), {}),
    "bias": ((X, W, BIAS), {}),
    "stride": ((X, W), {"stride": 2}),
    "padding": ((X, W), {"padding": 1}),
    "output_padding": ((X, W), {"stride": 2, "output_padding": 1}),
    "dilation": ((X, W), {"dilation": 2}),
    "groups": ((X, W), {"groups": 2}),
}


@pytest.mark.usefixtures("empty_plan_cache")
@pytest.mark.parametrize(("tensors", "named"), CHANGES.values(), ids=CHANGES.keys())
def test_another_argument_is_another_entry(
    tensors: tuple[torch.Tensor, ...], named: dict[str, int]
) -> None:
    dgrad.conv_transpose2d(X, W)
    dgrad.conv_transpose2d(X, W, stride=2)
    before = dgrad.plan_cache.misses
    dgrad.conv_transpose2d(*tensors, **named)
    if named == {"stride": 2}:
        assert dgrad.plan_cache.hits == 1
        return
    assert dgrad.plan_cache.misses == before + 1


@pytest.mark.usefixtures("empty_plan_cache")
@pytest.mark.parametrize(
    "flags",
    [{"allow_tf32": True}, {"allow_tf32": False}, {"deterministic": True}, {"workspace_limit": 0}],
    ids=str,
)
def test_another_flag_is_another_entry(flags: dict[str, object]) -> None:
    with dgrad.flags(allow_tf32=not flags.get("allow_tf32", False), deterministic=False):
        dgrad.conv_transpose2d(X, W)
        with dgrad.flags(**flags):
            dgrad.conv_transpose2d(X, W)
        assert (dgrad.plan_cache.hits, dgrad.plan_cache.misses) == (0, 2)
        dgrad.conv_transpose2d(X, W)
        assert dgrad.plan_cache.hits == 1


@pytest.mark.usefixtures("empty_plan_cache")
def test_other_values_are_no_other_entry() -> None:
    for value in (1.0, 2.0, float("nan")):
        dgrad.conv_transpose2d(X * value, W * value)
    assert dgrad.plan_cache.misses == 1


@pytest.mark.usefixtures("empty_plan_cache")
def test_the_cache_of_plans_stays_within_its_size() -> None:
    dgrad.plan_cache.max_size = 8
    w = torch.ones(1, 1, 1, 1)
    for width in range(1, 50):
        dgrad.conv_transpose2d(torch.ones(1, 1, 1, width), w)
    assert dgrad.plan_cache.size == 8


@pytest.mark.usefixtures("empty_plan_cache")
def test_each_thread_prepares_for_itself() -> None:
    dgrad.conv_transpose2d(X, W)
    thread = threading.Thread(target=dgrad.conv_transpose2d, args=(X, W))
    thread.start()
    thread.join()
    assert dgrad.plan_cache.misses == 2


@pytest.mark.usefixtures("empty_plan_cache")
def test_threads_that_call_and_clear_at_once_all_get_their_results() -> None:
    expected = torch.nn.functional.conv_transpose2d(X, W)
    wrong: list[object] = []

    def work() -> None:
        try:
            for i in range(100):
                if not torch.equal(dgrad.conv_transpose2d(X, W), expected):
                    wrong.append("another result")
                if i % 10 == 0:
                    dgrad.plan_cache.clear()
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_native_code_ran_counts_as_used() -> None:
    cache = PlanCache(max_size=2)
    native = SimpleNamespace(hits=0, clear=lambda: None)
    cache.ready = cast(Any, native)
    runs = {"a": False, "b": False, "c": False}
    for key in "ab":
        cache.put(key, SimpleNamespace(ran_natively=lambda key=key: runs[key]))
    native.hits, runs["a"] = 1, True
    cache.put("c", SimpleNamespace(ran_natively=lambda: runs["c"]))
    assert [cache.get(key) is not None for key in "abc"] == [True, False, True]


def test_threads_that_use_a_full_cache_while_it_asks_what_ran_break_nothing() -> None:
    cache = PlanCache(max_size=64)
    native = SimpleNamespace(hits=0, clear=lambda: None)
    cache.ready = cast(Any, native)

    def entry() -> SimpleNamespace:
        return SimpleNamespace(ran_natively=lambda: [None for _ in range(20)] == [])

    for key in range(64):
        cache.put(key, entry())
    ended = threading.Event()

    def use() -> None:
        key = 0
        while not ended.is_set():
            key += 1
            cache.get(key % 200)

    threads = [threading.Thread(target=use) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for key in range(64, 400):
            native.hits += 1
            cache.put(key, entry())
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        for thread in threads:
            thread.join()
    assert cache.size == 64


def test_an_entry_that_is_used_while_the_others_are_looked_at_breaks_nothing() -> None:
    cache = PlanCache(max_size=64)
    native = SimpleNamespace(hits=0, clear=lambda: None)
    cache.ready = cast(Any, native)
    for key in range(64):
        cache.put(key, SimpleNamespace(ran_natively=lambda: False))
    keys = itertools.cycle(range(64))
    threshold = gc.get_threshold()
    # Before Python 3.12 an object that is made may collect garbage, and so let other code run. Not
    # a pair that was there before, so all of these are held.
    pairs = [(key, -key) for key in range(4096)]
    gc.callbacks.append(lambda *_: cache.get(next(keys)))
    gc.set_threshold(1)
    try:
        native.hits = 1
        cache.put(64, SimpleNamespace(ran_natively=lambda: False))
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.pop()
    assert cache.size == 64
    assert len(pairs) == 4096
