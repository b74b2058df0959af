"""Merge rules of the job spec, applied to the detections of several images at once.

N boxes of any number of images, xyxy in pixels of the original images.
"""

from __future__ import annotations

import torch
from refinedet.model.ops import merge
from refinedet.pipeline.config.spec import MergeRule
from torch import Tensor

DEFAULT_IOU = {"soft_nms_linear": 0.30, "soft_nms_gaussian": 0.30, "wbf": 0.55}  # else 0.45


def merge_boxes(
    rule: MergeRule, boxes: Tensor, scores: Tensor, labels: Tensor, image: Tensor, *, num_looks: int = 1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Merge within each class of each image, and keep the best `rule.max_detections` of each image.

    boxes [N, 4], scores [N], labels [N] integers from 1, image [N] integers from 0
    num_looks  how many times each image was looked at (weighted box fusion trusts what many looks saw)
    returns    boxes [M, 4], scores [M], labels [M], image [M]; by image, best first
    """
    confident = scores >= rule.score_threshold
    boxes, scores, labels, image = boxes[confident], scores[confident], labels[confident], image[confident]
    num_labels = int(labels.max()) + 1 if len(labels) else 1
    groups = image * num_labels + labels
    iou = rule.iou if rule.iou is not None else DEFAULT_IOU.get(rule.method, 0.45)
    if rule.method == "nms":
        kept = merge.nms(boxes, scores, groups, iou=iou, plus_one=rule.plus_one)
        boxes, scores, groups = boxes[kept], scores[kept], groups[kept]
    elif rule.method in ("soft_nms_linear", "soft_nms_gaussian"):
        kept, scores = merge.soft_nms(
            boxes,
            scores,
            groups,
            iou=iou,
            sigma=rule.sigma,
            score_threshold=rule.score_threshold,
            gaussian=rule.method == "soft_nms_gaussian",
            plus_one=rule.plus_one,
        )
        boxes, groups = boxes[kept], groups[kept]
    elif rule.method in ("vote", "soft_vote"):
        boxes, scores, groups = merge.vote(
            boxes,
            scores,
            groups,
            iou=iou,
            score_threshold=rule.score_threshold,
            soft=rule.method == "soft_vote",
            plus_one=rule.plus_one,
        )
    else:
        boxes, scores, groups = merge.weighted_box_fusion(
            boxes, scores, groups, num_looks=num_looks, iou=iou, plus_one=rule.plus_one
        )
    image, labels = groups // num_labels, groups % num_labels
    order = torch.sort(scores, descending=True, stable=True).indices
    order = order[torch.sort(image[order], stable=True).indices]
    first = torch.searchsorted(image[order], image[order])
    order = order[torch.arange(len(order), device=order.device) - first < rule.max_detections]
    return boxes[order], scores[order], labels[order], image[order]
