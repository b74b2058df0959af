"""Suppression of a batch: the library against its reference, torchvision and the rules of greedy NMS."""

from __future__ import annotations

import pytest
import torch
from refinedet.model.ops import library
from refinedet.model.ops.suppress import suppress, suppress_reference
from torchvision.ops import batched_nms

needs_library = pytest.mark.skipif(not library.describe_library().loaded, reason=library.describe_library().reason)


def random_candidates(batch: int, candidates: int, classes: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(batch, candidates, 2, generator=generator) * 60
    boxes = torch.cat([corner, corner + torch.rand(batch, candidates, 2, generator=generator) * 40], dim=2)
    scores = torch.rand(batch, candidates, generator=generator).sort(dim=1, descending=True).values
    return boxes, scores, torch.randint(1, classes + 1, (batch, candidates), generator=generator)


@needs_library
@pytest.mark.parametrize("candidates", [0, 1, 7, 64, 300])
@pytest.mark.parametrize(("iou", "threshold", "most"), [(0.5, 0.0, 1000), (0.3, 0.5, 20), (1.0, 0.2, 50), (0.0, 0, 5)])
def test_library_equals_reference(candidates, iou, threshold, most):
    given = random_candidates(3, candidates)
    for ours, theirs in zip(
        suppress(*given, iou, threshold, most), suppress_reference(*given, iou, threshold, most), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("run", [suppress, suppress_reference])
def test_keeps_what_torchvision_keeps(run):
    boxes, scores, labels = random_candidates(2, 200)
    found_boxes, found_scores, found_labels, counts = run(boxes, scores, labels, 0.45, 0.1, 200)
    for image in range(2):
        confident = scores[image] > 0.1
        own, own_scores = boxes[image][confident].double(), scores[image][confident].double()
        kept = batched_nms(own, own_scores, labels[image][confident], 0.45)
        assert counts[image] == len(kept)
        assert torch.equal(found_boxes[image, : len(kept)].double(), own[kept])
        assert torch.equal(found_scores[image, : len(kept)].double(), own_scores[kept])
        assert torch.equal(found_labels[image, : len(kept)], labels[image][confident][kept])
        assert (found_scores[image, len(kept) :] == 0).all()


@pytest.mark.parametrize("run", [suppress, suppress_reference])
def test_boxes_without_area_and_infinite_ones_suppress_nothing(run):
    boxes = torch.tensor([[[5.0, 5, 5, 5], [5, 5, 5, 5], [float("inf")] * 4, [float("nan")] * 4, [0, 0, 9, 9]]])
    found = run(boxes, torch.linspace(0.9, 0.5, 5)[None], torch.ones(1, 5, dtype=torch.int64), 0.5, 0.1, 5)
    assert found[3].tolist() == [5]


@needs_library
def test_opcheck_and_direct_calls():
    boxes, scores, labels = random_candidates(2, 9)
    suppress(boxes, scores, labels, 0.5, 0.1, 4)
    operator = torch.ops.refinedet.suppress
    torch.library.opcheck(operator.default, (boxes, scores, labels, 0.5, 0.1, 4))
    for bad, message in (
        ((boxes[..., :3], scores, labels), r"boxes must be \[B, K, 4\]"),
        ((boxes, scores[:, 1:], labels), r"must be \[2, 9\]"),
        ((boxes.double(), scores, labels), "float32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            operator(*bad, 0.5, 0.1, 4)
    with pytest.raises(RuntimeError, match="max_kept must be positive, received 0"):
        operator(boxes, scores, labels, 0.5, 0.1, 0)
