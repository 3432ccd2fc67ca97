"""A model with dgrad's layers is exported to ONNX as with PyTorch's: it runs anywhere."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

import dgrad
from operands import on_each_device

onnx = pytest.importorskip("onnx", reason="needs onnx, of the extra 'test'")
pytest.importorskip("onnxscript", reason="needs onnxscript, of the extra 'test'")

RELEASE = tuple(int(number) for number in torch.__version__.split(".")[:2])
with_each_exporter = pytest.mark.parametrize(
    "dynamo",
    [
        pytest.param(False, id="by tracing"),
        pytest.param(
            True,
            id="by torch.export",
            marks=pytest.mark.skipif(
                RELEASE < (2, 6), reason="this PyTorch cannot export its own layer so"
            ),
        ),
    ],
)


class Upsampler(nn.Module):
    """Each kind of argument in some layer, one of them called with an output size."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(4, 8, (4, 2), stride=2, padding=(1, 0)),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 8, 3, dilation=(1, 2), groups=groups, bias=False),
        )
        self.last = nn.ConvTranspose2d(8, 3, 3, stride=(3, 2), padding=1, output_padding=(2, 1))
        self.sized = nn.ConvTranspose2d(3, 2, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.layers(x))
        y: Tensor = self.sized(x, output_size=[2 * x.shape[2] + 2, 2 * x.shape[3] + 1])
        return y


def models(device: str, groups: int = 1) -> tuple[nn.Module, nn.Module, Tensor]:
    """A model, the same with dgrad's layers, and an input."""
    torch.manual_seed(0)
    plain = Upsampler(groups).eval().to(device)
    converted = copy.deepcopy(plain)
    assert len(dgrad.convert(converted)) == 4
    return plain, converted, torch.randn(2, 4, 3, 5, device=device)


def exported(model: nn.Module, x: Tensor, dynamo: bool, any_size: bool = False) -> Any:
    """The checked model; with `any_size` for other batches, heights and widths too."""
    sizes = {0: "n", 2: "h", 3: "w"}
    named: dict[str, Any] = {"dynamo": dynamo} if RELEASE > (2, 4) else {}
    if any_size and dynamo:
        named["dynamic_shapes"] = ({d: torch.export.Dim(name) for d, name in sizes.items()},)
    elif any_size:
        named |= {"input_names": ["x"], "dynamic_axes": {"x": sizes}}
    with warnings.catch_warnings():
        # PyTorch's own: of this exporter, of what it uses, and of output sizes that become fixed.
        for kind in (DeprecationWarning, FutureWarning, torch.jit.TracerWarning):
            warnings.simplefilter("ignore", kind)
        if dynamo:
            proto = torch.onnx.export(model, (x,), verbose=False, **named).model_proto
        else:
            file = io.BytesIO()
            torch.onnx.export(model, (x,), file, **named)
            proto = onnx.load_from_string(file.getvalue())
    onnx.checker.check_model(proto, full_check=True)
    return proto


def nodes(proto: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """The domain, the type and the attributes of all nodes."""
    value = onnx.helper.get_attribute_value
    return [
        (n.domain, n.op_type, {a.name: value(a) for a in n.attribute}) for n in proto.graph.node
    ]


@on_each_device
@with_each_exporter
def test_the_layers_become_onnxs_own_operator(dynamo: bool, device: str) -> None:
    plain, converted, x = models(device, groups=4)
    found, wanted = (exported(model, x, dynamo) for model in (converted, plain))
    assert {domain for domain, *_ in nodes(found)} == {""}
    assert [opset.domain for opset in found.opset_import] == [""]
    assert not found.functions
    names = [name for _, name, _ in nodes(found)]
    assert names.count("ConvTranspose") == 4
    assert nodes(found) == nodes(wanted)
    ours, theirs = (
        {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}
        for proto in (found, wanted)
    )
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in theirs)


@on_each_device
@with_each_exporter
@pytest.mark.parametrize(("runtime", "groups"), [("onnx.reference", 1), ("onnxruntime", 4)])
def test_an_exported_model_gives_the_models_values(
    runtime: str, groups: int, dynamo: bool, device: str
) -> None:
    run = pytest.importorskip(runtime)  # onnx.reference is wrong for groups
    plain, converted, x = models(device, groups)
    proto = exported(converted, x, dynamo)
    if runtime == "onnx.reference":
        session = run.ReferenceEvaluator(proto)
    else:
        session = run.InferenceSession(proto.SerializeToString())
    assert_right(session, proto, plain, x)


@on_each_device
@with_each_exporter
def test_an_exported_model_may_take_any_size(dynamo: bool, device: str) -> None:
    run = pytest.importorskip("onnx.reference")
    plain, converted, x = models(device)
    proto = exported(converted.layers, x, dynamo, any_size=True)
    for size in ((1, 4, 6, 2), (3, 4, 2, 4)):
        given = torch.randn(size, device=device)
        assert_right(run.ReferenceEvaluator(proto), proto, plain.layers, given)


def assert_right(session: Any, proto: Any, plain: nn.Module, x: Tensor) -> None:
    (values,) = session.run(None, {proto.graph.input[0].name: x.cpu().numpy()})
    with torch.no_grad():
        wanted = copy.deepcopy(plain).to("cpu", torch.float64)(x.to("cpu", torch.float64))
    torch.testing.assert_close(torch.from_numpy(values), wanted.float(), rtol=1e-4, atol=1e-5)
