"""VOC's average precision: 11 points (2007) or the area under the curve (2010 on); `difficult` objects are ignored.

D detections, G objects of one class. The devkit counts inclusive pixels, sides x2 - x1 + 1; our boxes are continuous,
and a VOC object [xmin, ymin, xmax, ymax] is [xmin - 1, ymin - 1, xmax, ymax], so that the same overlaps come out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np

from pipeline import storage
from pipeline.errors import UserError
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.matching import check_known
from pipeline.evaluation.truth import GroundTruth

Rule = Literal["voc2007", "voc2012"]


@dataclass(frozen=True)
class VocMetrics:
    """Average precision, mean and by class name; -1 for a class without objects, which the mean leaves out."""

    rule: Rule
    mean: float
    per_class: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {self.rule: {"mAP": self.mean}, "per_class": self.per_class}


def evaluate_voc(
    ground_truth: GroundTruth | Mapping[str, Any] | str,
    detections: DetectionTable | Sequence[Mapping[str, Any]],
    *,
    rule: Rule = "voc2007",
    iou: float = 0.5,
) -> VocMetrics:
    """Evaluate as VOCdevkit's VOCevaldet does. Ground truth as in `evaluate_coco`, with `difficult` annotations."""
    if rule not in ("voc2007", "voc2012"):
        raise UserError(f"the VOC rule must be voc2007 or voc2012, received {rule}")
    truth, table = GroundTruth.of(ground_truth), DetectionTable.of(detections)
    check_known(truth, truth.image_ids, table)
    per_class = {}
    for category, name in zip(truth.category_ids.tolist(), truth.names, strict=True):
        own = (truth.category_id == category) & ~truth.crowd
        rows = np.flatnonzero(table.category_id == category)
        rows = rows[np.argsort(-table.score[rows], kind="stable")]
        true, false = _judge(
            table.image_id[rows], table.bbox[rows], truth.image_id[own], truth.bbox[own], truth.difficult[own], iou
        )
        num_positives = int((~truth.difficult[own]).sum())
        per_class[name] = _average_precision(true, false, num_positives, rule) if num_positives else -1.0
    valid = [value for value in per_class.values() if value >= 0]
    return VocMetrics(rule, float(np.mean(valid)) if valid else -1.0, per_class)


def _judge(
    image: np.ndarray,
    boxes: np.ndarray,
    object_image: np.ndarray,
    object_boxes: np.ndarray,
    difficult: np.ndarray,
    iou: float,
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
    rows, best = rows[overlap[best] >= iou], best[overlap[best] >= iou]
    hard = difficult[target[best]]
    _, winner = np.unique(target[best], return_index=True)
    won = np.zeros(len(best), bool)
    won[winner] = True
    true, false = np.zeros(len(image), bool), np.ones(len(image), bool)
    true[rows[won & ~hard]] = True
    false[rows[won | hard]] = False
    return true, false


def _average_precision(true: np.ndarray, false: np.ndarray, num_positives: int, rule: Rule) -> float:
    hits, misses = np.cumsum(true), np.cumsum(false)
    recall = hits / num_positives
    precision = hits / np.maximum(hits + misses, 1)
    if rule == "voc2007":
        return float(np.mean([precision[recall >= level].max(initial=0.0) for level in np.arange(11) / 10]))
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    return float(np.sum(np.diff(recall) * precision[1:]))


def write_voc_files(
    folder: str,
    ground_truth: Mapping[str, Any],
    detections: DetectionTable | Sequence[Mapping[str, Any]],
    *,
    image_set: str = "test",
    competition: str = "comp4",
) -> tuple[str, ...]:
    """Write the devkit's result files, one a class: lines of image name, score, xmin, ymin, xmax, ymax (from 1).

    `ground_truth` is a COCO dict whose images have file names. Returns the files' names; a class without detections
    has an empty file, as the server wants it.
    """
    truth, table = GroundTruth.of(ground_truth), DetectionTable.of(detections)
    check_known(truth, truth.image_ids, table)
    stems = {int(image["id"]): PurePosixPath(str(image["file_name"])).stem for image in ground_truth["images"]}
    names = []
    for category, name in zip(truth.category_ids.tolist(), truth.names, strict=True):
        own = table.select(np.flatnonzero(table.category_id == category))
        corners = np.concatenate([own.bbox[:, :2] + 1, own.bbox[:, :2] + own.bbox[:, 2:]], 1)
        lines = [
            f"{stems[image]} {score:.6f} {box[0]:.1f} {box[1]:.1f} {box[2]:.1f} {box[3]:.1f}\n"
            for image, score, box in zip(own.image_id.tolist(), own.score.tolist(), corners.tolist(), strict=True)
        ]
        names.append(f"{competition}_det_{image_set}_{name}.txt")
        storage.write_bytes(storage.join(folder, names[-1]), "".join(lines).encode())
    return tuple(names)
