"""Targets: torchvision's dicts and ours, and what is refused by the name of the image and the box."""

from __future__ import annotations

import pytest
import torch
from refinedet.model import Targets, detection_loss

from tests.model.cases import random_images, random_targets

GOOD = [[4.0, 4.0, 30.0, 40.0], [10.0, 20.0, 50.0, 60.0]]


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        (GOOD, [1, 0], r"box 1 of image 1 must have a label in 1\.\.3 \(0 is background\), received 0"),
        (GOOD, [4, 1], r"box 0 of image 1 must have a label in 1\.\.3 \(0 is background\), received 4"),
        ([GOOD[0], [30.0, 4, 10, 40]], [1, 1], r"box 1 of image 1 must be .* received \[30.0, 4.0, 10.0, 40.0\]"),
        ([[float("nan")] * 4], [1], "box 0 of image 1 must be finite"),
        ([[0, 0, float("inf"), 3.0]], [1], "box 0 of image 1 must be finite"),
        (GOOD, [1], r"boxes of image 1 must be \[G, 4\] and its labels \[G\], received \[2, 4\] and \[1\]"),
        ([4.0, 5.0], [1, 1], r"boxes of image 1 must be \[G, 4\].*received \[2\]"),
        (GOOD, [1.0, 2.0], "labels of image 1 must be integers, received torch.float32"),
    ],
)
def test_targets_that_cannot_be_meant_are_refused_by_name(build, boxes, labels, message):
    model = build()
    images = random_images(torch.Generator().manual_seed(0), 2)
    good = random_targets(torch.Generator().manual_seed(0), 3)
    bad = {"boxes": torch.tensor(boxes), "labels": torch.tensor(labels)}
    with pytest.raises(ValueError, match=message):
        model(images, [good, bad])
    with pytest.raises(ValueError, match=message):
        detection_loss(model.eval()(images), [good, bad], model.config)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([Targets(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))], "received 1 targets for 2 images"),
        ([{"bbox": torch.zeros(0, 4)}] * 2, r"image 0 must be Targets or a dict .* received \['bbox'\]"),
        ([None, None], "image 0 must be Targets .* received NoneType"),
    ],
)
def test_other_things_than_targets_are_refused(build, targets, message):
    with pytest.raises(ValueError, match=message):
        build()(random_images(torch.Generator().manual_seed(0), 2), targets)


def test_dicts_and_targets_give_the_same_loss(build):
    model = build()
    generator = torch.Generator().manual_seed(0)
    images, targets = random_images(generator, 2), [random_targets(generator, 3) for _ in range(2)]
    dicts = [{"boxes": target.boxes, "labels": target.labels.int(), "image_id": torch.tensor(4)} for target in targets]
    model.eval()
    ours = detection_loss(model(images, targets), targets, model.config)
    theirs = detection_loss(model(images, dicts), dicts, model.config)
    assert torch.equal(ours.total, theirs.total)
