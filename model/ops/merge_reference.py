"""Merging overlapping boxes, plainly, in NumPy: what `merge` runs where the library is not built, and its oracle.

N boxes, one group (one class in one image) at a time. Boxes are xyxy. With `plus_one` corners are inclusive pixels,
as in the authors' test code: a side is x2 - x1 + 1. Equal scores are taken in the order of the input.
"""

from __future__ import annotations

import numpy as np

MergedArrays = tuple[np.ndarray, np.ndarray]


def iou_with_first(boxes: np.ndarray, first: np.ndarray, plus_one: bool) -> np.ndarray:
    """IoU of every box [N, 4] with one box [4], in their type; 0 where both are empty."""
    one = boxes.dtype.type(plus_one)
    width = np.maximum(0, np.minimum(boxes[:, 2], first[2]) - np.maximum(boxes[:, 0], first[0]) + one)
    height = np.maximum(0, np.minimum(boxes[:, 3], first[3]) - np.maximum(boxes[:, 1], first[1]) + one)
    area = (boxes[:, 2] - boxes[:, 0] + one) * (boxes[:, 3] - boxes[:, 1] + one)
    first_area = (first[2] - first[0] + one) * (first[3] - first[1] + one)
    shared = width * height
    union = area + first_area - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def nms(boxes: np.ndarray, scores: np.ndarray, iou: float, plus_one: bool) -> np.ndarray:
    """Indices of the boxes kept, best first: a box goes when it overlaps a better kept one by more than `iou`."""
    order = np.argsort(-scores, kind="stable")
    kept: list[int] = []
    while len(order):
        kept.append(order[0])
        overlap = iou_with_first(boxes[order], boxes[order[0]], plus_one)
        stays = overlap <= iou
        stays[0] = False
        order = order[stays]
    return np.array(kept, np.int64)


def soft_nms(
    boxes: np.ndarray,
    scores: np.ndarray,
    iou: float,
    sigma: float,
    score_threshold: float,
    gaussian: bool,
    plus_one: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices in the order they were taken, and their lowered scores (Bodla et al. 2017).

    Every box taken lowers those left: linear, by 1 - overlap where it exceeds `iou`; Gaussian, by
    exp(-overlap^2 / sigma). What falls below `score_threshold` is dropped.
    """
    left = np.flatnonzero(scores >= score_threshold)
    score = scores[left].copy()
    index: list[int] = []
    lowered: list[float] = []
    while len(left):
        best = int(np.argmax(score))  # the first of equals; `left` keeps the order of the input
        index.append(left[best])
        lowered.append(score[best])
        overlap = iou_with_first(boxes[left], boxes[left[best]], plus_one)
        if gaussian:
            score = score * np.exp(-(overlap**2) / scores.dtype.type(sigma))
        else:
            score = np.where(overlap > iou, score * (1 - overlap), score)
        stays = score >= score_threshold
        stays[best] = False
        left, score = left[stays], score[stays]
    return np.array(index, np.int64), np.array(lowered, scores.dtype)


def vote(
    boxes: np.ndarray, scores: np.ndarray, iou: float, score_threshold: float, soft: bool, plus_one: bool
) -> MergedArrays:
    """Box voting: (boxes [M, 4], scores [M]), best first.

    The best box left and all that overlap it by `iou` or more become one: the mean of their corners, weighted by
    score, with the best score. Soft voting also keeps each of those with its score lowered by 1 - overlap, where that
    reaches `score_threshold`.
    """
    order = np.argsort(-scores, kind="stable")
    merged_boxes: list[np.ndarray] = []
    merged_scores: list[np.ndarray] = []
    while len(order):
        group_boxes, group_scores = boxes[order], scores[order]
        overlap = iou_with_first(group_boxes, group_boxes[0], plus_one)
        near = overlap >= iou
        near[0] = True
        if near.sum() > 1 and soft:
            lowered = group_scores[near] * (1 - overlap[near])
            kept = lowered >= score_threshold
            merged_boxes.append(group_boxes[near][kept])
            merged_scores.append(lowered[kept])
        merged_boxes.append(_mean_box(group_boxes[near], group_scores[near]) if near.sum() > 1 else group_boxes[:1])
        merged_scores.append(group_scores[:1])
        order = order[~near]
    if not merged_boxes:
        return boxes[:0], scores[:0]
    out_boxes, out_scores = np.concatenate(merged_boxes), np.concatenate(merged_scores)
    order = np.argsort(-out_scores, kind="stable")
    return out_boxes[order], out_scores[order]


def weighted_box_fusion(
    boxes: np.ndarray, scores: np.ndarray, iou: float, score_threshold: float, num_views: int, plus_one: bool
) -> MergedArrays:
    """Weighted box fusion (Solovyev et al. 2021): (boxes [M, 4], scores [M]), best first.

    Best first, every box joins the cluster whose mean it overlaps most, above `iou`, or opens a new one. A cluster's
    box is the mean weighted by score; its score the mean score times min(boxes, num_views) / num_views.
    """
    means, sums = np.zeros((0, 4), boxes.dtype), np.zeros((0, 4), boxes.dtype)
    totals, members = np.zeros(0, scores.dtype), np.zeros(0, np.int64)
    for one in np.argsort(-scores, kind="stable"):
        if scores[one] < score_threshold:
            break
        overlap = iou_with_first(means, boxes[one], plus_one)
        best = int(np.argmax(overlap)) if len(overlap) else -1
        if best >= 0 and overlap[best] > iou:
            sums[best] += boxes[one] * scores[one]
            totals[best] += scores[one]
            members[best] += 1
            if totals[best] > 0:
                means[best] = sums[best] / totals[best]
        else:
            means = np.concatenate([means, boxes[one][None]])
            sums = np.concatenate([sums, (boxes[one] * scores[one])[None]])
            totals, members = np.append(totals, scores[one]), np.append(members, 1)
    members = members.astype(scores.dtype)
    views = scores.dtype.type(num_views)
    fused = totals / members * np.minimum(members, views) / views
    order = np.argsort(-fused, kind="stable")
    return means[order], fused[order]


def _mean_box(boxes: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """[1, 4] mean of the corners, weighted by score; a plain mean where no score is positive."""
    total = scores.sum()
    return ((boxes * scores[:, None]).sum(0) / total if total > 0 else boxes.mean(0))[None]
