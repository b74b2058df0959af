from __future__ import annotations

import math

import pytest
import timm
import torch
from refinedet.model import RefineDet, RefineDetConfig
from refinedet.model.cost import count_cost
from refinedet.model.loss import detection_loss

from tests.model.cases import random_images, random_targets

BACKBONES = (
    "vgg16_reduced", "resnet18", "resnet50", "resnet101", "resnet152", "resnext101_32x4d", "resnext152_32x4d",
    "mobilenetv3_large_100", "ghostnet_100", "inception_v3", "inception_v4",
)  # fmt: skip


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_have_the_strides_of_the_anchors(name):
    levels = 5 if name in ("vgg16_reduced", "resnet50") else 4
    size = 2 * 8 * 2 ** (levels - 1)
    with torch.device("meta"):
        model = RefineDet(RefineDetConfig(backbone=name, num_levels=levels, input_size=size)).eval()
    model.adm.portable = True  # the meta device finds no rows, so that only known shapes will do
    predictions = model(torch.empty(2, 3, size, size, device="meta"), dense=True)
    maps = model.backbone(torch.empty(2, 3, size, size, device="meta"))
    sides = [size // stride for stride in model.config.strides]
    assert [tuple(one.shape) for one in maps] == [
        (2, channels, side, side) for channels, side in zip(model.backbone.channels, sides, strict=True)
    ]
    assert predictions.adm_class.shape == (2 * len(predictions.anchors), 81)


FAMILIES = (
    "resnet10t", "resnext26ts", "regnetx_002", "mobilenetv3_small_050", "ghostnet_050", "tf_efficientnet_lite0",
    "convnext_atto",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("map_norm", [None, "l2"])
def test_the_scale_of_a_backbone_does_not_reach_the_heads(build, name, map_norm):
    """Maps as large as some trained networks', channels alike or not, give the losses of maps of unit scale."""
    generator = torch.Generator().manual_seed(3)
    images = random_images(generator, 4)
    targets = [random_targets(generator, 3, num_classes=20) for _ in range(4)]
    model = build(backbone=name, num_classes=20, map_norm=map_norm)
    losses = []
    for scale in (1.0, 100.0):
        hook = model.backbone.body.register_forward_hook(lambda _, __, maps, s=scale: [s * y for y in maps])
        losses.append(detection_loss(model(images, targets), targets, model.config))
        hook.remove()
    assert losses[1].total.item() == pytest.approx(losses[0].total.item(), rel=0.05)


@pytest.mark.parametrize("name", ["vgg16_reduced", *FAMILIES])
def test_the_loss_begins_near_a_guess(build, name):
    """A positive and three negatives, each log(classes) to a guess; predictors of unit scale may double that."""
    generator = torch.Generator().manual_seed(3)
    targets = [random_targets(generator, 3, num_classes=80) for _ in range(4)]
    model = build(backbone=name, num_classes=80)
    losses = detection_loss(model(random_images(generator, 4), targets), targets, model.config)
    guess = (1 + model.config.negatives_per_positive) * (math.log(2) + math.log(81))
    assert losses.arm_class.item() + losses.adm_class.item() < 2 * guess
    assert losses.arm_box.item() + losses.adm_box.item() < 12


def test_the_norms_of_the_paper_and_of_the_others(build):
    vgg, other = build(backbone="vgg16_reduced"), build(backbone="tf_efficientnet_lite0")
    assert [type(norm).__name__ for norm in vgg.backbone.norms] == ["L2Norm", "L2Norm", "Identity", "Identity"]
    assert [norm.weight[0].item() for norm in vgg.backbone.norms[:2]] == [10, 8]
    assert [type(norm).__name__ for norm in other.backbone.norms] == ["BatchNorm"] * 4
    none = build(backbone="tf_efficientnet_lite0", map_norm="none")
    assert [type(norm).__name__ for norm in none.backbone.norms] == ["Identity"] * 4


def test_channels_of_the_paper():
    with torch.device("meta"):
        vgg = RefineDet(RefineDetConfig(backbone="vgg16_reduced"))
        resnet = RefineDet(RefineDetConfig(backbone="resnet101"))
    assert vgg.backbone.channels == [512, 512, 1024, 512]
    assert resnet.backbone.channels == [512, 1024, 2048, 512]


@pytest.mark.parametrize("name", ["resnet101x", "vit_base_patch16_224"])
def test_a_backbone_that_cannot_be_is_a_clear_error(name):
    with pytest.raises(ValueError, match=name):
        RefineDet(RefineDetConfig(backbone=name))


@pytest.mark.parametrize("backbone", ["resnet10t", "vgg16_reduced", "mobilenetv3_small_050"])
def test_checkpointing_changes_nothing_but_memory(build, backbone):
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    results = []
    for checkpointing in (False, True):
        model = build(backbone=backbone, activation_checkpointing=checkpointing)
        output = model(images, dense=True).adm_class
        output.square().mean().backward()
        gradient = next(model.backbone.parameters()).grad
        statistics = [b.clone() for n, b in model.named_buffers() if n.endswith(("running_mean", "running_var"))]
        results.append((output.detach(), gradient, statistics))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], rtol=1e-3, atol=1e-6)
    for plain, recomputed in zip(results[0][2], results[1][2], strict=True):
        assert torch.allclose(plain, recomputed, atol=1e-6)


def test_checkpointing_keeps_fewer_tensors_of_every_kind_of_body(build):
    for backbone in ("resnet10t", "vgg16_reduced", "mobilenetv3_small_050"):
        plain, recomputed = (
            count_cost(RefineDetConfig(backbone=backbone, input_size=320, activation_checkpointing=checkpointing))
            for checkpointing in (False, True)
        )
        assert recomputed.activation_bytes < plain.activation_bytes, backbone


def test_checkpointing_that_is_not_known_is_refused():
    RefineDet(RefineDetConfig(backbone="hrnet_w18_small"))
    with pytest.raises(ValueError, match="activation_checkpointing is not known for backbone 'hrnet_w18_small'"):
        RefineDet(RefineDetConfig(backbone="hrnet_w18_small", activation_checkpointing=True))


def test_maps_with_channels_last_are_turned(build):
    model = build(backbone="mambaout_femto").eval()
    maps = model.backbone(torch.zeros(1, 3, 64, 128))
    assert [tuple(y.shape) for y in maps[:3]] == [(1, 96, 8, 16), (1, 192, 4, 8), (1, 288, 2, 4)]
    images = torch.zeros(1, 3, 64, 64)
    body = timm.create_model("mambaout_femto", features_only=True).eval()
    body.load_state_dict(model.backbone.body.state_dict())
    assert torch.equal(model.backbone(images)[0], body(images)[1].movedim(3, 1))
