"""What a stored entry may not say of an engine, its bias and its precision: it is a miss."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dgrad import Candidate, _stored, store
from stored import (
    CANDIDATES,
    FIRST,
    HERE,
    MARKS,
    WITH_BIAS,
    assert_is_a_miss_with_one_warning,
    content_of,
    make_problem,
    set_in,
    written,
)

pytestmark = MARKS

ENGINE = ("candidates", 4)
LONGEST = "eng999999999" + "_k999999999=999999999" * 64
WRONG_ENGINES = (
    "", "eng", "eng-5", "eng+5", "eng 5", " eng5", "eng5 ", "eng5\n", "eng5\0", "ENG5", "5",
    "xeng5", "eng5.0", "eng0x5", "eng1000000000", "eng\u0665", "eng5_k\u0662=3", "eng5_k2=\uff13",
    "eng5_", "eng5_k2", "eng5_k2=", "eng5_k-2=3", "eng5_k=3", "eng5_k2=3_", "eng5_k2=3,k4=0",
    "eng5_k2==3", "eng5k2=3", LONGEST + "_k1=1", "+identity", "eng5identity", "eng5+", "eng5+bias",
    "eng5+identity ", "eng5+identity+identity", "eng5+identityeng5", "+identityeng5",
    "eng+identity", "engines", "engines+identity",  # stand for a refusal, and may not run
    "engines5", "ALGO_1", "graph:eng5", "legacy:ALGO_1", "../eng5", "eng5/../eng6", "eng5;eng6",
)  # fmt: skip


@pytest.mark.parametrize("name", WRONG_ENGINES, ids=ascii)
def test_a_wrong_engine_is_a_miss(
    store_root: Path, name: str, warnings_of_store: Callable[[], list[str]]
) -> None:
    file = written(store_root)
    file.write_text(json.dumps(set_in(*ENGINE, "algorithm", to=name)(content_of(file))))
    assert "whose algorithm is" in assert_is_a_miss_with_one_warning(warnings_of_store)
    assert store.list() == []


@pytest.mark.parametrize("direction", ["fprop", "wgrad"])
def test_a_compiled_engine_of_a_gradient_is_a_miss(
    direction: str, store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    problem = make_problem(direction=direction)  # it can be wrong: see gather
    store.write(problem, [CANDIDATES[4]])
    file = store_root / HERE / _stored.file_name(problem)
    assert store.read(problem) == [CANDIDATES[4]]
    changed = set_in(*FIRST, "algorithm", to="eng5_k2=3_k24=0+identity")(content_of(file))
    file.write_text(json.dumps(changed))
    text = assert_is_a_miss_with_one_warning(warnings_of_store, problem)
    assert "whose algorithm is 'eng5_k2=3_k24=0+identity'" in text


@pytest.mark.parametrize("name", ["eng5_k2=3_k24=0", "ALGO_9", "IMPLICIT_GEMM", "engines"])
def test_an_engine_is_no_legacy_algorithm(
    store_root: Path, name: str, warnings_of_store: Callable[[], list[str]]
) -> None:
    file = written(store_root)
    file.write_text(json.dumps(set_in(*FIRST, "algorithm", to=name)(content_of(file))))
    assert "whose algorithm is" in assert_is_a_miss_with_one_warning(warnings_of_store)


@pytest.mark.parametrize("name", ["eng0", "eng007", LONGEST, LONGEST + "+identity"])
def test_an_engine_of_any_numbers_comes_back(name: str) -> None:
    candidates = [replace(CANDIDATES[4], algorithm=name)]
    store.write(make_problem(), candidates)
    assert store.read(make_problem()) == candidates


@pytest.mark.parametrize("bias", ["fused", "add", "eng1_k24=4", "", False, 0, [], "null"])
def test_a_bias_in_an_unbiased_problem_is_a_miss(
    store_root: Path, bias: object, warnings_of_store: Callable[[], list[str]]
) -> None:
    for number in (0, 4):
        file = written(store_root)
        changed = set_in("candidates", number, "bias", to=bias)(content_of(file))
        file.write_text(json.dumps(changed))
        assert store.read(make_problem()) is None
    (text,) = warnings_of_store()
    assert "whose bias is" in text


WRONG_BIASES = (
    None, "", True, 1, ["add"], {"add": 1}, "Add", "add ", "fuse", "fused\n", "none", "eng",
    "eng-1", "eng\u0661", "eng1_k24", "eng1+identity", "eng1 + add", "engines", "ALGO_1",
    LONGEST + "_k1=1",
)  # fmt: skip


@pytest.mark.parametrize("bias", WRONG_BIASES, ids=ascii)
def test_a_wrong_bias_is_a_miss(
    store_root: Path, bias: object, warnings_of_store: Callable[[], list[str]]
) -> None:
    problem = make_problem(bias=True)
    for number in (1, 3):  # an engine, a legacy algorithm
        store.write(problem, WITH_BIAS)
        file = store_root / HERE / _stored.file_name(problem)
        changed = set_in("candidates", number, "bias", to=bias)(content_of(file))
        file.write_text(json.dumps(changed))
        assert store.read(problem) is None
    (text,) = warnings_of_store()
    assert "whose bias is" in text


def test_a_legacy_algorithm_that_claims_to_add_the_bias_is_a_miss(
    store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    problem = make_problem(bias=True)  # its result would lack the bias
    store.write(problem, WITH_BIAS)
    file = store_root / HERE / _stored.file_name(problem)
    file.write_text(json.dumps(set_in("candidates", 3, "bias", to="fused")(content_of(file))))
    assert "whose bias is" in assert_is_a_miss_with_one_warning(warnings_of_store, problem)


def test_the_entry_of_the_problem_without_its_bias_is_a_miss(
    store_root: Path, warnings_of_store: Callable[[], list[str]]
) -> None:
    plain, biased = make_problem(), make_problem(bias=True)
    store.write(plain, CANDIDATES)
    folder = store_root / HERE
    os.replace(folder / _stored.file_name(plain), folder / _stored.file_name(biased))
    text = assert_is_a_miss_with_one_warning(warnings_of_store, biased)
    assert "is for another problem" in text


@pytest.mark.parametrize("math_type", ["DEFAULT_MATH", "TENSOR_OP_MATH"])
@pytest.mark.parametrize("name", ["eng5_k2=3_k24=0", "eng5_k2=3_k24=0+identity"])
def test_no_file_lets_an_engine_round_strict_float32(
    store_root: Path, name: str, math_type: str, warnings_of_store: Callable[[], list[str]]
) -> None:
    problem = make_problem(tf32=False)
    good = Candidate("graph", name, "FMA_MATH", True, 0, time_ms=1.0)
    rejected = replace(good, algorithm="eng1", math_type=math_type, rejected="it may round")
    store.write(problem, [good, rejected])
    assert store.read(problem) == [good, rejected]
    file = store_root / HERE / _stored.file_name(problem)
    file.write_text(json.dumps(set_in(*FIRST, "math_type", to=math_type)(content_of(file))))
    text = assert_is_a_miss_with_one_warning(warnings_of_store, problem)
    assert "it may round float32 to tf32" in text
    half = make_problem(dtype="float16", tf32=False)
    store.write(half, [replace(good, math_type=math_type)])
    assert store.read(half) == [replace(good, math_type=math_type)]


@pytest.mark.parametrize("math_type", ["DEFAULT_MATH", "TENSOR_OP_MATH_ALLOW_CONVERSION"])
def test_no_file_lets_a_less_precise_candidate_run(
    store_root: Path, math_type: str, warnings_of_store: Callable[[], list[str]]
) -> None:
    problem = make_problem(tf32=False)
    store.write(problem, [Candidate("legacy", "ALGO_1", "FMA_MATH", True, 0, time_ms=1.0)])
    file = store_root / HERE / _stored.file_name(problem)
    file.write_text(json.dumps(set_in(*FIRST, "math_type", to=math_type)(content_of(file))))
    assert "it may round" in assert_is_a_miss_with_one_warning(warnings_of_store, problem)
