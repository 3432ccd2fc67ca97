"""What the tests of knowledge share: candidates of each kind, and what is known of a problem."""

from __future__ import annotations

from dgrad._knowledge import Knowledge
from dgrad.selection import Candidate
from fake_cudnn import FakeProblem

CANDIDATES = [
    Candidate("graph", "eng5_k2=3_k24=0", "TENSOR_OP_MATH", True, 512, 0.1 + 0.2, bias="add"),
    Candidate("graph", "eng0+identity", "FMA_MATH", False, 2**40, None, skipped=True),
    Candidate("legacy", "ALGO_1", "FMA_MATH", True, 0, 1e-6, bias="eng1_k24=4"),
    Candidate("legacy", "FFT", "DEFAULT_MATH", True, 1, rejected="größer: ä\n\udcff", bias="fused"),
    Candidate("graph", "engines", "", False, 0, rejected="no room", out_of_memory=True),
]


def known(candidates: list[Candidate]) -> Knowledge:
    return Knowledge(FakeProblem(), candidates, "measured")  # type: ignore[arg-type]
