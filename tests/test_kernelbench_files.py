"""The files of tests/kernelbench hold the sizes of KernelBench level 1, generation 2."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench_layers import KERNELBENCH

_FOLDER = Path(__file__).resolve().parent / "kernelbench"


def _load(problem: int) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"kb{problem}", _FOLDER / f"kb{problem}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_one_file_for_each_problem() -> None:
    assert {path.name for path in _FOLDER.glob("*.py")} == {f"kb{n}.py" for n in KERNELBENCH}


@pytest.mark.parametrize("problem", KERNELBENCH)
def test_a_file_has_the_sizes_of_its_problem(problem: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[int, ...]] = []

    def rand(*size: int) -> torch.Tensor:
        drawn.append(size)
        return torch.empty(size, device="meta")

    module = _load(problem)
    x_size, w_size, stride, padding, dilation, groups, y_size = KERNELBENCH[problem]

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
