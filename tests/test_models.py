"""The models of tests/models have the published sizes, and train alike with dgrad's layers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import dgrad
from dgrad._layers import Layer
from dgrad.bench.suite import cases
from operands import on_each_device

_FOLDER = Path(__file__).resolve().parent / "models"

# model: (full inputs, output, the layers in the suite "layers")
_EXPECTED: dict[str, tuple[list[tuple[int, ...]], tuple[int, ...], str | None]] = {
    "centernet": (
        [(16, 64, 128, 128), (16, 128, 64, 64), (16, 256, 32, 32), (16, 512, 16, 16)],
        (16, 84, 128, 128),
        "centernet_dla34",
    ),
    "cyclegan": ([(1, 3, 256, 256)], (1, 3, 256, 256), "cyclegan_resnet9"),
    "dcgan": ([(64, 100, 1, 1)], (64, 3, 64, 64), "dcgan"),
    "fcn8s": (
        [(1, 256, 88, 88), (1, 512, 44, 44), (1, 21, 16, 16)],
        (1, 21, 500, 500),
        "fcn8s",
    ),
    "pose": ([(64, 768, 16, 12)], (64, 17, 64, 48), None),
    "unet": ([(1, 3, 640, 959)], (1, 2, 640, 959), "unet_carvana"),
    "unet_512": ([(8, 3, 512, 512)], (8, 2, 512, 512), None),
}
# of the models that the suite lacks
_LAYERS = {
    "pose": {
        Layer((64, 768, 16, 12), 256, (4, 4), stride=(2, 2), padding=(1, 1)),
        Layer((64, 256, 32, 24), 256, (4, 4), stride=(2, 2), padding=(1, 1)),
    },
    "unet_512": {
        Layer((8, 2 * c, size, size), c, (2, 2), stride=(2, 2), bias=True)
        for c, size in ((512, 32), (256, 64), (128, 128), (64, 256))
    },
}


@pytest.fixture(autouse=True)
def _beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(_FOLDER)  # as for a script that imports its neighbour


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, _FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _deconvolutions(model: torch.nn.Module) -> dict[str, torch.nn.ConvTranspose2d]:
    named = model.named_modules()
    return {name: m for name, m in named if type(m) is torch.nn.ConvTranspose2d}


def test_there_is_one_file_for_each_model() -> None:
    assert {path.stem for path in _FOLDER.glob("*.py")} == set(_EXPECTED)


@pytest.mark.parametrize("name", _EXPECTED)
def test_a_model_has_the_published_sizes(name: str) -> None:
    sizes, output_size, prefix = _EXPECTED[name]
    module = _load(name)
    with torch.device("meta"):
        model = module.Model(*module.get_init_inputs())
    inputs = [x.to("meta") for x in module.get_inputs()]  # 130 MB at most
    found = set()

    def note(m: Any, arguments: tuple[Tensor, ...]) -> None:
        options = (m.stride, m.padding, m.output_padding, m.dilation, m.groups, m.bias is not None)
        found.add(Layer(tuple(arguments[0].shape), m.out_channels, m.kernel_size, *options))

    for layer in _deconvolutions(model).values():
        layer.register_forward_pre_hook(note)
    output = model(*inputs)

    assert [tuple(x.shape) for x in inputs] == sizes
    assert tuple(output.shape) == output_size
    assert found == (
        {c.layer for c in cases("layers", only=f"^{prefix}/")} if prefix else _LAYERS[name]
    )


@on_each_device
@pytest.mark.parametrize("name", _EXPECTED)
def test_a_model_trains_alike_with_dgrads_layers(name: str, device: str) -> None:
    module = _load(name)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(module.Model(*module.get_init_inputs()).to(device, torch.float64))
    plain, converted = models
    layers = _deconvolutions(converted)
    before = {layer: m.weight.detach().clone() for layer, m in layers.items()}
    done = dgrad.convert(converted)
    assert done == list(layers)
    assert done.left == {}
    inputs = [x.to(device, torch.float64) for x in module.get_small_inputs()]

    outputs = []
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        outputs.append(model(*inputs))
        outputs[-1].square().mean().backward()
        optimizer.step()

    torch.testing.assert_close(outputs[1], outputs[0])
    torch.testing.assert_close(converted.state_dict(), plain.state_dict())
    plain_gradients, gradients = (
        {name: p.grad for name, p in model.named_parameters()} for model in models
    )
    torch.testing.assert_close(gradients, plain_gradients, rtol=1e-6, atol=1e-12)
    for layer, weight in before.items():
        assert not torch.equal(converted.get_submodule(layer).weight, weight), layer
