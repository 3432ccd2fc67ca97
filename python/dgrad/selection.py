"""Candidates and selections: plain records of what can run a problem and what was chosen."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .exceptions import NOT_ASKED, THIS_TIME
from .measure import CLOSE

if TYPE_CHECKING:
    from ._core import Problem
    from .config import Policy

PROBLEM_FIELDS = (
    "direction",
    "dtype",
    "tf32",
    "layout",
    "x",
    "w",
    "y",
    "padding",
    "stride",
    "dilation",
    "groups",
    "bias",
    "alignment",
    "device",
)

# How a bias is added, where not by an engine in a cuDNN graph of its own.
FUSED = "fused"  # by the engine that convolves
ADD = "add"  # by PyTorch
IDENTITY = "+identity"  # ends the name of an engine that runs a convolution and a copy as one

_FASTER = 0.9995  # times closer than this are shown as the same


def format_bytes(count: int) -> str:
    """A size as people read it: 0 B, 512 B, 1.5 MiB, 4.0 GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


def format_ms(time_ms: float) -> str:
    """A time with three digits that count: 0.0213 ms, 5.21 ms."""
    return f"{time_ms:.3g} ms"


def problem_dict(problem: Problem) -> dict[str, Any]:
    """The fields of a problem as plain data."""
    return {name: getattr(problem, name) for name in PROBLEM_FIELDS}


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a problem.

    Attributes:
        provider: where it comes from: "legacy" (cuDNN's algorithms) or "graph" (the engines of
            its backend API).
        algorithm: the provider's name for it: "ALGO_1", or engine and knobs as
            "eng5_k2=3_k24=0"; with "+identity" the engine also does an operation that changes
            nothing, which lets cuDNN compile it for the problem.
        math_type: cuDNN's math type, for example "TENSOR_OP_MATH"; "FMA_MATH" is true float32.
        deterministic: whether cuDNN promises the same bits at each run.
        workspace_bytes: scratch memory that it takes, in bytes.
        time_ms: measured time of one run of many back to back in milliseconds, or None.
        device_ms: the device's share of it, the mean of a run that finds nothing of its tensors in
            the device's cache and one that follows it; measured up to 1 ms, where the host or the
            cache may hide it, of those that are close to the best and of those that the host may
            have slowed, else None.
        skipped: whether the budget was spent before its turn to be timed.
        rejected: why it cannot run at all, or None.
        out_of_memory: whether the reason is memory that could not be had.
        bias: how the bias is added: "fused" by the same engine, "add" by PyTorch afterwards, or
            the engine of a second cuDNN graph, such as "eng1_k24=4"; None without a bias.
    """

    provider: str
    algorithm: str
    math_type: str
    deterministic: bool
    workspace_bytes: int
    time_ms: float | None = None
    device_ms: float | None = None
    skipped: bool = False
    rejected: str | None = None
    out_of_memory: bool = False
    bias: str | None = None

    @property
    def name(self) -> str:
        """The name that the flag ``algorithm`` takes."""
        return f"{self.provider}:{self.algorithm}"

    @property
    def may_pass(self) -> bool:
        """Whether it is rejected for what may be otherwise at another moment."""
        return self.out_of_memory or (self.rejected or "").startswith((THIS_TIME, NOT_ASKED))

    @property
    def engine(self) -> tuple[str, str, str]:
        """What convolves, whatever is done about the bias."""
        return self.provider, self.algorithm, self.math_type

    def __str__(self) -> str:
        bias = {None: "", FUSED: " with bias", ADD: " + PyTorch's bias"}.get(
            self.bias, f" + bias {self.bias}"
        )
        return f"{self.name} ({self.math_type}){bias}"


def _percent_slower(time_ms: float, than_ms: float) -> str:
    percent = (time_ms / than_ms - 1) * 100
    if percent < 0:
        return f"{-percent:.1f} % faster"
    if percent < 1000:
        return f"{percent:.1f} % slower"
    return f"{percent / 100 + 1:.0f} times slower"


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen candidate of a problem and all the others.

    Attributes:
        problem: what is computed.
        candidates: all candidates in cuDNN's order.
        chosen: the index of the one that runs.
        objections: why each candidate may not run under the flags in force, or None.
        source: "forced" by a flag, "heuristic" (cuDNN's order), "measured" in this process, or
            "stored" by an earlier one.
        policy: the flags in force, with PyTorch's switches read; None where it is not known.
        behind: why each candidate that may run stands behind the chosen one, where its time does
            not say it, or None.
        captured: the index of the one that a CUDA graph gets instead after ``dgrad.warm_up``, as it
            is faster on the device; None where that is the chosen one.
    """

    problem: Problem
    candidates: tuple[Candidate, ...]
    chosen: int
    objections: tuple[str | None, ...]
    source: str
    policy: Policy | None = None
    behind: tuple[str | None, ...] = ()
    captured: int | None = None

    @property
    def candidate(self) -> Candidate:
        """The candidate that runs."""
        return self.candidates[self.chosen]

    def verdicts(self) -> list[str]:
        """For each candidate why it was chosen or not, in words."""
        return [self._verdict(index) for index in range(len(self.candidates))]

    def _verdict(self, index: int) -> str:
        candidate, objection = self.candidates[index], self.objections[index]
        if index == self.chosen:
            return "chosen" if objection is None else f"chosen; rejected since: {objection}"
        slower = self._slower(candidate)
        if objection is not None:
            return f"rejected: {objection}" + (f" ({slower})" if slower else "")
        if slower:
            in_graphs = "; CUDA graphs get it" if index == self.captured else ""
            return slower + self._although_faster(index) + in_graphs
        return self._behind(index) or "not chosen"

    def _behind(self, index: int) -> str | None:
        return self.behind[index] if self.behind else None

    def _although_faster(self, index: int) -> str:
        """Why a candidate that may run and is faster was not chosen."""
        why = self._behind(index)
        faster = (self._ratio(self.candidates[index]) or 1.0) < 1.0
        return f", {why}" if faster and why else ""

    def _slower(self, candidate: Candidate) -> str | None:
        """How the candidate's time compares with the chosen one's, where both are known."""
        if candidate.time_ms is None or self.candidate.time_ms is None:
            return None
        slower = _percent_slower(candidate.time_ms, self.candidate.time_ms)
        if candidate.device_ms is None or self.candidate.device_ms is None:
            return slower
        on_device = _percent_slower(candidate.device_ms, self.candidate.device_ms)
        return f"{on_device} on the device, {slower} with the host's share"

    def _runner_up(self) -> str:
        others = {
            index: candidate
            for index, candidate in enumerate(self.candidates)
            if index != self.chosen
            and self.objections[index] is None
            and candidate.time_ms is not None
        }
        if not others or self.candidate.time_ms is None:
            return ""
        times = {i: c.time_ms or 0.0 for i, c in others.items()}
        close = [i for i, time_ms in times.items() if time_ms <= CLOSE * self.candidate.time_ms]
        on_device = {i: d for i in close if (d := others[i].device_ms) is not None}
        if self.candidate.device_ms is not None and on_device:  # these decide
            times = on_device
        index = min(times, key=times.__getitem__)
        second = others[index]
        return f", next {second} {self._slower(second)}{self._although_faster(index)}"

    def _over_limit(self) -> str:
        """What a larger workspace_limit would bring, where that was measured."""
        by_order = self.policy is not None and self.policy.selection == "heuristic"
        if by_order or self.source == "forced":  # times do not decide
            return ""
        ratios = {
            candidate: ratio
            for candidate, objection in zip(self.candidates, self.objections, strict=True)
            if objection is not None
            and candidate.rejected is None
            and "workspace_limit" in objection
            and (candidate.time_ms or math.inf) <= CLOSE * (self.candidate.time_ms or 0.0)
            and (ratio := self._ratio(candidate)) is not None
        }
        best = min(ratios, key=ratios.__getitem__, default=None)
        if best is None or ratios[best] > _FASTER:
            return ""
        size = format_bytes(best.workspace_bytes)
        return f"; with {size} of workspace {best} would be {_percent_slower(ratios[best], 1.0)}"

    def _in_graphs(self) -> str:
        if self.captured is None:
            return ""
        candidate = self.candidates[self.captured]
        return f"; CUDA graphs get {candidate}, {self._slower(candidate)}"

    def _ratio(self, candidate: Candidate) -> float | None:
        """The candidate's time over the chosen one's: on the device where both were timed there."""
        chosen = self.candidate
        if candidate.device_ms is not None and chosen.device_ms is not None:
            return candidate.device_ms / chosen.device_ms
        if candidate.time_ms is not None and chosen.time_ms is not None:
            return candidate.time_ms / chosen.time_ms
        return None

    def __str__(self) -> str:
        chosen = self.candidate
        kind = "deterministic" if chosen.deterministic else "not deterministic"
        time = "" if chosen.time_ms is None else f"{format_ms(chosen.time_ms)}{self._runner_up()}, "
        return (
            f"{chosen} for {self.problem}: {time}workspace "
            f"{format_bytes(chosen.workspace_bytes)}, {kind}, source {self.source} "
            f"({self.chosen + 1} of {len(self.candidates)} in cuDNN's order){self._over_limit()}"
            f"{self._in_graphs()}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The selection as plain data; ``dgrad/selection.schema.json`` describes it."""
        return {
            "problem": problem_dict(self.problem),
            "candidates": [
                asdict(candidate) | {"workspace_bytes": self._workspace(index), "verdict": verdict}
                for index, (candidate, verdict) in enumerate(
                    zip(self.candidates, self.verdicts(), strict=True)
                )
            ],
            "chosen": self.chosen,
            "captured": self.captured,
            "source": self.source,
        }

    def table(self) -> list[tuple[str, ...]]:
        """Rows of text, the header first: one row for each candidate."""
        header = (
            "candidate",
            "layout",
            "workspace",
            "time",
            "device",
            "deterministic",
            "verdict",
        )
        rows = [
            (
                str(candidate),
                self.problem.layout,
                "not known" if (size := self._workspace(index)) is None else format_bytes(size),
                "" if candidate.time_ms is None else format_ms(candidate.time_ms),
                "" if candidate.device_ms is None else format_ms(candidate.device_ms),
                "yes" if candidate.deterministic else "no",
                verdict,
            )
            for index, (candidate, verdict) in enumerate(
                zip(self.candidates, self.verdicts(), strict=True)
            )
        ]
        return [header, *rows]

    def _workspace(self, index: int) -> int | None:
        """In bytes; of an engine that nothing was built of it is not known."""
        candidate = self.candidates[index]
        built = index == self.chosen or candidate.time_ms is not None
        known = built or candidate.workspace_bytes > 0 or candidate.provider == "legacy"
        return candidate.workspace_bytes if known else None


def reasons_table(candidates: list[tuple[Candidate, str]]) -> str:
    """One line a candidate with the reason against it, aligned."""
    if not candidates:
        return "  (cuDNN offers none)"
    width = max(len(str(candidate)) for candidate, _ in candidates)
    return "\n".join(f"  {candidate!s:<{width}}  {reason}" for candidate, reason in candidates)
