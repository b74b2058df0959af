"""Merge methods: the boxes of one class in one image become its detections.

A method is one function here with one entry in `MERGE_METHODS`, and its name in the spec's `MergeMethod`.

N boxes of any number of images, xyxy in pixels of the original images; M merged ones
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from refinedet.model.ops import merge
from refinedet.pipeline.config.spec import MergeMethod, MergeRule
from torch import Tensor

Merged = tuple[Tensor, Tensor, Tensor]
"""boxes [M, 4], scores [M], groups [M]"""


@dataclass(frozen=True)
class Candidates:
    """Boxes [N, 4] and scores [N]; boxes of one group [N] (an image's class) merge with each other alone."""

    boxes: Tensor
    scores: Tensor
    groups: Tensor
    num_views: int
    """of each image; weighted box fusion trusts what many views detected"""


def merge_by_nms(found: Candidates, rule: MergeRule, iou: float) -> Merged:
    """Non-maximum suppression."""
    kept = merge.nms(found.boxes, found.scores, found.groups, iou=iou, plus_one=rule.plus_one)
    return found.boxes[kept], found.scores[kept], found.groups[kept]


def merge_by_soft_nms(found: Candidates, rule: MergeRule, iou: float) -> Merged:
    """Soft-NMS (Bodla et al. 2017): overlapping boxes lose score, linearly or by a Gaussian."""
    kept, scores = merge.soft_nms(
        found.boxes, found.scores, found.groups, iou=iou, sigma=rule.sigma, score_threshold=rule.score_threshold,
        gaussian=rule.method == "soft_nms_gaussian", plus_one=rule.plus_one,
    )  # fmt: skip
    return found.boxes[kept], scores, found.groups[kept]


def merge_by_voting(found: Candidates, rule: MergeRule, iou: float) -> Merged:
    """Box voting (Gidaris and Komodakis 2015), or the authors' soft box voting."""
    return merge.vote(
        found.boxes, found.scores, found.groups, iou=iou, score_threshold=rule.score_threshold,
        soft=rule.method == "soft_vote", plus_one=rule.plus_one,
    )  # fmt: skip


def merge_by_fusion(found: Candidates, rule: MergeRule, iou: float) -> Merged:
    """Weighted box fusion (Solovyev et al. 2021)."""
    return merge.weighted_box_fusion(
        found.boxes, found.scores, found.groups, num_views=found.num_views, iou=iou, plus_one=rule.plus_one
    )


MERGE_METHODS: dict[MergeMethod, tuple[Callable[[Candidates, MergeRule, float], Merged], float]] = {
    "nms": (merge_by_nms, 0.45),
    "soft_nms_linear": (merge_by_soft_nms, 0.30),
    "soft_nms_gaussian": (merge_by_soft_nms, 0.30),
    "vote": (merge_by_voting, 0.45),
    "soft_vote": (merge_by_voting, 0.45),
    "wbf": (merge_by_fusion, 0.55),
}
"""method -> (function, the IoU from which boxes merge where the spec gives none)"""
assert MERGE_METHODS.keys() == set(get_args(MergeMethod)), "MergeMethod in config/detection_spec.py has other names"


def merge_boxes(
    rule: MergeRule, boxes: Tensor, scores: Tensor, labels: Tensor, image: Tensor, *, num_views: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge within each class of each image, and keep the best `rule.max_detections` of each image.

    boxes [N, 4], scores [N], labels [N] integers from 1, image [N] integers from 0
    num_views  views of each image
    returns    boxes [M, 4], scores [M], labels [M], image [M]; by image, best first
    """
    confident = scores >= rule.score_threshold
    boxes, scores, labels, image = boxes[confident], scores[confident], labels[confident], image[confident]
    num_labels = int(labels.max()) + 1 if len(labels) else 1
    function, usual_iou = MERGE_METHODS[rule.method]
    found = Candidates(boxes, scores, image * num_labels + labels, num_views)
    boxes, scores, groups = function(found, rule, usual_iou if rule.iou is None else rule.iou)
    image, labels = groups // num_labels, groups % num_labels
    order = _best_of_groups(scores, image, rule.max_detections)
    return boxes[order], scores[order], labels[order], image[order]


def suppress_across_classes(boxes: Tensor, scores: Tensor, image: Tensor, *, iou: float, max_detections: int) -> Tensor:
    """Index of what NMS over all classes keeps, at most `max_detections` of each image; by image, best first."""
    kept = merge.nms(boxes, scores, image, iou=iou)
    return kept[_best_of_groups(scores[kept], image[kept], max_detections)]


def _best_of_groups(scores: Tensor, groups: Tensor, count: int) -> Tensor:
    """Index of the best `count` boxes of each group; by group, best first."""
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[torch.sort(groups[order], stable=True).indices]
    first = torch.searchsorted(groups[order], groups[order])
    return order[torch.arange(len(order), device=order.device) - first < count]
