"""Equation 1 against nested loops, and the rules about who contributes to it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from refinedet.model import detection_loss, sum_losses
from refinedet.model.boxes import encode_boxes
from refinedet.model.loss import mine_negatives
from refinedet.model.matching import match_anchors

from tests.model.cases import HOSTILE, random_images, random_targets


def loop_mine(hardness, eligible, positives, ratio):
    order = sorted((a for a in range(len(eligible)) if eligible[a]), key=lambda a: (-hardness[a], a))
    return set(order[: min(int(ratio * positives), len(order))])


def loop_loss(p, targets, config):
    """The four parts, one anchor at a time, in double precision."""

    def entropy(logits, label):
        top = max(logits)
        return top + math.log(sum(math.exp(x - top) for x in logits)) - logits[label]

    def module(logits, deltas, reference, matches, survives):
        class_sum = box_sum = count = 0.0
        for image, target in enumerate(targets):
            labels = matches.labels[image].tolist()
            positives = [a for a, label in enumerate(labels) if label > 0]
            hardness = [entropy(row, 0) for row in logits[image]]
            eligible = [label == 0 and survives(image, a) for a, label in enumerate(labels)]
            for a in loop_mine(hardness, eligible, len(positives), config.negatives_per_positive):
                class_sum += hardness[a]
            for a in positives:
                class_sum += entropy(logits[image][a], labels[a])
                box = target.boxes[matches.boxes[image, a]]
                for wanted, got in zip(encode_boxes(box, reference[image][a]).tolist(), deltas[image][a], strict=True):
                    miss = abs(wanted - got)
                    box_sum += 0.5 * miss**2 if miss < 1 else miss - 0.5
            count += len(positives)
        return class_sum, box_sum, max(1, count)

    batch = len(targets)
    tiled = p.anchors.expand(batch, -1, -1)
    arm_class, arm_box, arm_count = module(
        p.arm_class.tolist(), p.arm_box.tolist(), tiled, match_anchors(p.anchors, targets, config.arm_iou, binary=True),
        lambda image, a: True,
    )  # fmt: skip
    foreground = p.arm_class.softmax(-1)[..., 1]
    survives = lambda image, a: config.theta == 1 or foreground[image, a].item() >= 1 - config.theta  # noqa: E731
    adm_class, adm_box, adm_count = module(
        p.adm_class.view(batch, -1, p.adm_class.shape[-1]).tolist(), p.adm_box.view(batch, -1, 4).tolist(),
        p.refined, match_anchors(p.refined, targets, config.adm_iou), survives,
    )  # fmt: skip
    if config.loss_normalization == "arm":
        adm_count = arm_count
    return [arm_class / arm_count, arm_box / arm_count, adm_class / adm_count, adm_box / adm_count]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    targets = [random_targets(generator, count) for count in (2, 0, 5)]
    return random_images(generator, 3), targets


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"theta": 0.6},
        {"theta": 1.0, "head": "vanilla"},
        {"arm_iou": (0.3, 0.7), "adm_iou": (0.4, 0.6), "theta": 0.8},
        {"loss_normalization": "arm", "negatives_per_positive": 2.5},
        {"cascade": False},
    ],
)
def test_loss_is_that_of_the_loop(build, batch, options):
    model = build(**options)
    images, targets = batch
    with torch.no_grad():
        predictions = model(images, targets)
        dense = model.eval()(images, dense=True)
        sparse = model(images, targets)
    ours = detection_loss(sparse, targets, model.config)
    expected = loop_loss(dense, targets, model.config)
    assert [part.item() for part in ours.parts().values()] == pytest.approx(expected, rel=1e-4)
    assert ours.total.item() == pytest.approx(sum(expected), rel=1e-4)
    every = detection_loss(dense, targets, model.config)
    assert every.total.item() == pytest.approx(sum(expected), rel=1e-4)
    assert detection_loss(predictions, targets, model.config).total.isfinite()


@pytest.mark.parametrize("seed", range(3))
def test_mining_is_that_of_the_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    hardness = torch.randint(0, 6, (4, 40), generator=generator).float()  # many equals
    eligible = torch.rand(4, 40, generator=generator) < 0.5
    positives = torch.tensor([0, 1, 5, 40])
    ours = mine_negatives(hardness, eligible, positives, 3.0)
    for image in range(4):
        expected = loop_mine(hardness[image].tolist(), eligible[image].tolist(), positives[image].item(), 3.0)
        assert set(ours[image].nonzero().squeeze(1).tolist()) == expected


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("theta", [0.99, 0.5001, 1.0])
def test_hostile_targets_give_finite_losses_and_gradients(build, name, theta):
    model = build(theta=theta)
    images = random_images(torch.Generator().manual_seed(1), 2)
    targets = [HOSTILE[name], HOSTILE["none"]]
    losses = detection_loss(model(images, targets), targets, model.config)
    assert losses.total.isfinite()
    losses.total.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


def test_images_without_objects_give_zero_loss_and_zero_gradients(build):
    model = build()
    targets = [HOSTILE["none"], HOSTILE["none"]]
    losses = detection_loss(model(random_images(torch.Generator().manual_seed(1), 2), targets), targets, model.config)
    assert losses.total.item() == 0
    losses.total.backward()
    assert all(parameter.grad.abs().sum() == 0 for parameter in model.parameters())


def test_an_image_without_objects_changes_nothing(build, batch):
    model = build().eval()
    images, targets = batch
    both = detection_loss(model(images, targets), targets, model.config)
    kept = [0, 2]
    alone = detection_loss(model(images[kept], [targets[i] for i in kept]), [targets[i] for i in kept], model.config)
    for name, part in both.parts().items():
        assert part.item() == pytest.approx(alone.parts()[name].item(), rel=1e-4)


def test_every_anchor_positive(build, batch):
    model = build(arm_iou=(0.0, 0.0), adm_iou=(0.0, 0.0)).eval()
    images, targets = batch
    predictions = model(images, targets)
    assert (predictions.matches.labels[0] > 0).all()
    losses = detection_loss(predictions, targets, model.config)
    assert losses.total.isfinite()
    assert losses.total.item() == pytest.approx(
        sum(loop_loss(model(images, dense=True), targets, model.config)), rel=1e-4
    )


def test_negative_filtering_never_drops_a_positive(build, batch):
    """The ports' fault: they drop positives that the ARM calls background, and keep mining easy negatives."""
    model = build(theta=0.99).eval()
    images, targets = batch
    with torch.no_grad():
        for cls in model.arm.cls:
            cls.bias.view(3, 2)[:, 0] += 50.0  # every anchor surely background: nothing survives
    predictions = model(images, targets)
    positive = (predictions.matches.labels > 0).flatten().nonzero().squeeze(1)
    assert len(positive) > 0
    assert torch.equal(predictions.index.sort().values, positive)
    losses = detection_loss(predictions, targets, model.config)
    # The ADM has positives alone: its class loss is their cross entropy, with no negative beside them.
    labels = predictions.matches.labels.flatten()[predictions.index]
    expected = torch.nn.functional.cross_entropy(predictions.adm_class, labels)
    assert losses.adm_class.item() == pytest.approx(expected.item(), rel=1e-5)
    assert losses.adm_box > 0
    assert all(len(found.scores) == 0 for found in model.detect(images))


def test_filtered_negatives_are_not_mined(build, batch):
    model = build(theta=0.99).eval()
    images, targets = batch
    dense = model(images, dense=True)
    sure = dense.arm_class.clone()
    half = sure.shape[1] // 2
    sure[:, :half, 0], sure[:, half:, 0] = 50.0, -50.0
    losses = detection_loss(replace(dense, arm_class=sure), targets, model.config)
    wild = dense.adm_class.clone().view(3, -1, 4)
    unmatched = match_anchors(dense.refined, targets, model.config.adm_iou).labels[:, :half] == 0
    wild[:, :half][unmatched] = torch.tensor([-30.0, 30, 0, 0])  # terribly wrong, but filtered
    other = detection_loss(replace(dense, arm_class=sure, adm_class=wild.flatten(0, 1)), targets, model.config)
    assert other.adm_class.item() == losses.adm_class.item()


def test_an_anchor_without_a_row_is_mined_after_those_that_have_one(build, batch):
    """Without the easiest negatives, none of which was mined, the loss is as before."""
    model = build(theta=1.0)
    images, targets = batch
    whole = model(images, targets)
    labels = whole.matches.labels.flatten()[whole.index]
    entropy = torch.nn.functional.cross_entropy(whole.adm_class, labels.clamp(min=0), reduction="none").detach()
    kept = labels > 0
    per_image = whole.matches.labels.shape[1]
    for image in range(3):
        own = (labels == 0) & (whole.index // per_image == image)
        mined = 3 * int((whole.matches.labels[image] > 0).sum())
        hardest = entropy.masked_fill(~own, -torch.inf).topk(min(mined, int(own.sum()))).indices
        kept[hardest] = True
    assert 0 < kept.sum() < len(kept)
    rows = {name: getattr(whole, name)[kept] for name in ("index", "adm_class", "adm_box", "row_boxes")}
    assert model.config.negatives_per_positive == 3
    expected = detection_loss(whole, targets, model.config).adm_class
    torch.testing.assert_close(detection_loss(replace(whole, **rows), targets, model.config).adm_class, expected)


def test_adm_loss_gives_the_arm_no_gradient(build, batch):
    model = build()
    images, targets = batch
    predictions = model(images, targets)
    assert not predictions.refined.requires_grad
    losses = detection_loss(predictions, targets, model.config)
    (losses.adm_class + losses.adm_box).backward()
    for parameter in model.arm.parameters():
        assert parameter.grad is None or parameter.grad.abs().sum() == 0
    shared = [parameter.grad for parameter in model.backbone.parameters()]
    assert all(grad is not None for grad in shared)
    assert sum(grad.abs().sum() for grad in shared) > 0


@pytest.mark.parametrize("normalization", ["per_module", "arm"])
def test_sums_of_the_parts_are_those_of_the_whole(build, batch, normalization):
    """Parts of a global batch: sums and positives add up, and one division gives equation 1."""
    model = build(loss_normalization=normalization).eval()
    images, targets = batch
    whole = detection_loss(model(images, targets), targets, model.config)
    sums = [
        sum_losses(model(images[part], targets[part]), targets[part], model.config)
        for part in (slice(0, 1), slice(1, 2), slice(2, 3))
    ]
    positives = torch.stack([part.positives for part in sums]).sum(0)
    assert not positives.requires_grad
    assert torch.equal(positives, sum_losses(model(images, targets), targets, model.config).positives)
    divided = [part.divide(positives) for part in sums]
    for name, part in whole.parts().items():
        assert sum(one.parts()[name] for one in divided).item() == pytest.approx(part.item(), rel=1e-4)
    first = detection_loss(model(images[:1], targets[:1]), targets[:1], model.config, positives)
    assert torch.equal(first.total, divided[0].total)


def test_survivors_are_counted_by_level(build, batch):
    model = build(theta=0.6).eval()
    images, targets = batch
    predictions = model(images, targets)
    losses = detection_loss(predictions, targets, model.config)
    survives = predictions.arm_class.softmax(-1)[..., 0] <= 0.6
    counts = [len(model.anchors(images)) * share for share in (64 / 85, 16 / 85, 4 / 85, 1 / 85)]
    assert list(predictions.level_anchors) == [round(count) for count in counts]
    expected = [part.float().mean().item() for part in survives.split(predictions.level_anchors, dim=1)]
    assert losses.survivors.tolist() == pytest.approx(expected, abs=1e-6)
    assert losses.rows.item() == pytest.approx(len(predictions.index) / survives.numel())
    shares = losses.shares()
    assert list(shares) == ["survivors_1", "survivors_2", "survivors_3", "survivors_4", "rows"]
    assert shares["survivors_2"] == losses.survivors[1]
    assert detection_loss(predictions, targets, build(theta=1.0).config).survivors.tolist() == [1.0] * 4
    plain = build(head="vanilla", theta=1.0, cascade=False, tcb=False).eval()
    assert detection_loss(plain(images, targets), targets, plain.config).survivors is None
