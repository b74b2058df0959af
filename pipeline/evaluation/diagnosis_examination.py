"""Examination of each detection and object of some images, for the diagnosis; it runs where the detections are.

D detections, G objects of the whole truth, P pairs. The categories of errors are TIDE's (Bolya et al., ECCV 2020), and
so is the matching: of each image the best detections over all categories, best first; each takes the object of its
category that it overlaps most and that is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from refinedet.pipeline.evaluation.box_matching import check_known
from refinedet.pipeline.evaluation.diagnosis import ERROR_KINDS
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable

IOU = 0.5  # a detection finds an object from here on
BACKGROUND_IOU = 0.1  # a detection concerns an object from here on
MAX_DETECTIONS = 100  # of an image
CORRECT = len(ERROR_KINDS)
_CLASSIFICATION, _LOCALIZATION, _BOTH, _DUPLICATE, _BACKGROUND = range(5)


@dataclass(frozen=True)
class Examination:
    """Detections by image, best first, and the objects they were compared with.

    images    image ids that were examined
    image_id  [D] int64
    category  [D] int16 index of the category
    score     [D] float64
    bbox      [D, 4] float32 xywh
    kind      [D] int8: index of ERROR_KINDS, or CORRECT
    ignored   [D] bool: lies in a crowd of its category, so that it is no false positive
    target    [D] int64: the object that it finds, duplicates, or is an error about; -1 for none
    fixes     [D] bool: the error that gives `target`, which nothing finds, once fixed
    found     [F] int64 objects that are found
    missed    [M] int64 objects that nothing finds and no fixed error would
    pair_detection, pair_object, pair_iou  [P] pairs of an overlap of at least IOU, whatever the category
    """

    images: np.ndarray
    image_id: np.ndarray
    category: np.ndarray
    score: np.ndarray
    bbox: np.ndarray
    kind: np.ndarray
    ignored: np.ndarray
    target: np.ndarray
    fixes: np.ndarray
    found: np.ndarray
    missed: np.ndarray
    pair_detection: np.ndarray
    pair_object: np.ndarray
    pair_iou: np.ndarray


def can_examine(truth: GroundTruth) -> bool:
    """Return whether the diagnosis has a rule for every mark of the truth; groups and federated truth have none."""
    return truth.marks <= {"crowd", "difficult"}


def examine(truth: GroundTruth, detections: DetectionTable, image_ids: Sequence[int] | None = None) -> Examination:
    """Examine the detections of `image_ids` (default: all images of the truth); each image belongs in one call."""
    images = truth.image_ids if image_ids is None else np.unique(np.asarray(image_ids, np.int64))
    check_known(truth, images, detections)
    by_image = np.argsort(truth.image_id, kind="stable")
    object_image = truth.image_id[by_image]
    order = np.lexsort((-detections.score, detections.image_id))
    image_id = detections.image_id[order]
    kept = order[np.arange(len(order)) - np.searchsorted(image_id, image_id) < MAX_DETECTIONS]
    table = detections.select(kept)
    category = np.searchsorted(truth.category_ids, table.category_id).astype(np.int16)
    object_category = np.searchsorted(truth.category_ids, truth.category_id)
    parts = []
    for image in images.tolist():
        rows = slice(*np.searchsorted(table.image_id, [image, image + 1]))
        objects = by_image[slice(*np.searchsorted(object_image, [image, image + 1]))]
        parts.append(
            _examine_image(truth, objects, object_category[objects], table.bbox[rows], category[rows], rows.start)
        )
    columns = {name: _join(parts, name) for name in _Image.__annotations__}
    return Examination(
        images=images,
        image_id=table.image_id,
        category=category,
        score=table.score,
        bbox=table.bbox.astype(np.float32),
        **columns,
    )


def join_examinations(parts: Iterable[Examination]) -> Examination:
    """One examination of all images."""
    parts = list(parts)
    columns = {one.name: np.concatenate([getattr(part, one.name) for part in parts]) for one in fields(Examination)}
    starts = np.cumsum([0] + [len(part.score) for part in parts[:-1]])
    columns["pair_detection"] = np.concatenate(
        [part.pair_detection + start for part, start in zip(parts, starts.tolist(), strict=True)]
    )
    return Examination(**columns)


@dataclass(frozen=True)
class _Image:
    """The columns of Examination that come of one image."""

    kind: np.ndarray
    ignored: np.ndarray
    target: np.ndarray
    fixes: np.ndarray
    found: np.ndarray
    missed: np.ndarray
    pair_detection: np.ndarray
    pair_object: np.ndarray
    pair_iou: np.ndarray


def _examine_image(
    truth: GroundTruth,
    objects: np.ndarray,
    object_category: np.ndarray,
    boxes: np.ndarray,
    category: np.ndarray,
    first_row: int,
) -> _Image:
    """objects: of the image, with their category indices; boxes and category: its detections, best first."""
    skipped = truth.crowd[objects] | truth.difficult[objects]
    regions, region_category = objects[skipped], object_category[skipped]
    objects, object_category = objects[~skipped], object_category[~skipped]
    iou = overlaps(boxes, truth.bbox[objects])
    same = category[:, None] == object_category[None]
    own = np.where(same, iou, 0.0)
    taken = _take(own)
    inside = overlaps(boxes, truth.bbox[regions], of_first=True) > IOU
    ignored = (taken < 0) & (inside & (category[:, None] == region_category[None])).any(1)

    kind = np.full(len(boxes), _BACKGROUND, np.int8)
    target = np.full(len(boxes), -1, np.int64)
    if len(objects):
        used = np.zeros(len(objects), bool)
        used[taken[taken >= 0]] = True
        other = np.where(same, 0.0, iou)
        rows = np.arange(len(boxes))
        best_own, best_other, best_used = own.argmax(1), other.argmax(1), (own * used).argmax(1)
        localized = (own[rows, best_own] >= BACKGROUND_IOU) & (own[rows, best_own] <= IOU)
        classified = other[rows, best_other] >= IOU
        duplicated = (own * used)[rows, best_used] >= IOU
        background = iou.max(1) <= BACKGROUND_IOU
        conditions = [taken >= 0, localized, classified, duplicated, background]
        kind = np.select(conditions, [CORRECT, _LOCALIZATION, _CLASSIFICATION, _DUPLICATE, _BACKGROUND], _BOTH).astype(
            np.int8
        )
        target = np.select(conditions, [taken, best_own, best_other, best_used, -1], -1)
        repairable = (target >= 0) & ((kind == _LOCALIZATION) | (kind == _CLASSIFICATION)) & ~used[target]
    else:
        used, repairable = np.zeros(0, bool), np.zeros(len(boxes), bool)
    fixes = np.zeros(len(boxes), bool)
    repaired, first = np.unique(target[repairable], return_index=True)  # the best detection fixes an object
    fixes[np.flatnonzero(repairable)[first]] = True
    missed = ~used
    missed[repaired] = False
    near, near_object = np.nonzero(iou >= IOU)
    return _Image(
        kind=kind,
        ignored=ignored,
        target=np.where(target >= 0, objects[target] if len(objects) else -1, -1),
        fixes=fixes,
        found=objects[used],
        missed=objects[missed],
        pair_detection=near + first_row,
        pair_object=objects[near_object],
        pair_iou=iou[near, near_object],
    )


def _take(own: np.ndarray) -> np.ndarray:
    """[D] the object that each detection, best first, takes; -1 for none. own: [D, G] IoU with its category."""
    taken = np.full(len(own), -1, np.int64)
    if not own.size:
        return taken
    free = own.copy()
    for row in np.flatnonzero(own.max(1) >= IOU).tolist():
        best = int(free[row].argmax())
        if free[row, best] >= IOU:
            taken[row] = best
            free[:, best] = 0
    return taken


def overlaps(boxes: np.ndarray, others: np.ndarray, *, of_first: bool = False) -> np.ndarray:
    """[N, M] IoU of xywh boxes, or the share of each of `boxes` that lies in each of `others`."""
    d, g = boxes.T[:, :, None], others.T[:, None]
    width = np.minimum(d[2] + d[0], g[2] + g[0]) - np.maximum(d[0], g[0])
    height = np.minimum(d[3] + d[1], g[3] + g[1]) - np.maximum(d[1], g[1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    area = d[2] * d[3]
    whole = np.broadcast_to(area, shared.shape) if of_first else area + g[2] * g[3] - shared
    return np.divide(shared, whole, out=np.zeros(shared.shape), where=whole > 0)


def _join(parts: Sequence[_Image], name: str) -> np.ndarray:
    if not parts:
        return np.zeros(0, np.int64)
    return np.concatenate([getattr(part, name) for part in parts])
