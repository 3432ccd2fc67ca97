"""Models of torchvision and timm, where those are installed, train the same with dgrad's layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dgrad

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.seconds(5)])]

# of a name and a device: a model of random weights, and its loss
Made = tuple[nn.Module, Callable[[nn.Module], Tensor]]


def of_torchvision(name: str, device: str) -> Made:
    """A detector. Its head is given the true boxes too, so there is always something to learn."""
    detection = pytest.importorskip("torchvision.models.detection", reason="needs torchvision")
    model = getattr(detection, name)(
        weights=None,
        weights_backbone=None,
        num_classes=2,
        min_size=64,
        max_size=64,
        rpn_post_nms_top_n_train=50,
        box_batch_size_per_image=8,
    )
    model.backbone.body.requires_grad_(False)
    exact = {"device": device, "dtype": torch.float64}
    images = [torch.rand(3, 64, 64, **exact) for _ in range(2)]
    boxes = torch.tensor([[4.0, 6.0, 50.0, 60.0], [20.0, 2.0, 63.0, 40.0]], **exact)
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8, device=device)
    masks[:, 10:30, 24:40] = 1
    spots = torch.rand(2, 17, 2, device=device) * 16 + 22
    target = {
        "boxes": boxes,
        "labels": torch.ones(2, dtype=torch.int64, device=device),
        "masks": masks,
        "keypoints": torch.cat([spots, torch.ones(2, 17, 1, device=device)], dim=2),
    }

    def loss(model: nn.Module) -> Tensor:
        torch.manual_seed(1)  # which regions are learnt from is drawn
        losses = model(images, [dict(target) for _ in images])
        assert losses.keys() & {"loss_mask", "loss_keypoint"}
        return torch.stack([*losses.values()]).sum()

    return model, loss


def of_timm(name: str, device: str) -> Made:
    timm = pytest.importorskip("timm", reason="needs timm")
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    model = timm.create_model(name, pretrained=False, num_classes=5)
    images = torch.rand(2, 3, 64, 64, device=device, dtype=torch.float64)
    return model, lambda model: model(images).square().sum()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("make", "name", "layers"),
    [
        (of_torchvision, "maskrcnn_resnet50_fpn", ["roi_heads.mask_predictor.conv5_mask"]),
        (
            of_torchvision,
            "keypointrcnn_resnet50_fpn",
            ["roi_heads.keypoint_predictor.kps_score_lowres"],
        ),
        (of_timm, "lowformer_b0", None),
    ],
)
def test_a_model_trains_as_with_pytorchs_layers(
    make: Callable[[str, str], Made], name: str, layers: list[str] | None, device: str
) -> None:
    torch.manual_seed(0)
    model, loss = make(name, device)
    plain = model.to(device, torch.float64).train()
    converted = copy.deepcopy(plain)
    here = [n for n, m in plain.named_modules() if type(m) is nn.ConvTranspose2d]
    done = dgrad.convert(converted)
    assert (done, done.left) == (here, {})
    assert done == layers if layers else done

    results: list[tuple[Tensor, dict[str, Any]]] = []
    for trained in (plain, converted):
        value = loss(trained)
        value.backward()
        results.append((value.detach(), {n: p.grad for n, p in trained.named_parameters()}))
    (wanted, wanted_gradients), (found, gradients) = results
    torch.testing.assert_close(found, wanted)
    for layer in done:
        assert gradients[f"{layer}.weight"].norm() > 0, layer
    # What is next to nothing, as of a bias before a norm, is only rounding.
    least = 1e-9 * max(float(g.norm()) for g in wanted_gradients.values() if g is not None)
    torch.testing.assert_close(gradients, wanted_gradients, rtol=1e-6, atol=least)
    assert dgrad.restore(converted) == done
