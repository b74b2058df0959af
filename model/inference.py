"""From predictions to detections (section IV-H).

B images, A anchors an image, C classes with background, N rows that the ADM computed, D detections of one image
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torchvision.ops import nms

from .boxes import decode_boxes
from .config import RefineDetConfig
from .filtering import select_survivors
from .structures import Detections, Predictions


@torch.no_grad()
def select_detections(predictions: Predictions, config: RefineDetConfig) -> list[Detections]:
    """Decode twice, keep the confident, suppress within each class; boxes are not clipped to the image.

    An anchor that the ARM is sure about (negative confidence above theta) gives no detection; the ADM may have been
    computed for more rows than that (`Predictions.index` is None, or was chosen for training).
    """
    p = predictions
    num_images, num_anchors = p.refined.shape[:2]
    index = p.index if p.index is not None else torch.arange(num_images * num_anchors, device=p.refined.device)
    scores = score_anchors(p, config)
    confident = (scores > config.score_threshold).any(1).nonzero().squeeze(1)  # few: the others need no boxes
    index, scores = index[confident], scores[confident]
    boxes = decode_boxes(p.adm_box[confident], p.refined.flatten(0, 1)[index])
    ends = torch.searchsorted(index, torch.arange(num_images + 1, device=index.device) * num_anchors).tolist()
    return [suppress(boxes[start:end], scores[start:end], config) for start, end in pairwise(ends)]


def score_anchors(predictions: Predictions, config: RefineDetConfig) -> Tensor:
    """Confidence of every row in each foreground class, [N, C - 1]; zero for anchors that the ARM filters."""
    p = predictions
    scores = p.adm_class.softmax(dim=-1)[:, 1:]
    if p.arm_class is None or config.filter_negatives == "training" or config.theta >= 1.0:
        return scores
    survivors = select_survivors(p.arm_class, config.theta).flatten()
    return scores * (survivors if p.index is None else survivors[p.index])[:, None]


def suppress(boxes: Tensor, scores: Tensor, config: RefineDetConfig) -> Detections:
    """One image: threshold, top k, NMS of each class, top detections. Equal scores keep the order of the anchors.

    boxes   [n, 4]      xyxy pixels
    scores  [n, C - 1]  of the foreground classes
    """
    row, label = (scores > config.score_threshold).nonzero().unbind(1)
    score = scores[row, label]
    kept = _keep_top(score, label, config)
    row, label, score = row[kept], label[kept], score[kept]
    box = boxes[row]

    kept = score.new_zeros(len(score), dtype=torch.bool)
    for one in label.unique().tolist():
        own = (label == one).nonzero().squeeze(1)
        kept[own[nms(box[own], score[own], config.nms_iou)]] = True
    chosen = kept.nonzero().squeeze(1)[: config.max_detections]
    return Detections(box[chosen].float(), score[chosen].float(), label[chosen] + 1)


def _keep_top(score: Tensor, label: Tensor, config: RefineDetConfig) -> Tensor:
    """Indices of the `pre_nms_top_k` best of the image or of each class, by descending score."""
    order = score.sort(descending=True, stable=True).indices
    if config.pre_nms_scope == "image":
        return order[: config.pre_nms_top_k]
    by_class = order[label[order].sort(stable=True).indices]
    counts = label.bincount(minlength=1)
    rank = torch.arange(len(label), device=label.device) - (counts.cumsum(0) - counts)[label[by_class]]
    best = torch.zeros_like(label, dtype=torch.bool).index_fill_(0, by_class[rank < config.pre_nms_top_k], True)
    return order[best[order]]
