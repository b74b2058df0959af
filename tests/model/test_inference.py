from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from refinedet.model import RefineDetConfig, select_detections
from refinedet.model.boxes import decode_boxes
from refinedet.model.inference import finish_detections, select_batch
from refinedet.model.structures import Predictions
from torch.utils._python_dispatch import TorchDispatchMode

from tests.model.cases import random_images


def suppress(boxes, scores, config):
    return finish_detections(boxes[None], scores[None], config)[0]


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
    assert len(expected) > 0 or config.score_threshold > 0.9
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


def make_predictions(batch, classes, device="cpu", levels=(4800, 1200, 300, 75), share=0.1):
    """Predictions of random numbers, the surviving rows in no order."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    anchors = sum(levels)
    corner = torch.rand(anchors, 2, generator=generator) * 300
    tiled = torch.cat([corner, corner + 20 + torch.rand(anchors, 2, generator=generator) * 60], dim=1)
    index = torch.randperm(batch * anchors, generator=generator)[: int(share * batch * anchors)]
    parts = (tiled, tiled + draw(batch, anchors, 4), draw(batch, anchors, 2), draw(batch, anchors, 4), index)
    rows = (2 * draw(len(index), classes + 1), draw(len(index), 4), parts[1].flatten(0, 1)[index])
    parts = [part.to(device) for part in (*parts, *rows)]
    return Predictions(*parts, level_anchors=levels, filtered=True)


class Dispatches(TorchDispatchMode):
    """The names of all operators that run, views too."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_a_batch_takes_few_operators_and_never_waits():
    config = RefineDetConfig(num_classes=80)
    predictions = make_predictions(8, 80)
    select_batch(predictions, config)
    with Dispatches() as seen:
        found = select_detections(predictions, config)
    assert len(found) == 8
    assert all(len(one.scores) == 200 for one in found)
    assert len(seen.names) <= 40, "\n".join(seen.names)
    # On the meta device there are no values: whatever had to wait for one would raise.
    nowhere = make_predictions(8, 80, "meta")
    for scope in ("image", "class"):
        batch = select_batch(nowhere, replace(config, pre_nms_scope=scope))
        assert batch.boxes.shape == (8, 200, 4)
        assert batch.counts.shape == (8,)


@pytest.mark.parametrize("options", [{}, {"pre_nms_scope": "class", "pre_nms_top_k": 30, "max_detections": 300}])
def test_a_batch_of_sparse_rows_is_that_of_the_loop(options):
    config = RefineDetConfig(num_classes=5, score_threshold=0.05, **options)
    p = make_predictions(3, 5, levels=(96, 24, 6, 3), share=0.5)
    p = replace(p, adm_class=(p.adm_class * 2).round() / 2)  # equal scores abound
    anchors = p.refined.shape[1]
    for image, found in enumerate(select_detections(p, config)):
        rows = (p.index // anchors == image).nonzero().squeeze(1)
        rows = rows[p.index[rows].argsort()]
        boxes = decode_boxes(p.adm_box[rows], p.refined[image, p.index[rows] % anchors])
        expected = loop_suppress(boxes, p.adm_class[rows].softmax(-1)[:, 1:], config)
        assert found.scores.tolist() == [score for score, _, _ in expected]
        assert found.labels.tolist() == [label for _, label, _ in expected]
        assert torch.equal(found.boxes, torch.tensor([box for _, _, box in expected]).view(-1, 4))


@pytest.mark.parametrize("head", ["align", "vanilla"])
def test_a_fixed_capacity_changes_nothing_where_it_suffices(build, head):
    model = build(head=head, theta=0.4).eval()
    images = random_images(torch.Generator().manual_seed(0), 2)
    survivors = len(model(images).index)
    capacity = survivors + 17
    padded = model(images, capacity=capacity)
    assert len(padded.adm_class) == capacity
    assert (padded.index == padded.refined.shape[0] * padded.refined.shape[1]).sum() == 17
    for ours, theirs in zip(model.detect_padded(images, capacity).split(), model.detect(images), strict=True):
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.allclose(ours.scores, theirs.scores, atol=1e-6)
        assert torch.allclose(ours.boxes, theirs.boxes, atol=1e-3)
    few = model(images, capacity=9)
    trust = few.arm_class.softmax(-1)[..., 1].flatten()
    assert trust[few.index].min() >= trust.sort(descending=True).values[8]
    with pytest.raises(ValueError, match="excludes dense and targets"):
        model(images, dense=True, capacity=9)


def test_detection_in_training_mode_is_refused_and_changes_nothing(build):
    model = build()
    before = [value.clone() for value in model.state_dict().values()]
    images = random_images(torch.Generator().manual_seed(0), 2)
    for detect in (model.detect, lambda images: model.detect_padded(images, 10)):
        with pytest.raises(RuntimeError, match=r"received a detector in training mode.*call eval\(\) first"):
            detect(images)
    assert all(torch.equal(a, b) for a, b in zip(before, model.state_dict().values(), strict=True))


@pytest.mark.parametrize("head", ["align", "vanilla"])
def test_detection_runs_where_only_deterministic_operators_may(build, head):
    """A deterministic training validates in that mode."""
    model = build(head=head, score_threshold=0.0).eval()
    images = random_images(torch.Generator().manual_seed(0), 2)
    expected = model.detect(images)
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")
    try:
        found, padded = model.detect(images), model.detect_padded(images, capacity=340)
    finally:
        torch.set_deterministic_debug_mode(before)
    assert padded.counts.sum() > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.boxes, theirs.boxes)
