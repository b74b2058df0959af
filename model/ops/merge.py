"""Merging overlapping boxes: NMS, soft-NMS, box voting, weighted box fusion; class-aware and batched over images.

N boxes in, M out. A group is one class of one image, by any integer; boxes of different groups never meet. Without
groups all boxes are one. Boxes are xyxy pixels. With `plus_one` their corners are inclusive pixels, as in the authors'
test code: a side is x2 - x1 + 1. Outputs are sorted by group, and within one best first (soft-NMS: in the order
taken, which is the same); equal scores stay in the order of the input. Everything is computed on the CPU in fp32, by
the compiled library where it is built, else by `merge_reference`; results return to the device of the input.
"""

# torch's `from_numpy` is typed in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from . import library
from . import merge_reference as reference


def nms(boxes: Tensor, scores: Tensor, groups: Tensor | None = None, *, iou: float, plus_one: bool = False) -> Tensor:
    """Indices [M] of the boxes kept: a box goes when it overlaps a better kept one of its group by more than `iou`.

    boxes [N, 4], scores [N], groups [N] integers.
    """
    boxes, scores, groups = _checked(boxes, scores, groups)
    if _is_ready():
        return torch.ops.refinedet.nms(*_for_library(boxes, scores, groups), iou, plus_one).to(boxes.device)

    def run(group_boxes: np.ndarray, group_scores: np.ndarray) -> tuple[np.ndarray, ...]:
        return (reference.nms(group_boxes, group_scores, iou, plus_one),)

    return _by_group(run, boxes, scores, groups)[0].to(boxes.device)


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None = None,
    *,
    iou: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 0.01,
    gaussian: bool = False,
    plus_one: bool = False,
) -> tuple[Tensor, Tensor]:
    """Lower the scores of overlapping boxes instead of dropping them (Bodla et al. 2017).

    Linear: by 1 - overlap, where the overlap exceeds `iou`. Gaussian: by exp(-overlap^2 / sigma), always.
    returns  indices [M] and their scores [M]; what fell below `score_threshold` is gone
    """
    boxes, scores, groups = _checked(boxes, scores, groups)
    if _is_ready():
        index, lowered = torch.ops.refinedet.soft_nms(
            *_for_library(boxes, scores, groups), iou, sigma, score_threshold, gaussian, plus_one
        )
        return index.to(boxes.device), lowered.to(boxes.device)

    def run(group_boxes: np.ndarray, group_scores: np.ndarray) -> tuple[np.ndarray, ...]:
        return reference.soft_nms(group_boxes, group_scores, iou, sigma, score_threshold, gaussian, plus_one)

    index, lowered = _by_group(run, boxes, scores, groups)
    return index.to(boxes.device), lowered.to(boxes.device)


def vote(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None = None,
    *,
    iou: float = 0.45,
    score_threshold: float = 0.01,
    soft: bool = False,
    plus_one: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Box voting (`soft`: soft box voting) of the authors' multi-scale test: boxes [M, 4], scores [M], groups [M].

    The best box left and those that overlap it by `iou` or more become one: the mean of their corners, weighted by
    score, with the best score. Soft voting also keeps each of those, its score lowered by 1 - overlap with the best,
    where that reaches `score_threshold`.
    """
    boxes, scores, groups = _checked(boxes, scores, groups)
    if _is_ready():
        results = torch.ops.refinedet.box_vote(
            *_for_library(boxes, scores, groups), iou, score_threshold, soft, plus_one
        )
        return _returned(results, boxes, groups)

    def run(group_boxes: np.ndarray, group_scores: np.ndarray) -> tuple[np.ndarray, ...]:
        return reference.vote(group_boxes, group_scores, iou, score_threshold, soft, plus_one)

    return _merged(run, boxes, scores, groups)


def weighted_box_fusion(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None = None,
    *,
    num_views: int,
    iou: float = 0.55,
    score_threshold: float = 0.0,
    plus_one: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted box fusion (Solovyev et al. 2021): boxes [M, 4], scores [M], groups [M].

    Best first, every box joins the cluster whose mean it overlaps most, above `iou`, or opens one. A cluster's box is
    the mean weighted by score, its score the mean score times min(boxes, num_views) / num_views: what few of the
    views of the image detected is trusted less.
    """
    if num_views < 1:
        raise ValueError(f"num_views must be at least 1, received {num_views}.")
    boxes, scores, groups = _checked(boxes, scores, groups)
    if _is_ready():
        results = torch.ops.refinedet.weighted_box_fusion(
            *_for_library(boxes, scores, groups), num_views, iou, score_threshold, plus_one
        )
        return _returned(results, boxes, groups)

    def run(group_boxes: np.ndarray, group_scores: np.ndarray) -> tuple[np.ndarray, ...]:
        return reference.weighted_box_fusion(group_boxes, group_scores, iou, score_threshold, num_views, plus_one)

    return _merged(run, boxes, scores, groups)


def _checked(boxes: Tensor, scores: Tensor, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4], received {list(boxes.shape)}.")
    if groups is None:
        groups = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    for name, values in (("scores", scores), ("groups", groups)):
        if values.shape != boxes.shape[:1]:
            raise ValueError(f"{name} must be [{len(boxes)}] as there are boxes, received {list(values.shape)}.")
    if groups.is_floating_point():
        raise ValueError(f"groups must be integers, received {groups.dtype}.")
    # A sum is finite only if its terms are, and quick; one of huge terms may overflow, so they are examined then.
    if not all(values.sum().isfinite() or values.isfinite().all() for values in (boxes, scores)):
        raise ValueError("boxes and scores must be finite, received NaN or infinity.")
    return boxes.detach(), scores.detach(), groups


@functools.cache
def _is_ready() -> bool:
    return library.is_loaded() and hasattr(torch.ops.refinedet, "box_vote")


def _for_library(boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return boxes.cpu().float(), scores.cpu().float(), groups.cpu().long()


def _returned(results: tuple[Tensor, Tensor, Tensor], boxes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    merged, scores, numbers = results
    return merged.to(boxes.device), scores.to(boxes.device), numbers.to(boxes.device, groups.dtype)


def _by_group(
    run: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]], boxes: Tensor, scores: Tensor, groups: Tensor
) -> tuple[Tensor, ...]:
    """Run the reference on each group; its first result holds indices into the group, made indices into the input."""
    all_boxes = boxes.cpu().float().numpy()
    all_scores = scores.cpu().float().numpy()
    order = np.argsort(groups.cpu().numpy(), kind="stable")
    parts: list[tuple[np.ndarray, ...]] = []
    for members in _split(order, groups):
        index, *rest = run(all_boxes[members], all_scores[members])
        parts.append((members[index], *rest))
    if not parts:
        return torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    return tuple(torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))


def _merged(
    run: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]], boxes: Tensor, scores: Tensor, groups: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    all_boxes = boxes.cpu().float().numpy()
    all_scores = scores.cpu().float().numpy()
    order = np.argsort(groups.cpu().numpy(), kind="stable")
    numbers = groups.cpu().numpy()
    out_boxes, out_scores = [np.zeros((0, 4), np.float32)], [np.zeros(0, np.float32)]
    out_groups = [np.zeros(0, numbers.dtype)]
    for members in _split(order, groups):
        merged_boxes, merged_scores = run(all_boxes[members], all_scores[members])
        out_boxes.append(merged_boxes)
        out_scores.append(merged_scores)
        out_groups.append(np.full(len(merged_scores), numbers[members[0]]))
    columns = (np.concatenate(out_boxes), np.concatenate(out_scores), np.concatenate(out_groups))
    merged, lowered, names = (torch.from_numpy(column).to(boxes.device) for column in columns)
    return merged, lowered, names


def _split(order: np.ndarray, groups: Tensor) -> list[np.ndarray]:
    numbers = groups.cpu().numpy()[order]
    return [part for part in np.split(order, np.flatnonzero(np.diff(numbers)) + 1) if len(part)]
