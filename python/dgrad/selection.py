"""Candidates and selections: plain records of what can run a problem and what was chosen."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._core import Problem


def format_bytes(count: int) -> str:
    """A size as people read it: 0 B, 512 B, 1.5 MiB, 4.0 GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run a problem.

    Attributes:
        provider: where it comes from: "legacy".
        algorithm: the provider's name for it, for example "ALGO_1".
        math_type: cuDNN's math type, for example "TENSOR_OP_MATH"; "FMA_MATH" is true float32.
        deterministic: whether cuDNN promises the same bits at each run.
        workspace_bytes: scratch memory that it takes, in bytes.
        rejected: why it cannot run at all, or None.
        out_of_memory: whether the reason is memory that could not be had.
    """

    provider: str
    algorithm: str
    math_type: str
    deterministic: bool
    workspace_bytes: int
    rejected: str | None = None
    out_of_memory: bool = False

    @property
    def name(self) -> str:
        """The name that the flag ``algorithm`` takes."""
        return f"{self.provider}:{self.algorithm}"

    def __str__(self) -> str:
        return f"{self.name} ({self.math_type})"


@dataclass(frozen=True, slots=True)
class Selection:
    """The chosen candidate of a problem and all the others.

    Attributes:
        problem: what is computed.
        chosen: the candidate that runs.
        candidates: all candidates in cuDNN's order, with those that turned out not to run.
        objections: why a candidate that could run may not, by the flags in force.
        source: "heuristic" or "forced".
    """

    problem: Problem
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    objections: tuple[str | None, ...]
    source: str

    def verdict(self, candidate: Candidate) -> str:
        """Why ``candidate`` was chosen or not, in words."""
        if candidate == self.chosen:
            return "chosen"
        objection = self.objections[self.candidates.index(candidate)]
        return f"rejected: {objection}" if objection else "later in cuDNN's order"

    def to_dict(self) -> dict[str, Any]:
        """The selection as plain data."""
        return {
            "problem": str(self.problem),
            "chosen": asdict(self.chosen),
            "candidates": [
                asdict(candidate) | {"verdict": self.verdict(candidate)}
                for candidate in self.candidates
            ],
            "source": self.source,
        }

    def __str__(self) -> str:
        chosen = self.chosen
        kind = "deterministic" if chosen.deterministic else "not deterministic"
        place = self.candidates.index(chosen) + 1
        return (
            f"{chosen} for {self.problem}: workspace {format_bytes(chosen.workspace_bytes)}, "
            f"{kind}, source {self.source} ({place} of {len(self.candidates)})"
        )


def reasons_table(candidates: list[tuple[Candidate, str]]) -> str:
    """One line a candidate with the reason against it, aligned."""
    if not candidates:
        return "  (cuDNN offers none)"
    width = max(len(str(candidate)) for candidate, _ in candidates)
    return "\n".join(f"  {candidate!s:<{width}}  {reason}" for candidate, reason in candidates)


def reproduction(problem: Problem, flags: dict[str, Any]) -> str:
    """Lines of Python that make the same call again when pasted."""
    kernel, stride, padding, dilation = (
        problem.w[2:],
        problem.stride,
        problem.padding,
        problem.dilation,
    )
    least = [
        (problem.y[i + 2] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (kernel[i] - 1) + 1
        for i in (0, 1)
    ]
    output_padding = tuple(problem.x[i + 2] - least[i] for i in (0, 1))
    layout = ", memory_format=torch.channels_last" if problem.layout == "nhwc" else ""
    options = f'dtype=torch.{problem.dtype}, device="cuda:{problem.device}"'
    settings = ", ".join(f"{name}={value!r}" for name, value in flags.items())
    lines = [
        "import torch, dgrad",
        f"x = torch.randn({tuple(problem.y)}, {options})",
        f"w = torch.randn({tuple(problem.w)}, {options})",
        f"x, w = (t.to(t.device{layout}).requires_grad_() for t in (x, w))",
        f"with dgrad.flags({settings}):",
        f"    y = dgrad.conv_transpose2d(x, w, None, {tuple(stride)}, {tuple(padding)}, "
        f"{output_padding}, {problem.groups}, {tuple(dilation)})",
    ]
    if problem.direction != "dgrad":
        lines.append("    y.sum().backward()")
    return "\n".join(lines)
