"""Are two outputs of a model equal, by KernelBench's rule?"""

from __future__ import annotations

import cmath
import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

_HALF = (torch.float16, torch.bfloat16)
# Relative to the gradient's norm, and to the largest of all.
_GRADIENT_LIMITS = {torch.float64: (1e-6, 1e-9), torch.float32: (0.02, 1e-3)}
# Elements looked at together: the temporaries of a 2 GiB output then stay below 0.5 GiB.
_PIECE = 1 << 24


@dataclass(slots=True)
class Verdict:
    """`max_abs_diff` is None where nothing could be subtracted, inf where only one side is NaN.

    `dtype` and `tolerance` (atol = rtol) are those of the first tensor; `differences` says in
    words where and how the outputs differ.
    """

    max_abs_diff: float | None = None
    dtype: str | None = None
    tolerance: float | None = None
    differences: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        return not self.differences


def tolerance(dtype: torch.dtype) -> float:
    """KernelBench's atol = rtol: 1e-2 for half types, else 1e-4."""
    return 1e-2 if dtype in _HALF else 1e-4


def gradient_differences(
    reference: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]
) -> list[str]:
    """Where gradients of the same names differ, in words: each by its relative norm.

    The limits leave room for float32 that may be tf32, and for what layers before and behind make
    of it. Some gradients are zero but for rounding, such as a bias's in front of a normalization:
    what is small against the largest norm may differ.
    """
    found = [
        f"gradient of {name}: only one of the models has one"
        for name in sorted(reference.keys() ^ other.keys())
    ]
    norms = {name: _norm(gradient) for name, gradient in reference.items()}
    largest = max(norms.values(), default=0.0)
    if reference and not 0 < largest < math.inf:
        return [
            *found,
            f"gradients: their largest norm is {largest} with PyTorch: nothing to compare",
        ]
    for name in sorted(reference.keys() & other.keys()):
        relative, of_largest = _GRADIENT_LIMITS.get(reference[name].dtype, (0.1, 0.01))
        error = _norm(_wide(other[name]) - _wide(reference[name]))
        if not error <= relative * norms[name] + of_largest * largest:
            apart = error / (norms[name] or largest)
            found.append(f"gradient of {name}: {apart:.2g} apart (relative norm, limit {relative})")
    return found


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return dense.to(torch.promote_types(tensor.dtype, torch.float32))


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(_wide(tensor)))


def judge(reference: object, other: object) -> Verdict:
    """Compare tensors, numbers, and nests of them in tuples, lists, dicts and dataclasses.

    Dense tensors are equal where shape and dtype are the same and
    torch.allclose(reference, other, rtol, atol, equal_nan=True) holds.
    Raises TypeError for any other kind of output.
    """
    verdict = Verdict()
    _judge(reference, other, "output", verdict)
    return verdict


def _judge(a: object, b: object, where: str, verdict: Verdict) -> None:
    limit = tolerance(torch.float32)
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        for tensor in (a, b):
            _expect_dense(tensor, where)
        _judge_tensors(a, b, where, verdict)
    elif type(a) is not type(b):
        verdict.differences.append(
            f"{where}: {type(a).__name__} from PyTorch, {type(b).__name__} from dgrad"
        )
    elif a is None or isinstance(a, (bool, int, float, complex, str, bytes)):
        both_nan = a != a and b != b
        close = type(a) in (float, complex) and cmath.isclose(a, b, rel_tol=limit, abs_tol=limit)  # type: ignore[arg-type]
        if a != b and not both_nan and not close:
            verdict.differences.append(f"{where}: {a!r} from PyTorch, {b!r} from dgrad")
    else:
        parts, others = _parts(a), _parts(b)
        if parts is None or others is None:
            raise _unsupported(where, type(a).__name__)
        if parts.keys() != others.keys():
            verdict.differences.append(
                f"{where}: {list(parts)} from PyTorch, {list(others)} from dgrad"
            )
            return
        for name, part in parts.items():
            _judge(part, others[name], f"{where}{name}", verdict)


def tensors(value: object) -> Iterator[torch.Tensor]:
    """The tensors of a nest of tuples, lists, dicts and dataclasses, whatever else it holds."""
    if isinstance(value, torch.Tensor):
        yield value
    else:
        for part in (_parts(value) or {}).values():
            yield from tensors(part)


def _parts(value: object) -> dict[str, object] | None:
    """What a container holds, each under the text that indexes it; None for anything else."""
    if isinstance(value, Mapping):
        return {f"[{key!r}]": part for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return {f"[{i}]": part for i, part in enumerate(value)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f".{f.name}": getattr(value, f.name) for f in dataclasses.fields(value)}
    return None


def _unsupported(where: str, kind: str) -> TypeError:
    return TypeError(
        f"{where} is a {kind}: expected a dense tensor, a number, "
        "or tuples, lists, dicts or dataclasses of them"
    )


def _expect_dense(tensor: torch.Tensor, where: str) -> None:
    if tensor.is_nested or tensor.is_quantized:
        raise _unsupported(where, f"{'nested' if tensor.is_nested else 'quantized'} tensor")
    if tensor.layout != torch.strided:
        raise _unsupported(where, f"tensor of layout {tensor.layout}")


def _judge_tensors(a: torch.Tensor, b: torch.Tensor, where: str, verdict: Verdict) -> None:
    if verdict.dtype is None:
        verdict.dtype = str(a.dtype).removeprefix("torch.")
        verdict.tolerance = tolerance(a.dtype)
    if a.shape != b.shape:
        verdict.differences.append(
            f"{where}: shape {tuple(a.shape)} from PyTorch, {tuple(b.shape)} from dgrad"
        )
        return
    if a.dtype != b.dtype:
        verdict.differences.append(f"{where}: {a.dtype} from PyTorch, {b.dtype} from dgrad")
        return
    limit = tolerance(a.dtype)
    close, largest = True, 0.0
    for x, y in _pieces(a.detach(), b.detach()):
        close &= torch.allclose(x, y, rtol=limit, atol=limit, equal_nan=True)
        largest = max(largest, _max_abs_diff(x, y))
    verdict.max_abs_diff = max(largest, verdict.max_abs_diff or 0.0)
    if not close:
        verdict.differences.append(
            f"{where}: largest absolute difference {largest:.3g}, not within "
            f"atol = rtol = {limit:g}"
        )


def _pieces(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Views of both, of at most _PIECE elements each, whatever the strides."""
    if a.numel() <= _PIECE:
        yield a, b
        return
    if a.shape[0] == 1:
        yield from _pieces(a[0], b[0])
        return
    rows = max(1, _PIECE * a.shape[0] // a.numel())
    for begin in range(0, a.shape[0], rows):
        yield from _pieces(a[begin : begin + rows], b[begin : begin + rows])


def _max_abs_diff(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.numel() == 0:
        return 0.0
    if not a.is_complex():
        # float32 holds the difference of two half values; integers need the wider type
        wide = torch.float32 if a.dtype in (*_HALF, torch.float32) else torch.float64
        a, b = a.to(wide), b.to(wide)
    difference = (a - b).abs()
    # inf - inf and NaN - NaN are NaN where both sides say the same
    difference[(a == b) | (a.isnan() & b.isnan())] = 0.0
    return float(difference.nan_to_num(nan=math.inf, posinf=math.inf).max())
