"""VOC's average precision: 11 points (2007) or the area under the curve (2010 on); `difficult` objects are ignored.

D detections, G objects of one class. The devkit counts inclusive pixels, sides x2 - x1 + 1; our boxes are continuous,
and a VOC object [xmin, ymin, xmax, ymax] is [xmin - 1, ymin - 1, xmax, ymax], so that the same overlaps come out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from refinedet.pipeline.evaluation.box_matching import RECALLS, check_images_once, check_known
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs.errors import UserError

VocRule = Literal["voc2007", "voc2012"]
MIN_IOU = 0.5


@dataclass(frozen=True)
class VocMetrics:
    """Average precision, mean and by class name; -1 for a class without objects, which the mean leaves out.

    recalls  [R] recall levels of the curves
    curves   class name -> [R] best precision at each recall level or above; -1 for a class without objects
    """

    rule: VocRule
    mean: float
    per_class: dict[str, float]
    recalls: np.ndarray
    curves: dict[str, np.ndarray]

    @property
    def values(self) -> dict[str, float]:
        return {"mAP": self.mean}

    def to_json(self) -> dict[str, Any]:
        """What `metrics.json` holds, laid out as COCO's."""
        return {
            self.rule: self.values,
            "per_class": {name: {"AP": value} for name, value in self.per_class.items()},
            "curves": {
                "recall": [round(level, 2) for level in self.recalls.tolist()],
                "precision50": {name: curve.tolist() for name, curve in self.curves.items()},
            },
        }


@dataclass(frozen=True)
class VocMatches:
    """What accumulation needs of the detections of some images.

    images       image ids that were looked at
    positives    [K] int64 objects that count, of each category
    category     [D] int16 index of the category
    score        [D] float64
    true, false  [D] bool: a true (false) positive; neither on a difficult object
    """

    images: np.ndarray
    positives: np.ndarray
    category: np.ndarray
    score: np.ndarray
    true: np.ndarray
    false: np.ndarray


def evaluate_voc(
    ground_truth: GroundTruth | Mapping[str, Any] | str,
    detections: DetectionTable | Sequence[Mapping[str, Any]],
    *,
    rule: VocRule = "voc2007",
) -> VocMetrics:
    """Evaluate as VOCdevkit's VOCevaldet does. Ground truth as in `evaluate_coco`, with `difficult` annotations."""
    truth = GroundTruth.of(ground_truth)
    return accumulate_voc(truth, [match_voc(truth, DetectionTable.of(detections))], rule=rule)


def match_voc(truth: GroundTruth, detections: DetectionTable, image_ids: Sequence[int] | None = None) -> VocMatches:
    """Judge the detections of `image_ids` (default: all images of the truth); each image belongs in one call.

    Raises UserError for detections of images or categories that the truth does not have.
    """
    images = truth.image_ids if image_ids is None else np.unique(np.asarray(image_ids, np.int64))
    check_known(truth, images, detections)
    wanted = np.isin(truth.image_id, images) & ~truth.crowd
    positives = np.zeros(len(truth.names), np.int64)
    true, false = np.zeros(len(detections), bool), np.zeros(len(detections), bool)
    for k, category in enumerate(truth.category_ids.tolist()):
        own = wanted & (truth.category_id == category)
        positives[k] = np.count_nonzero(~truth.difficult[own])
        rows = np.flatnonzero(detections.category_id == category)
        rows = rows[np.argsort(-detections.score[rows], kind="stable")]
        true[rows], false[rows] = _judge(
            detections.image_id[rows],
            detections.bbox[rows],
            truth.image_id[own],
            truth.bbox[own],
            truth.difficult[own],
        )
    return VocMatches(
        images=images,
        positives=positives,
        category=np.searchsorted(truth.category_ids, detections.category_id).astype(np.int16),
        score=detections.score,
        true=true,
        false=false,
    )


def accumulate_voc(truth: GroundTruth, matches: Iterable[VocMatches], *, rule: VocRule) -> VocMetrics:
    """Metrics from the matches of all images; detections of equal scores count in the order that they come in."""
    if rule not in ("voc2007", "voc2012"):
        raise UserError(f"the VOC rule must be voc2007 or voc2012, received {rule}")
    matches = list(matches)
    check_images_once(truth, (part.images for part in matches))
    positives = np.sum([part.positives for part in matches], axis=0)
    category, score, true, false = (
        np.concatenate([getattr(part, name) for part in matches]) for name in ("category", "score", "true", "false")
    )
    per_class, curves = {}, {}
    for k, name in enumerate(truth.names):
        if not positives[k]:
            per_class[name], curves[name] = -1.0, np.full(len(RECALLS), -1.0)
            continue
        rows = np.flatnonzero(category == k)
        rows = rows[np.argsort(-score[rows], kind="stable")]
        hits, misses = np.cumsum(true[rows]), np.cumsum(false[rows])
        recall = hits / positives[k]
        precision = hits / np.maximum(hits + misses, 1)
        per_class[name] = _average_precision(recall, precision, rule)
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        curves[name] = envelope[np.searchsorted(recall, RECALLS, side="left")]
    valid = [value for value in per_class.values() if value >= 0]
    return VocMetrics(rule, float(np.mean(valid)) if valid else -1.0, per_class, RECALLS, curves)


def _judge(
    image: np.ndarray,
    boxes: np.ndarray,
    object_image: np.ndarray,
    object_boxes: np.ndarray,
    difficult: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Which detections [D], best first, are true and which false positives; neither: on a difficult object.

    Each looks at the object it overlaps most, whether taken or not: a second look at one is false.
    """
    order = np.argsort(object_image, kind="stable")
    object_image, object_boxes, difficult = object_image[order], object_boxes[order], difficult[order]
    first = np.searchsorted(object_image, image, "left")
    count = np.searchsorted(object_image, image, "right") - first
    detection = np.repeat(np.arange(len(image)), count)
    target = np.repeat(first - (np.cumsum(count) - count), count) + np.arange(len(detection))
    d, g = boxes[detection].T, object_boxes[target].T
    width = np.minimum(d[0] + d[2], g[0] + g[2]) - np.maximum(d[0], g[0])
    height = np.minimum(d[1] + d[3], g[1] + g[3]) - np.maximum(d[1], g[1])
    shared = np.maximum(width, 0) * np.maximum(height, 0)
    union = d[2] * d[3] + g[2] * g[3] - shared
    overlap = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)

    by_overlap = np.lexsort((target, -overlap, detection))  # the first of equals
    rows, place = np.unique(detection[by_overlap], return_index=True)
    best = by_overlap[place]
    rows, best = rows[overlap[best] >= MIN_IOU], best[overlap[best] >= MIN_IOU]
    hard = difficult[target[best]]
    _, winner = np.unique(target[best], return_index=True)
    won = np.zeros(len(best), bool)
    won[winner] = True
    true, false = np.zeros(len(image), bool), np.ones(len(image), bool)
    true[rows[won & ~hard]] = True
    false[rows[won | hard]] = False
    return true, false


def _average_precision(recall: np.ndarray, precision: np.ndarray, rule: VocRule) -> float:
    if rule == "voc2007":
        return float(np.mean([precision[recall >= level].max(initial=0.0) for level in np.arange(11) / 10]))
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    return float(np.sum(np.diff(recall) * precision[1:]))
