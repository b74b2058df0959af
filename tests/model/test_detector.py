from __future__ import annotations

import pytest
import torch
from refinedet.model import RefineDetConfig, detection_loss
from refinedet.model.layers import L2Norm

from tests.model.cases import random_images, random_targets

# Table II, columns 1 to 5, and the other predictors and knobs.
VARIANTS = {
    "whole": {},
    "no AlignConv": {"head": "vanilla"},
    "no filtering": {"head": "vanilla", "theta": 1.0},
    "no cascade": {"head": "vanilla", "theta": 1.0, "cascade": False},
    "no TCB": {"head": "vanilla", "theta": 1.0, "cascade": False, "tcb": False},
    "deformable": {"head": "deform"},
    "kernel 5": {"kernel_size": 5},
    "kernel 7, plain": {"kernel_size": 7, "head": "vanilla"},
    "filtered in training": {"filter_negatives": "training"},
    "AlignConv on tiled anchors": {"cascade": False},
    "prediction blocks": {"prediction_block": True},
    "five levels": {"num_levels": 5, "input_size": 128},
    "Caffe's input": {"normalization": "caffe"},
    "frozen norms": {"norm": "frozen"},
}


QUICK = ("whole", "no filtering", "no TCB", "deformable", "filtered in training", "frozen norms")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in VARIANTS]
)
def test_every_variant_learns_and_detects(build, name):
    model = build(**VARIANTS[name])
    generator = torch.Generator().manual_seed(0)
    size = model.config.input_size
    images, targets = random_images(generator, 2, size), [random_targets(generator, 3, size) for _ in range(2)]
    rate = (
        0.001 if model.config.norm == "frozen" or model.config.prediction_block else 0.01
    )  # a fresh backbone has no statistics worth freezing
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate, momentum=0.9)
    totals = []
    for _ in range(6):
        losses = detection_loss(model(images, targets), targets, model.config)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        totals.append(losses.total.item())
    assert all(value == value and value < 1e4 for value in totals)
    assert totals[-1] < totals[0]
    for found in model.eval().detect(images):
        assert found.boxes.isfinite().all()
        assert (found.scores.diff() <= 0).all()
        assert ((found.labels >= 1) & (found.labels <= 3)).all()


@pytest.mark.parametrize("head", ["align", "deform", "vanilla"])
def test_every_head_learns_under_autocast(build, head):
    model = build(head=head)
    generator = torch.Generator().manual_seed(0)
    images, targets = random_images(generator, 2), [random_targets(generator, 3, 64) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        predictions = model(images, targets)
    detection_loss(predictions, targets, model.config).total.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.adm.parameters())
    assert model.adm.cls[0].weight.grad is not None


def test_batched_equals_single(build):
    model = build(theta=0.6).eval()
    images = random_images(torch.Generator().manual_seed(0), 3)
    with torch.no_grad():
        together = model(images, dense=True)
        for number in range(3):
            alone = model(images[number : number + 1], dense=True)
            assert torch.allclose(alone.refined[0], together.refined[number], atol=1e-3)
            count = together.refined.shape[1]
            rows = slice(number * count, (number + 1) * count)
            assert torch.allclose(alone.adm_class, together.adm_class[rows], atol=1e-4)
            assert torch.allclose(alone.adm_box, together.adm_box[rows], atol=1e-4)


def test_images_of_other_sizes_and_types(build):
    model = build().eval()
    images = torch.randint(0, 256, (1, 3, 64, 192), dtype=torch.uint8)
    with torch.no_grad():
        whole = model(images, dense=True)
        floating = model(images.float().contiguous(memory_format=torch.channels_last), dense=True)
    assert whole.anchors.shape == (3 * (8 * 24 + 4 * 12 + 2 * 6 + 1 * 3), 4)
    assert torch.allclose(whole.adm_class, floating.adm_class, atol=1e-4)
    with pytest.raises(ValueError, match="96x64"):
        model(torch.zeros(1, 3, 96, 64))


def test_one_image_of_one_cell_at_the_coarsest_level_trains(build):
    model = build(input_size=64)
    generator = torch.Generator().manual_seed(0)
    targets = [random_targets(generator, 2)]
    losses = detection_loss(model(random_images(generator, 1), targets), targets, model.config)
    losses.total.backward()
    assert losses.total.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_about_the_same_loss_in_fp32(build, dtype):
    model = build()
    generator = torch.Generator().manual_seed(0)
    images, targets = random_images(generator, 2), [random_targets(generator, 3) for _ in range(2)]
    full = detection_loss(model(images, targets), targets, model.config)
    with torch.autocast("cpu", dtype):
        predictions = model(images, targets)
        losses = detection_loss(predictions, targets, model.config)
    assert predictions.adm_class.dtype == predictions.refined.dtype == losses.total.dtype == torch.float32
    assert losses.total.item() == pytest.approx(full.total.item(), rel=0.1)
    losses.total.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_the_dense_path_compiles_whole(build):
    model = build(head="vanilla").eval()
    images = random_images(torch.Generator().manual_seed(0), 2)
    model.anchors(images)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(images, dense=True).adm_class, model(images, dense=True).adm_class)


def test_channels_last_changes_nothing(build):
    images = random_images(torch.Generator().manual_seed(0), 2)
    model = build().eval()
    with torch.no_grad():
        before = model(images, dense=True).adm_class
        model.to(memory_format=torch.channels_last)
        after = model(images.contiguous(memory_format=torch.channels_last), dense=True).adm_class
    assert torch.allclose(before, after, atol=1e-4)


def test_training_after_inference_mode(build):
    model = build()
    generator = torch.Generator().manual_seed(0)
    images, targets = random_images(generator, 2), [random_targets(generator, 3) for _ in range(2)]
    with torch.inference_mode():
        model.eval().detect(images)
    model.train()
    detection_loss(model(images, targets), targets, model.config).total.backward()


def test_l2_norm_scales_every_cell():
    x = torch.randn(2, 8, 3, 3)
    y = L2Norm(8, 10.0)(x)
    assert torch.allclose(y.square().sum(1).sqrt(), torch.full((2, 3, 3), 10.0), atol=1e-4)
    assert L2Norm(8, 10.0)(torch.zeros(1, 8, 2, 2)).abs().sum() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 100}, "input_size must be a multiple of 64 with 4 levels, received 100"),
        ({"theta": 0.0}, r"theta must lie in \(0, 1\], received 0.0"),
        ({"num_classes": 0}, "num_classes must be at least 1, received 0"),
        ({"tcb": False}, "tcb: false removes the ARM"),
        ({"arm_iou": (0.7, 0.3)}, r"arm_iou must be .* received \(0.7, 0.3\)"),
        ({"num_levels": 3}, "num_levels must be 4 or 5, received 3"),
        ({"kernel_size": 4}, "kernel_size must be 3, 5 or 7, received 4"),
        ({"normalization": "cafe"}, "normalization must be 'backbone' or 'caffe', received 'cafe'"),
        ({"head": "aligned"}, "head must be 'align', 'deform' or 'vanilla', received 'aligned'"),
        ({"norm": "none"}, "norm must be 'batch', 'frozen' or 'sync', received 'none'"),
        ({"filter_negatives": True}, "filter_negatives must be 'always' or 'training', received True"),
        ({"pre_nms_scope": "anchor"}, "pre_nms_scope must be 'image' or 'class', received 'anchor'"),
        ({"loss_normalization": None}, "loss_normalization must be 'per_module' or 'arm', received None"),
    ],
)
def test_impossible_configs_are_refused_with_a_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        RefineDetConfig(**options)
