"""Greedy non-maximum suppression of a batch, with fixed shapes (section IV-H).

B images, K candidates an image, D detections an image
"""

# torch's `register_fake` is typed in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import library

Suppressed = tuple[Tensor, Tensor, Tensor, Tensor]


def suppress(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, score_threshold: float, max_kept: int
) -> Suppressed:
    """Keep the best candidates; one goes when it overlaps a better kept one of its class by more than `iou`.

    boxes    [B, K, 4]  xyxy pixels, fp32
    scores   [B, K]     descending, fp32; those not above `score_threshold` are no candidates
    labels   [B, K]     int64
    returns  boxes [B, D, 4], scores [B, D], labels [B, D], counts [B] of the rows that are used, the others are zeros;
             D is the smaller of K and `max_kept`

    Nothing waits for the device. Where the operators are not built, `suppress_reference` runs.
    """
    run = torch.ops.refinedet.suppress if _is_ready(boxes.device) else suppress_reference
    return run(boxes, scores, labels, iou, score_threshold, max_kept)


def suppress_reference(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, score_threshold: float, max_kept: int
) -> Suppressed:
    """Same contract, in plain PyTorch: one decision after the other, of all images at once."""
    candidates = scores.shape[1]
    left = scores > score_threshold
    kept = torch.zeros_like(left)
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    for i in range(candidates):
        kept[:, i] = left[:, i] & (kept.sum(dim=1) < max_kept)
        low = torch.maximum(boxes[..., :2], boxes[:, i, None, :2])
        high = torch.minimum(boxes[..., 2:], boxes[:, i, None, 2:])
        shared = (high - low).clamp(min=0).prod(dim=-1)
        near = shared / (area + area[:, i, None] - shared) > iou
        left &= ~(kept[:, i, None] & near & (labels == labels[:, i, None]))
    count = min(max_kept, candidates)
    order = (~kept).sort(dim=1, stable=True).indices[:, :count]
    used = kept.gather(1, order)
    found = boxes.gather(1, order[..., None].expand(-1, -1, 4)) * used[..., None]
    return found, scores.gather(1, order) * used, labels.gather(1, order) * used, kept.sum(dim=1)


def _is_ready(device: torch.device) -> bool:
    if not _register():
        return False
    return device.type in ("cpu", "meta") or (device.type == "cuda" and library.runs_on_gpu(device.index or 0))


@functools.cache
def _register() -> bool:
    if not library.is_loaded():
        return False
    torch.library.register_fake("refinedet::suppress", _fake)
    return True


def _fake(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou: float, score_threshold: float, max_kept: int
) -> Suppressed:
    count = min(max_kept, scores.shape[1])
    batch = scores.shape[0]
    return (
        boxes.new_empty(batch, count, 4),
        scores.new_empty(batch, count),
        labels.new_empty(batch, count),
        labels.new_empty(batch),
    )
