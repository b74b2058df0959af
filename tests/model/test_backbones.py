from __future__ import annotations

import pytest
import timm
import torch
from refinedet.model import RefineDet, RefineDetConfig
from refinedet.model.cost import count_cost

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
