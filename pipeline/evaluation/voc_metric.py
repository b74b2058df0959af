"""VOC's average precision, as VOCdevkit's VOCevaldet and VOCap calculate it; `difficult` objects are ignored.

D detections, G objects of one class, T IoUs. The devkit counts inclusive pixels, sides x2 - x1 + 1, from 1. Our boxes
are continuous, from 0: a VOC object [xmin, ymin, xmax, ymax] is [xmin - 1, ymin - 1, xmax, ymax] here. Overlaps are
calculated from the devkit's corners in the devkit's order of operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from refinedet.pipeline.evaluation.box_matching import check_images_once, check_known
from refinedet.pipeline.evaluation.protocols import COCO_AREAS, RECALLS, Metric, Metrics, Protocol, name_iou
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable

# The devkit's 0:0.1:1: multiples of the step, so that the fourth is 0.30000000000000004 and a recall of 0.3 below it.
ELEVEN_POINTS = tuple(0.1 * k for k in range(11))


@dataclass(frozen=True)
class BestObjectMatches:
    """Detections that were each compared with the one object they overlap most.

    images       image ids that were matched
    positives    [K] int64 objects that count, of each category
    category     [D] int16 index of the category
    score        [D] float64
    true, false  [T, D] bool: a true (false) positive; neither where it is ignored
    """

    images: np.ndarray
    positives: np.ndarray
    category: np.ndarray
    score: np.ndarray
    true: np.ndarray
    false: np.ndarray


def match_best_objects(
    protocol: Protocol,
    truth: GroundTruth,
    detections: DetectionTable,
    image_ids: Sequence[int] | None,
    *,
    groups: np.ndarray | None = None,
) -> BestObjectMatches:
    """Compare each detection with the object of its class that it overlaps most, taken or not.

    groups  [G] bool: objects that are regions; a detection that finds nothing and lies in one by an IoU's share of its
            own area is ignored
    Raises UserError for detections of images or categories that the truth does not have.
    """
    images = truth.image_ids if image_ids is None else np.unique(np.asarray(image_ids, np.int64))
    check_known(truth, images, detections)
    groups = np.zeros(len(truth), bool) if groups is None else groups
    wanted = np.isin(truth.image_id, images)
    positives = np.zeros(len(truth.names), np.int64)
    true, false = (np.zeros((len(protocol.ious), len(detections)), bool) for _ in range(2))
    kept = np.ones(len(detections), bool)
    for k, category in enumerate(truth.category_ids.tolist()):
        own = np.flatnonzero(wanted & (truth.category_id == category))
        own = own[np.argsort(truth.image_id[own], kind="stable")]
        single, region = own[~groups[own]], own[groups[own]]
        positives[k] = np.count_nonzero(~truth.difficult[single])
        rows = np.flatnonzero(detections.category_id == category)
        rows = rows[np.argsort(-detections.score[rows], kind="stable")]
        beyond = _rank_in_image(detections.image_id[rows]) >= protocol.limit
        kept[rows[beyond]] = False
        rows = rows[~beyond]
        found, wrong, matched = _compare(protocol, detections, rows, truth, single)
        if len(region):
            wrong &= matched | ~_lies_in(protocol, detections, rows, truth, region)
        true[:, rows], false[:, rows] = found, wrong
    return BestObjectMatches(
        images=images,
        positives=positives,
        category=np.searchsorted(truth.category_ids, detections.category_id[kept]).astype(np.int16),
        score=detections.score[kept],
        true=true[:, kept],
        false=false[:, kept],
    )


def accumulate_best_objects(
    protocol: Protocol,
    truth: GroundTruth,
    matches: Sequence[BestObjectMatches],
    average: Callable[[np.ndarray, np.ndarray], float],
) -> Metrics:
    """Metrics from the matches of all images; detections of equal scores count in the order that they come in.

    average  AP of a class from recall [D] and precision [D], best detection first
    """
    check_images_once(truth, (part.images for part in matches))
    positives = np.sum([part.positives for part in matches], axis=0)
    category, score = (np.concatenate([getattr(part, name) for part in matches]) for name in ("category", "score"))
    true, false = (np.concatenate([getattr(part, name) for part in matches], axis=1) for name in ("true", "false"))
    table = np.full((len(protocol.ious), len(truth.names)), -1.0)
    curves = {iou: {} for iou in protocol.ious}
    for k, name in enumerate(truth.names):
        rows = np.flatnonzero(category == k)
        rows = rows[np.argsort(-score[rows], kind="stable")]
        for t, iou in enumerate(protocol.ious):
            curves[iou][name] = np.full(len(RECALLS), -1.0)
            if not positives[k]:
                continue
            hits, misses = np.cumsum(true[t, rows]), np.cumsum(false[t, rows])
            recall, precision = hits / positives[k], hits / np.maximum(hits + misses, 1)
            table[t, k] = average(recall, precision)
            envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
            curves[iou][name] = envelope[np.searchsorted(recall, RECALLS, side="left")]
    several = protocol.ious if len(protocol.ious) > 1 else ()
    values = {"mAP": _mean(table)}
    values |= {name_iou("mAP", iou): _mean(table[t]) for t, iou in enumerate(several)}
    per_class = {}
    for k, name in enumerate(truth.names):
        per_class[name] = {"AP": _mean(table[:, k])}
        per_class[name] |= {name_iou("AP", iou): float(table[t, k]) for t, iou in enumerate(several)}
    return Metrics(protocol, values, per_class, curves)


def area_under_curve(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOCap: the area under the curve whose precision is the best at that recall or above (2010 on)."""
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    return float(np.sum(np.diff(recall) * precision[1:]))


def mean_of_eleven_points(recall: np.ndarray, precision: np.ndarray) -> float:
    """VOCevaldet of 2007: the mean of the best precision at ELEVEN_POINTS of recall or above."""
    total = 0.0
    for level in ELEVEN_POINTS:
        total += precision[recall >= level].max(initial=0.0) / 11
    return float(total)


def _compare(
    protocol: Protocol, detections: DetectionTable, rows: np.ndarray, truth: GroundTruth, objects: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return which detections, best first, are true [T, D] and false positives [T, D], and which reach the IoU [T, D].

    objects  ascending by image
    """
    ious = np.array(protocol.ious)[:, None]
    detection, target = _pairs(detections.image_id[rows], truth.image_id[objects])
    d, g = _corners(detections.bbox[rows[detection]]), _corners(truth.bbox[objects[target]])
    width = np.minimum(d[2], g[2]) - np.maximum(d[0], g[0]) + 1
    height = np.minimum(d[3], g[3]) - np.maximum(d[1], g[1]) + 1
    inner = (width > 0) & (height > 0)
    shared = width * height
    union = (d[2] - d[0] + 1) * (d[3] - d[1] + 1) + (g[2] - g[0] + 1) * (g[3] - g[1] + 1) - shared
    overlap = np.divide(shared, union, out=np.full(len(shared), -1.0), where=inner & (union > 0))
    by_overlap = np.lexsort((target, -overlap, detection))  # the first of equals
    contender, place = np.unique(detection[by_overlap], return_index=True)
    best = by_overlap[place]
    difficult = truth.difficult[objects[target[best]]]
    true, matched = (np.zeros((len(ious), len(rows)), bool) for _ in range(2))
    ignored = np.zeros_like(true)
    for t, iou in enumerate(protocol.ious):
        reaches = overlap[best] >= iou
        hits = contender[reaches]
        _, winner = np.unique(target[best][reaches], return_index=True)
        won = np.zeros(len(hits), bool)
        won[winner] = True
        hard = difficult[reaches]
        true[t, hits[won & ~hard]] = True
        ignored[t, hits[hard]] = True
        matched[t, hits] = True
    return true, ~true & ~ignored, matched


def _lies_in(
    protocol: Protocol, detections: DetectionTable, rows: np.ndarray, truth: GroundTruth, regions: np.ndarray
) -> np.ndarray:
    """[T, D] whether a share of the detection's own area, at least the IoU, lies in one of the regions."""
    detection, target = _pairs(detections.image_id[rows], truth.image_id[regions])
    d, g = detections.bbox[rows[detection]].T, truth.bbox[regions[target]].T
    width = np.minimum(d[0] + d[2], g[0] + g[2]) - np.maximum(d[0], g[0])
    height = np.minimum(d[1] + d[3], g[1] + g[3]) - np.maximum(d[1], g[1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    share = np.divide(shared, d[2] * d[3], out=np.zeros(len(shared)), where=d[2] * d[3] > 0)
    largest = np.zeros(len(rows))
    np.maximum.at(largest, detection, share)
    return largest >= np.array(protocol.ious)[:, None]


def _pairs(image: np.ndarray, object_image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every (detection, object) of one image; object_image ascending."""
    first = np.searchsorted(object_image, image, "left")
    count = np.searchsorted(object_image, image, "right") - first
    detection = np.repeat(np.arange(len(image)), count)
    return detection, np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(detection))


def _corners(boxes: np.ndarray) -> np.ndarray:
    """xywh, continuous -> [4, N] inclusive pixels from 1."""
    return np.concatenate([boxes[:, :2] + 1, boxes[:, :2] + boxes[:, 2:]], 1).T


def _rank_in_image(image: np.ndarray) -> np.ndarray:
    """[D] place of each detection, best first, among those of its image."""
    order = np.argsort(image, kind="stable")
    rank = np.empty(len(image), np.int64)
    rank[order] = np.arange(len(image)) - np.searchsorted(image[order], image[order])
    return rank


def _mean(values: np.ndarray) -> float:
    valid = values[values >= 0]
    return float(np.mean(valid)) if len(valid) else -1.0


def _voc(name: str, average: Callable[[np.ndarray, np.ndarray], float]) -> Metric:
    protocol = Protocol(name, ious=(0.5,), areas=COCO_AREAS[:1], max_detections=())
    return Metric(
        protocol,
        match_best_objects,
        lambda protocol, truth, matches: accumulate_best_objects(protocol, truth, matches, average),
        supports=frozenset({"difficult"}),
        fixed=frozenset({"areas"}),
    )


VOC2007 = _voc("voc2007", mean_of_eleven_points)
VOC2012 = _voc("voc2012", area_under_curve)
