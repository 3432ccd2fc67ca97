"""The files of tests/kernelbench hold the sizes of KernelBench level 1, generation 2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

_FOLDER = Path(__file__).resolve().parent / "kernelbench"

# problem: (input, weight, stride, padding, dilation, groups, output); the outputs by
# H_out = (H - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1, worked out by hand
_EXPECTED = {
    57: ((8, 64, 1024, 1024), (64, 64, 3, 3), (1, 1), (0, 0), (1, 1), 1, (8, 64, 1026, 1026)),
    65: ((8, 64, 512, 512), (64, 64, 3, 7), (1, 1), (0, 0), (1, 1), 1, (8, 64, 514, 518)),
    69: ((64, 64, 128, 256), (64, 128, 3, 5), (1, 1), (0, 0), (1, 1), 1, (64, 128, 130, 260)),
    71: ((8, 32, 512, 1024), (32, 32, 3, 3), (1, 1), (0, 0), (1, 1), 1, (8, 32, 514, 1026)),
    75: ((16, 32, 128, 256), (32, 16, 3, 5), (2, 3), (1, 2), (2, 1), 4, (16, 64, 257, 766)),
    78: ((8, 32, 512, 1024), (32, 32, 3, 7), (1, 1), (1, 3), (1, 1), 1, (8, 32, 512, 1024)),
    81: ((16, 32, 64, 128), (32, 64, 3, 3), (5, 5), (1, 1), (2, 2), 1, (16, 64, 318, 638)),
}


def _load(problem: int) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"kb{problem}", _FOLDER / f"kb{problem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_one_file_for_each_problem() -> None:
    assert {path.name for path in _FOLDER.glob("*.py")} == {f"kb{n}.py" for n in _EXPECTED}


@pytest.mark.parametrize("problem", _EXPECTED)
def test_a_file_has_the_sizes_of_its_problem(problem: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, ...]] = []

    def rand(*size: int) -> torch.Tensor:
        drawn.append(size)
        return torch.empty(size, device="meta")

    module = _load(problem)
    x_size, w_size, stride, padding, dilation, groups, y_size = _EXPECTED[problem]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", rand)
        inputs = module.get_inputs()
    with torch.device("meta"):
        model = module.Model(*module.get_init_inputs())
    (layer,) = (m for m in model.modules() if isinstance(m, torch.nn.ConvTranspose2d))

    assert drawn == [x_size]
    assert tuple(layer.weight.shape) == w_size
    assert (layer.stride, layer.padding, layer.dilation) == (stride, padding, dilation)
    assert (layer.groups, layer.output_padding, layer.bias) == (groups, (0, 0), None)
    assert tuple(model(*inputs).shape) == y_size
