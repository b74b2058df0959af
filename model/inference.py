"""From predictions to detections (section IV-H), for a whole batch at once.

B images, H W their pixels, A anchors per image, C foreground classes, N rows that the ADM computed, K candidates of an
image, D most detections of an image

All shapes are known beforehand and nothing waits for the device, so that a CUDA graph can capture it;
`DetectionBatch.split` waits once, for the counts. Equal scores keep the order of the anchors, then of the classes.
"""

# torch's `tolist` is typed in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import decode_boxes
from .config import RefineDetConfig
from .filtering import select_survivors
from .ops.suppress import suppress
from .structures import DetectionBatch, Detections, Predictions


@torch.no_grad()
def detect_images(
    detector: Callable[[Tensor], Predictions], images: Iterable[Tensor], size: tuple[int, int], config: RefineDetConfig
) -> list[Detections]:
    """Find the objects of images of any sizes, in their own pixels; the one way from pictures to boxes.

    images  as in `resize_images`, on the detector's device
    size    (height, width) that each is warped to
    config  of the selection (thresholds, NMS)
    returns boxes clipped to their image; those that lie off it are excluded
    """
    shapes: list[tuple[int, int]] = []

    def noted() -> Iterator[Tensor]:
        for image in images:
            shapes.append((image.shape[-1], image.shape[-2]))
            yield image

    batch = resize_images(noted(), size)
    if not shapes:
        return []
    found = select_batch(detector(batch), config)
    sides = found.boxes.new_tensor([shape * 2 for shape in shapes])[:, None]
    boxes = found.boxes * (sides / found.boxes.new_tensor([size[1], size[0]] * 2))
    boxes = torch.minimum(boxes.clamp(min=0), sides)
    counted = torch.arange(found.scores.shape[1], device=boxes.device) < found.counts[:, None]
    whole = counted & (boxes[..., 2:] > boxes[..., :2]).all(2) & boxes.isfinite().all(2) & found.scores.isfinite()
    counts = cast(list[int], whole.sum(1).tolist())
    columns = (torch.split(part[whole], counts) for part in (boxes, found.scores, found.labels))
    return [Detections(*parts) for parts in zip(*columns, strict=True)]


def resize_images(images: Iterable[Tensor], size: tuple[int, int]) -> Tensor:
    """Warp images of any sizes to one input [B, 3, height, width], by bilinear interpolation.

    images  [3, H, W] each, RGB, 0..255; one at a time is asked for. uint8 stays uint8, rounded as images of training
    """
    warped: list[Tensor] = []
    for number, image in enumerate(images):
        if image.dim() != 3 or image.shape[0] != 3 or not image.numel():
            raise ValueError(f"image {number} must be [3, H, W], RGB, received {list(image.shape)}.")
        one = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False)
        warped.append(one if image.is_floating_point() else one.round_().to(torch.uint8))
    return torch.cat(warped) if warped else torch.zeros(0, 3, *size)


def select_detections(predictions: Predictions, config: RefineDetConfig) -> list[Detections]:
    """Detections of each image; see `select_batch`."""
    return select_batch(predictions, config).split()


@torch.no_grad()
def select_batch(predictions: Predictions, config: RefineDetConfig) -> DetectionBatch:
    """Decode twice, keep the confident, suppress within each class; boxes are not clipped to the image.

    An anchor that the ARM is sure about (negative confidence above theta) gives no detection; the ADM may have been
    computed for more rows than that (`Predictions.index` is None, or was chosen for training).
    """
    p = predictions
    scores = F.pad(p.adm_class.softmax(dim=-1), (-1, 0, 0, 1))  # without background, with a row of zeros at the end
    row, score, label = rank_candidates(scores, _row_of_anchors(p, config), config)
    boxes = decode_boxes(p.adm_box, p.row_boxes)[row]
    return DetectionBatch(*suppress(boxes, score, label, config.nms_iou, config.score_threshold, config.max_detections))


def finish_detections(boxes: Tensor, scores: Tensor, config: RefineDetConfig) -> list[Detections]:
    """Threshold, top k and NMS of an exported graph's outputs.

    boxes   [B, A, 4]  xyxy pixels, fp32
    scores  [B, A, C]  of the foreground classes, fp32
    """
    rows = torch.arange(boxes.shape[0] * boxes.shape[1], device=boxes.device).view(boxes.shape[:2])
    row, score, label = rank_candidates(F.pad(scores.flatten(0, 1), (0, 0, 0, 1)), rows, config)
    chosen = boxes.flatten(0, 1)[row]
    found = suppress(chosen, score, label, config.nms_iou, config.score_threshold, config.max_detections)
    return DetectionBatch(*found).split()


def rank_candidates(scores: Tensor, row_of: Tensor, config: RefineDetConfig) -> tuple[Tensor, Tensor, Tensor]:
    """The `pre_nms_top_k` best pairs of (anchor, class) of each image or of each of its classes, best first.

    scores   [N + 1, C]  of the rows; the last row is zeros
    row_of   [B, A]      row of each anchor, -1 where it has none
    returns  rows, scores and labels (from 1 on) of the candidates, [B, K] each
    """
    num_classes, by_class = scores.shape[1], config.pre_nms_scope == "class"
    best = scores.amax(dim=1)[row_of]
    # The best k pairs are of the k anchors whose best class scores highest.
    limit = best.shape[1] if by_class else min(best.shape[1], config.pre_nms_top_k)
    if by_class and best.device.type == "cpu":  # where nothing waits: most anchors are confident of no class
        limit = max(1, int((best > config.score_threshold).sum(dim=1).max()))
    anchor = best.sort(dim=1, descending=True, stable=True).indices[:, :limit].sort(dim=1).values
    row = row_of.gather(1, anchor)
    pairs = scores[row]
    if by_class:
        score, pair = _rank_by_class(pairs, config.pre_nms_top_k)
    else:
        score, pair = pairs.flatten(1).sort(dim=1, descending=True, stable=True)
        score, pair = score[:, : config.pre_nms_top_k], pair[:, : config.pre_nms_top_k]
    return row.gather(1, pair // num_classes), score, pair % num_classes + 1


def _rank_by_class(pairs: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The best k of each class of [B, k', C], then all of an image: scores and numbers (anchor * C + class), [B, K]."""
    num_classes = pairs.shape[2]
    score, anchor = pairs.transpose(1, 2).sort(dim=2, descending=True, stable=True)
    pair = anchor[..., :top_k] * num_classes + torch.arange(num_classes, device=pairs.device)[:, None]
    pair, order = pair.flatten(1).sort(dim=1)  # so that equal scores come in the order of the anchors
    score = score[..., :top_k].flatten(1).gather(1, order)
    score, order = score.sort(dim=1, descending=True, stable=True)
    return score, pair.gather(1, order)


def _row_of_anchors(p: Predictions, config: RefineDetConfig) -> Tensor:
    """Row of each anchor [B, A]; -1, which indexes a row of zeros, for those that have none or are filtered."""
    batch, num_anchors = p.refined.shape[:2]
    numbers = torch.arange(len(p.adm_class), device=p.refined.device)
    if p.index is None:
        row_of = numbers.view(batch, num_anchors)
    elif p.padded:
        row_of = numbers.new_full((batch * num_anchors + 1,), -1).scatter_(0, p.index, numbers)[:-1]
        row_of = row_of.view(batch, num_anchors)
    else:
        row_of = numbers.new_full((batch * num_anchors,), -1).scatter_(0, p.index, numbers).view(batch, num_anchors)
    if p.filtered or p.arm_class is None or config.filter_negatives == "training" or config.theta >= 1.0:
        return row_of
    return torch.where(select_survivors(p.arm_class, config.theta), row_of, -1)
