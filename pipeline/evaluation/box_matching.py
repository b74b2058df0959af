"""Matching of detections to objects, for some images, exact.

D detections, G objects, P pairs that overlap enough; T IoUs, A area ranges. A cell is one category in one image. The
order of choice is pycocotools' `evaluateImg`: best first, each detection takes the object it overlaps most (on a tie
the later one), an object that counts before an ignored one; a crowd can be taken any number of times.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from refinedet.pipeline.evaluation.protocols import Protocol
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs.errors import UserError

_PAIRS_AT_ONCE = 2**20  # bounds the memory of the IoUs, about 100 bytes a pair


@dataclass(frozen=True)
class MatchedDetections:
    """Matches of the detections of some images, as accumulation needs them.

    images      image ids that were matched
    positives   [K, A] int64 objects that count
    category    [D] int16 index of the category, ascending
    score       [D] float64
    image_id    [D] int64
    rank        [D] int32 place among the detections of its cell, best first
    true, false [D] uint64: the bit of `Protocol.bits` at [a, t] marks a true (false) positive at area range a and IoU
                t; neither where it is ignored
    """

    images: np.ndarray
    positives: np.ndarray
    category: np.ndarray
    score: np.ndarray
    image_id: np.ndarray
    rank: np.ndarray
    true: np.ndarray
    false: np.ndarray


def match_boxes(
    protocol: Protocol,
    truth: GroundTruth,
    detections: DetectionTable,
    image_ids: Sequence[int] | None = None,
    *,
    crowd: np.ndarray,
    ignored: np.ndarray,
    unpunished: np.ndarray | None = None,
) -> MatchedDetections:
    """Match the detections of `image_ids` (default: all images of the truth); each image belongs in one call.

    crowd       [G] bool of the truth's objects: regions that any number of detections may lie in
    ignored     [G] bool: objects that are neither to be found nor wrong to be found; crowds are always
    unpunished  [D] bool: detections that are ignored where they find nothing
    Raises UserError for detections of images or categories that the truth does not have.
    """
    images = truth.image_ids if image_ids is None else np.unique(np.asarray(image_ids, np.int64))
    check_known(truth, images, detections)
    low, high = np.array([area[1:] for area in protocol.areas], np.float64).T

    chosen = np.flatnonzero(np.isin(truth.image_id, images))
    cell = _cells(truth, images, truth.image_id[chosen], truth.category_id[chosen])
    order = np.argsort(cell, kind="stable")
    objects, object_cell = chosen[order], cell[order]
    area, crowd = truth.area[objects], crowd[objects]
    outside = (area[:, None] < low) | (area[:, None] > high)
    skipped_object = (crowd | ignored[objects])[:, None] | outside  # [G, A]
    positives = np.zeros((len(truth.category_ids), len(low)), np.int64)
    np.add.at(positives, object_cell // max(len(images), 1), ~skipped_object)

    cell = _cells(truth, images, detections.image_id, detections.category_id)
    order = np.lexsort((-detections.score, cell))  # stable: equal scores stay in the file's order
    cell = cell[order]
    rank = np.arange(len(cell)) - np.searchsorted(cell, cell)
    kept = rank < protocol.limit
    order, cell, rank = order[kept], cell[kept], rank[kept]
    boxes = detections.bbox[order]

    pairs = _overlapping_pairs(boxes, cell, truth.bbox[objects], object_cell, crowd, protocol.ious[0])
    contenders, taken = _take_objects(*pairs, cell, skipped_object, crowd, np.array(protocol.ious))

    area = boxes[:, 2] * boxes[:, 3]
    punished = ~((area[:, None] < low) | (area[:, None] > high))  # [D, A]
    if unpunished is not None:
        punished &= ~unpunished[order][:, None]
    # The COCO API marks a match by the object's id, so that an object with the id 0 counts as not found.
    countable = truth.annotation_id[objects] != 0
    true, false = _mark_detections(protocol.bits, contenders, taken, punished, skipped_object, countable)
    return MatchedDetections(
        images=images,
        positives=positives,
        category=(cell // max(len(images), 1)).astype(np.int16),
        score=detections.score[order],
        image_id=detections.image_id[order],
        rank=rank.astype(np.int32),
        true=true,
        false=false,
    )


def _cells(truth: GroundTruth, images: np.ndarray, image_id: np.ndarray, category_id: np.ndarray) -> np.ndarray:
    """Numbers of the pairs of category and image, by category first; `images` ascending."""
    return np.searchsorted(truth.category_ids, category_id) * len(images) + np.searchsorted(images, image_id)


def check_images_once(truth: GroundTruth, parts: Iterable[np.ndarray]) -> None:
    """ValueError unless the image ids of `parts` are the truth's, each exactly once."""
    unique, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *parts]), return_counts=True)
    if (counts > 1).any() or not np.array_equal(unique, truth.image_ids):
        twice, missing = int((counts > 1).sum()), len(np.setdiff1d(truth.image_ids, unique))
        raise ValueError(
            f"every image must be matched exactly once: {twice} came more than once, {missing} of "
            f"{len(truth.image_ids)} are missing"
        )


def check_known(truth: GroundTruth, images: np.ndarray, detections: DetectionTable) -> None:
    """UserError, naming the row, where detections are of other images or categories than the truth's."""
    for field, values, known, remedy in (
        ("image_id", detections.image_id, images, "evaluate against the annotations of the images it was run on"),
        (
            "category_id",
            detections.category_id,
            truth.category_ids,
            "use the annotation file's own category ids, which need not be 1, 2, 3 ...",
        ),
    ):
        unknown = ~np.isin(values, known)
        if unknown.any():
            row = int(unknown.argmax())
            raise UserError(
                f"detections, row {row}: {field} {values[row]} is not among the {len(known)} of the annotations "
                f"({unknown.sum()} rows like it); {remedy}"
            )


def _overlapping_pairs(
    boxes: np.ndarray,
    cell: np.ndarray,
    object_boxes: np.ndarray,
    object_cell: np.ndarray,
    crowd: np.ndarray,
    lowest_iou: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (detection [P], object [P], IoU [P]) of one cell that reach the lowest threshold, detections ascending.

    The IoU with a crowd is the share of the detection that lies in it. In float64 and in the order of operations of
    the COCO API, so that no digit differs.
    """
    first = np.searchsorted(object_cell, cell, "left")
    count = np.searchsorted(object_cell, cell, "right") - first
    ends = np.cumsum(count)
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    start = 0
    while start < len(cell):
        stop = int(np.searchsorted(ends, (ends[start - 1] if start else 0) + _PAIRS_AT_ONCE, "right"))
        stop = max(stop, start + 1)
        part = count[start:stop]
        detection = np.repeat(np.arange(start, stop), part)
        target = np.repeat(first[start:stop] - (np.cumsum(part) - part), part) + np.arange(len(detection))
        d, g = boxes[detection].T, object_boxes[target].T
        width = np.minimum(d[2] + d[0], g[2] + g[0]) - np.maximum(d[0], g[0])
        height = np.minimum(d[3] + d[1], g[3] + g[1]) - np.maximum(d[1], g[1])
        inner = np.flatnonzero((width > 0) & (height > 0))
        detection, target, d, g = detection[inner], target[inner], d[:, inner], g[:, inner]
        shared = width[inner] * height[inner]
        area, object_area = d[2] * d[3], g[2] * g[3]
        iou = shared / np.where(crowd[target], area, area + object_area - shared)
        near = iou >= min(lowest_iou, 1 - 1e-10)
        found.append((detection[near], target[near], iou[near]))
        start = stop
    if not found:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0)
    detection, target, iou = (np.concatenate(column) for column in zip(*found, strict=True))
    return detection, target, iou


def _take_objects(
    detection: np.ndarray,
    target: np.ndarray,
    iou: np.ndarray,
    cell: np.ndarray,
    ignored: np.ndarray,
    crowd: np.ndarray,
    ious: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the object that each contending detection takes.

    returns  contenders [D'] detections with a pair, and [D', A, T] the object each takes, -1 for none
    """
    order = np.lexsort((target, iou, detection))  # the last available pair of a detection is its best
    detection, target, iou = detection[order], target[order], iou[order]
    contenders, first, count = np.unique(detection, return_index=True, return_counts=True)
    taken = np.full((len(contenders), ignored.shape[1], len(ious)), -1, np.int64)
    free = np.ones((*ignored.shape, len(ious)), bool)
    # Cells are independent of each other: their first contenders choose together, then their second, ...
    turn = np.arange(len(contenders)) - np.searchsorted(cell[contenders], cell[contenders])
    for now in range(turn.max(initial=-1) + 1):
        choosing = np.flatnonzero(turn == now)
        starts = np.cumsum(count[choosing]) - count[choosing]
        pairs = np.repeat(first[choosing] - starts, count[choosing]) + np.arange(count[choosing].sum())
        objects = target[pairs]
        available = (free[objects] | crowd[objects][:, None, None]) & (
            iou[pairs][:, None, None] >= np.minimum(ious, 1 - 1e-10)
        )
        preference = np.arange(1, len(pairs) + 1)[:, None] + np.where(ignored[objects], 0, len(pairs))  # [P, A]
        best = np.maximum.reduceat(np.where(available, preference[:, :, None], 0), starts, axis=0)
        choice = np.where(best > 0, objects[(best - 1) % len(pairs)], -1)
        taken[choosing] = choice
        _, area, threshold = indices = np.nonzero(choice >= 0)
        free[choice[indices], area, threshold] = False
    return contenders, taken


def _mark_detections(
    bits: np.ndarray,
    contenders: np.ndarray,
    taken: np.ndarray,
    punished: np.ndarray,
    skipped_object: np.ndarray,
    countable: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bits of true and of false positives, both uint64 [D]; see `MatchedDetections`.

    punished        [D, A] detections that are wrong where they find nothing
    skipped_object  [G, A] objects whose finders are ignored
    countable       [G] objects that can be found at all
    """
    true = np.zeros(len(punished), np.uint64)
    false = (punished * bits.sum(1)).sum(1, dtype=np.uint64)  # as if nothing was found
    if len(contenders):
        found = (taken >= 0) & countable[taken]
        skipped = (taken >= 0) & skipped_object[taken, np.arange(bits.shape[0])[:, None]]
        skipped |= ~found & ~punished[contenders][:, :, None]
        true[contenders] = ((found & ~skipped) * bits).sum((1, 2), dtype=np.uint64)
        false[contenders] = ((~found & ~skipped) * bits).sum((1, 2), dtype=np.uint64)
    return true, false
