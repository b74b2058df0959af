"""COCO's average precision and recall of boxes, exact, in pieces.

`match` needs the detections of some images and is done where they are; `accumulate` needs only what `match` returns.
Numbers equal pycocotools' to the last digit, in whatever pieces the images came. T IoU thresholds, R recall levels,
K categories, A area ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.matching import (
    AREA_RANGES,
    IOU_THRESHOLDS,
    MAX_DETECTIONS,
    RECALLS,
    Matches,
    check_images_once,
    match,
)
from pipeline.evaluation.truth import GroundTruth

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class CocoMetrics:
    """Result of an evaluation; -1 where there is no truth to measure by, as pycocotools says it.

    values     the twelve numbers, by METRIC_NAMES
    per_class  category name -> {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"}
    recalls    [R] recall levels of the curves
    curves     category name -> [T, R] precision at each IoU threshold (0.50 .. 0.95) and recall level, all areas
    """

    values: dict[str, float]
    per_class: dict[str, dict[str, float]]
    recalls: np.ndarray
    curves: dict[str, np.ndarray]

    def to_json(self) -> dict[str, Any]:
        """What `metrics.json` holds: {"coco": the twelve, "per_class": ..., "curves": precision at IoU 0.5, 0.75}."""
        return {
            "coco": self.values,
            "per_class": self.per_class,
            "curves": {
                "recall": [round(level, 2) for level in self.recalls.tolist()],
                **{
                    f"precision{name}": {category: curve[row].tolist() for category, curve in self.curves.items()}
                    for name, row in (("50", 0), ("75", 5))
                },
            },
        }


def accumulate(truth: GroundTruth, matches: Iterable[Matches]) -> CocoMetrics:
    """Metrics from the matches of all images, in any order."""
    matches = list(matches)
    check_images_once(truth, (part.images for part in matches))
    positives = np.sum([part.positives for part in matches], axis=0)  # [K, A]
    category, score, image_id, rank, true, false = (
        np.concatenate([getattr(part, name) for part in matches])
        for name in ("category", "score", "image_id", "rank", "true", "false")
    )
    order = np.lexsort((rank, image_id, -score, category))
    bounds = np.searchsorted(category[order], np.arange(len(truth.names) + 1))

    num_areas, num_thresholds = len(AREA_RANGES), len(IOU_THRESHOLDS)
    precision = np.full((num_thresholds, len(RECALLS), len(truth.names), num_areas), -1.0)
    recall = np.full((num_thresholds, len(truth.names), num_areas, len(MAX_DETECTIONS)), -1.0)
    for k in range(len(truth.names)):
        rows = order[bounds[k] : bounds[k + 1]]
        ranks = rank[rows]
        for a in np.flatnonzero(positives[k]):
            hits, misses = (
                np.unpackbits(
                    ((bits[rows] >> np.uint64(a * num_thresholds)) & np.uint64(2**num_thresholds - 1))
                    .astype("<u2")
                    .view(np.uint8)
                    .reshape(-1, 2),
                    axis=1,
                    count=num_thresholds,
                    bitorder="little",
                )
                for bits in (true, false)
            )  # [D, T]
            misses = np.cumsum(misses, axis=0, dtype=np.int32)
            threshold, place = np.nonzero(hits.T)
            before = misses[place, threshold].astype(np.float64)
            starts = np.searchsorted(threshold, np.arange(num_thresholds + 1))
            levels = np.searchsorted(np.arange(1, positives[k, a] + 1) / positives[k, a], RECALLS, side="left")
            for t in range(num_thresholds):
                precision[t, :, k, a] = _precision_at_recalls(before[starts[t] : starts[t + 1]], levels)
            for m, limit in enumerate(MAX_DETECTIONS):
                counted = np.bincount(threshold[ranks[place] < limit], minlength=num_thresholds)
                recall[:, k, a, m] = counted / positives[k, a]
    return _summarize(truth, precision, recall)


def _precision_at_recalls(misses: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """[R] interpolated precision, from the number of false positives before each true one.

    pycocotools' arithmetic, at the true positives alone: recall rises and precision peaks nowhere else.
    levels  [R] how many true positives come before the one that reaches each recall level
    """
    found = len(misses)
    hits = np.arange(1, found + 1, dtype=np.float64)
    precision = hits / (misses + hits + np.spacing(1))
    envelope = np.zeros(found + 1)  # no precision where the recall is not reached
    envelope[:found] = np.maximum.accumulate(precision[::-1])[::-1]
    return envelope[np.minimum(levels, found)]


def _mean(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(np.mean(valid)) if len(valid) else -1.0


def _summarize(truth: GroundTruth, precision: np.ndarray, recall: np.ndarray) -> CocoMetrics:
    """precision [T, R, K, A], recall [T, K, A, M]."""

    def twelve(precision: np.ndarray, recall: np.ndarray) -> dict[str, float]:
        # The arrays are laid out as pycocotools lays them out: the order of a sum decides its last digit.
        values = [_mean(np.ascontiguousarray(precision[..., 0])), _mean(precision[0, ..., 0])]
        values += [_mean(precision[5, ..., 0])]
        values += [_mean(np.ascontiguousarray(precision[..., a])) for a in (1, 2, 3)]
        values += [_mean(np.ascontiguousarray(recall[..., 0, m])) for m in (0, 1, 2)]
        values += [_mean(np.ascontiguousarray(recall[..., a, 2])) for a in (1, 2, 3)]
        return dict(zip(METRIC_NAMES, values, strict=True))

    per_class = {}
    for k, name in enumerate(truth.names):
        values = twelve(precision[:, :, k : k + 1], recall[:, k : k + 1])
        per_class[name] = {key: values[key] for key in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")}
    curves = {name: precision[:, :, k, 0] for k, name in enumerate(truth.names)}
    return CocoMetrics(twelve(precision, recall), per_class, RECALLS, curves)


def evaluate_coco(
    ground_truth: GroundTruth | Mapping[str, Any] | str, detections: DetectionTable | Sequence[Mapping[str, Any]]
) -> CocoMetrics:
    """Evaluate in one process. `ground_truth` is a COCO instances dict, its file, or a GroundTruth."""
    truth = GroundTruth.of(ground_truth)
    return accumulate(truth, [match(truth, DetectionTable.of(detections))])
