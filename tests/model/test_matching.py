from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from refinedet.model import Targets
from refinedet.model.anchors import tile_anchors
from refinedet.model.boxes import paired_overlaps
from refinedet.model.matching import match_anchors

from tests.model.cases import HOSTILE, random_targets


def loop_match(anchors, target, low, high):
    """The Caffe release's matching, as nested loops: returns (label, box) of every anchor."""
    num_anchors, num_boxes = len(anchors), len(target.labels)
    overlap = paired_overlaps(target.boxes, anchors).tolist() if num_boxes else []
    owner = [-1] * num_anchors
    pool = set(range(num_boxes))
    while pool:
        best, best_anchor, best_box = 0.0, -1, -1
        for anchor in range(num_anchors):
            if owner[anchor] != -1:
                continue
            for box in sorted(pool):
                if overlap[box][anchor] > 1e-6 and overlap[box][anchor] > best:
                    best, best_anchor, best_box = overlap[box][anchor], anchor, box
        if best_anchor == -1:
            break
        owner[best_anchor] = best_box
        pool.remove(best_box)
    result = []
    for anchor in range(num_anchors):
        if owner[anchor] != -1:
            result.append((int(target.labels[owner[anchor]]), owner[anchor]))
            continue
        most, best_box = 0.0, -1
        for box in range(num_boxes):
            if overlap[box][anchor] > most:
                most, best_box = overlap[box][anchor], box
        if best_box != -1 and most >= high:
            result.append((int(target.labels[best_box]), best_box))
        else:
            result.append((0 if most < low else -1, None))
    return result


def assert_same(anchors, targets, iou):
    matches = match_anchors(anchors, targets, iou)
    for image, target in enumerate(targets):
        own = anchors if anchors.dim() == 2 else anchors[image]
        for anchor, (label, box) in enumerate(loop_match(own, target, *iou)):
            assert matches.labels[image, anchor].item() == label
            if box is not None:
                assert matches.boxes[image, anchor].item() == box


@pytest.mark.parametrize("iou", [(0.5, 0.5), (0.3, 0.7), (0.1, 0.2)])
@pytest.mark.parametrize("seed", range(4))
def test_matching_is_that_of_the_loop(seed, iou):
    generator = torch.Generator().manual_seed(seed)
    anchors = tile_anchors(64, 64, (16, 32, 64))
    targets = [random_targets(generator, count) for count in (3, 0, 9, 1)]
    assert_same(anchors, targets, iou)
    moved = anchors + 6 * torch.randn(4, *anchors.shape, generator=generator)
    moved[..., 2:] = torch.maximum(moved[..., 2:], moved[..., :2])
    assert_same(moved, targets, iou)


def test_ties_go_to_the_lower_anchor_and_the_lower_box():
    generator = torch.Generator().manual_seed(0)
    anchors = tile_anchors(64, 64, (16, 32))
    for _ in range(8):  # boxes on a coarse grid, where equal overlaps abound, some of them twice
        corner = 16.0 * torch.randint(0, 3, (6, 2), generator=generator)
        side = 16.0 * torch.randint(1, 3, (6, 2), generator=generator)
        boxes = torch.cat([corner, corner + side], dim=1)
        boxes = torch.cat([boxes, boxes[:2]])
        assert_same(anchors, [Targets(boxes, torch.arange(1, 9))], (0.5, 0.5))


@pytest.mark.parametrize("name", [name for name in HOSTILE if name != "five hundred"])
def test_hostile_boxes(name):
    assert_same(tile_anchors(64, 64, (16, 32, 64)), [HOSTILE[name]], (0.5, 0.5))


def test_five_hundred_boxes():
    """The bipartite part alone, against all pairs sorted by (IoU, anchor, box)."""
    anchors = tile_anchors(128, 128, (8, 16, 32, 64))
    target = HOSTILE["five hundred"]
    overlaps = paired_overlaps(target.boxes, anchors)
    box, anchor = (overlaps > 1e-6).nonzero().unbind(1)
    pairs = sorted(zip((-overlaps[box, anchor]).tolist(), anchor.tolist(), box.tolist(), strict=True))
    owner: dict[int, int] = {}
    served: set[int] = set()
    for _, one_anchor, one_box in pairs:
        if one_anchor not in owner and one_box not in served:
            owner[one_anchor] = one_box
            served.add(one_box)
    matches = match_anchors(anchors, [target], (2.0, 2.0))
    positive = (matches.labels[0] > 0).nonzero().squeeze(1).tolist()
    assert {one: matches.boxes[0, one].item() for one in positive} == owner


def test_more_boxes_than_anchors():
    anchors = tile_anchors(64, 64, (64,))
    target = random_targets(torch.Generator().manual_seed(3), 12)
    assert_same(anchors, [target], (0.5, 0.5))


def test_a_box_that_overlaps_nothing_matches_nothing():
    matches = match_anchors(tile_anchors(64, 64, (8, 16)), [HOSTILE["outside"]], (0.5, 0.5))
    assert matches.labels.abs().sum() == 0


def test_binary_labels_and_chunks_do_not_change_the_matches(monkeypatch):
    generator = torch.Generator().manual_seed(5)
    anchors = tile_anchors(64, 64, (8, 16, 32, 64))
    targets = [random_targets(generator, count) for count in (5, 0, 2, 30, 1)]
    whole = match_anchors(anchors, targets, (0.5, 0.5))
    monkeypatch.setattr("refinedet.model.matching.PAIRS_AT_ONCE", 1)
    parts = match_anchors(anchors, targets, (0.5, 0.5))
    assert torch.equal(whole.labels, parts.labels)
    positive = whole.labels > 0
    assert torch.equal(whole.boxes[positive], parts.boxes[positive])
    assert torch.equal(match_anchors(anchors, targets, (0.5, 0.5), binary=True).labels, whole.labels.clamp(max=1))


def test_too_many_boxes_is_an_error():
    boxes = torch.zeros(8192, 4)
    with pytest.raises(ValueError, match="8192"):
        match_anchors(tile_anchors(64, 64, (64,)), [Targets(boxes, torch.ones(8192, dtype=torch.int64))], (0.5, 0.5))


CROWD = """
import resource, torch
from refinedet.model import Targets
from refinedet.model.anchors import tile_anchors
from refinedet.model.matching import match_anchors
generator = torch.Generator().manual_seed(0)
anchors = tile_anchors(1024, 1024, (8, 16, 32, 64, 128))
corner = torch.rand(4096, 2, generator=generator) * 900
boxes = torch.cat([corner, corner + 4 + torch.rand(4096, 2, generator=generator) * 120], dim=1)
match = lambda count: match_anchors(
    anchors, [Targets(boxes[:count], torch.ones(count, dtype=torch.int64))], (0.5, 0.5))
match(3)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
labels = match(4096).labels
assert (labels > 0).sum() >= 4000, labels
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_four_thousand_objects_cost_at_most_a_gigabyte():
    done = subprocess.run([sys.executable, "-c", CROWD], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1e9
