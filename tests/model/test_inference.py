from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from refinedet.model import RefineDetConfig, select_detections
from refinedet.model.boxes import decode_boxes
from refinedet.model.inference import suppress

from tests.model.cases import random_images


def loop_suppress(boxes, scores, config):
    """Section IV-H as loops; returns [(score, label, box)]."""

    def iou(a, b):
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        inter = max(w, 0) * max(h, 0)
        union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
        return inter / union if union > 0 else 0.0

    found = [
        (score, row, label)
        for row, of_row in enumerate(scores.tolist())
        for label, score in enumerate(of_row)
        if score > config.score_threshold
    ]
    found.sort(key=lambda one: (-one[0], one[1], one[2]))
    if config.pre_nms_scope == "image":
        found = found[: config.pre_nms_top_k]
    else:
        seen: dict[int, int] = {}
        kept = []
        for one in found:
            seen[one[2]] = seen.get(one[2], 0) + 1
            if seen[one[2]] <= config.pre_nms_top_k:
                kept.append(one)
        found = kept
    result = []
    for score, row, label in found:
        box = boxes[row].tolist()
        if all(label + 1 != other or iou(box, rival) <= config.nms_iou for _, other, rival in result):
            result.append((score, label + 1, box))
    return result[: config.max_detections]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pre_nms_top_k": 20, "max_detections": 7},
        {"pre_nms_scope": "class", "pre_nms_top_k": 10, "max_detections": 500},
        {"pre_nms_scope": "class", "pre_nms_top_k": 1000, "max_detections": 500},
        {"score_threshold": 0.9999},
    ],
)
@pytest.mark.parametrize("ties", [False, True])
def test_selection_is_that_of_the_loop(options, ties):
    config = RefineDetConfig(num_classes=4, **options)
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(80, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + torch.rand(80, 2, generator=generator) * 40], dim=1)
    boxes[3, 2:] = boxes[3, :2]
    scores = torch.rand(80, 4, generator=generator) ** 3
    if ties:
        scores = (scores * 8).round() / 8
    ours = suppress(boxes, scores, config)
    expected = loop_suppress(boxes, scores, config)
    assert ours.scores.tolist() == [score for score, _, _ in expected]
    assert ours.labels.tolist() == [label for _, label, _ in expected]
    assert torch.equal(ours.boxes, torch.tensor([box for _, _, box in expected]).view(-1, 4))


def test_equal_scores_keep_the_anchors_order():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 11], [50, 50, 60, 60]])
    found = suppress(boxes, torch.full((3, 1), 0.5), RefineDetConfig(num_classes=1))
    assert torch.equal(found.boxes, boxes[[0, 2]])


def test_suppression_is_within_a_class():
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10]])
    found = suppress(boxes, torch.tensor([[0.9, 0.0], [0.0, 0.8]]), RefineDetConfig(num_classes=2))
    assert found.labels.tolist() == [1, 2]


@pytest.mark.parametrize("head", ["align", "vanilla"])
@pytest.mark.parametrize("mode", ["always", "training"])
def test_sparse_and_dense_detections_are_the_same(build, head, mode):
    model = build(head=head, theta=0.6, filter_negatives=mode).eval()
    images = random_images(torch.Generator().manual_seed(0), 3)
    sparse = model(images)
    assert (sparse.index is None) == (mode == "training")
    dense = select_detections(model(images, dense=True), model.config)
    for ours, theirs in zip(select_detections(sparse, model.config), dense, strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.allclose(ours.scores, theirs.scores, atol=1e-5)
        assert torch.allclose(ours.boxes, theirs.boxes, atol=1e-3)


def test_boxes_are_decoded_twice_and_not_clipped(build):
    model = build(theta=1.0).eval()
    p = model(random_images(torch.Generator().manual_seed(0), 1), dense=True)
    first = decode_boxes(p.arm_box, p.anchors)
    assert torch.equal(p.refined, first.detach())
    logits = torch.full_like(p.adm_class, -20.0)
    logits[:, 0] = 20.0
    logits[0] = torch.tensor([-20.0, 20.0, -20.0, -20.0])
    found = select_detections(replace(p, adm_class=logits), model.config)[0]
    assert torch.allclose(found.boxes, decode_boxes(p.adm_box, first[0])[:1].detach())


def test_all_anchors_filtered_gives_no_detections(build):
    model = build(theta=1e-6).eval()
    images = random_images(torch.Generator().manual_seed(0), 2)
    assert [len(found.scores) for found in model.detect(images)] == [0, 0]
