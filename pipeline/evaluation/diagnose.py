"""The diagnosis of an evaluation, from what was examined where the detections were."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from refinedet.pipeline.evaluation.diagnosis import ERROR_KINDS, Diagnosis, Finding, LevelStages, Missed, WorstImage
from refinedet.pipeline.evaluation.diagnosis_charts import bin_scores, count_confusion, draw_classes, slice_objects
from refinedet.pipeline.evaluation.diagnosis_errors import (
    as_scored,
    cost_detections,
    cost_errors,
    count_objects,
    fix,
    mean_precision,
)
from refinedet.pipeline.evaluation.diagnosis_examination import (
    CORRECT,
    IOU,
    MAX_DETECTIONS,
    Examination,
    examine,
    join_examinations,
)
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable

_LISTED = 20  # worst images, misses, false alarms, suspects
_MANY_CLASSES = 100  # beyond, curves have fewer thresholds
_SUSPECTS = {"classification": "wrong class", "localization": "wrong box", "background": "missing object"}
_SUSPICIOUS_SCORE = 0.5


def diagnose(
    truth: GroundTruth, parts: Iterable[Examination] | DetectionTable, levels: tuple[LevelStages, ...] = ()
) -> Diagnosis:
    """Diagnose the detections of all images.

    parts   of `examine`, each image in one of them; or the detections themselves
    levels  of `summarize_levels`, where the detector was traced
    """
    examined = examine(truth, parts) if isinstance(parts, DetectionTable) else join_examinations(parts)
    positives = count_objects(truth, examined)
    scored = as_scored(examined, positives)
    all_fixed = mean_precision(fix(truth, examined, positives, tuple(range(len(ERROR_KINDS)))))
    step = 100 if len(truth.names) <= _MANY_CLASSES else 20
    thresholds = tuple(number / step for number in range(step))
    bins, calibration_error = bin_scores(examined)
    cost = cost_detections(examined, positives)
    confusion = count_confusion(truth, examined, positives)
    return Diagnosis(
        iou=IOU,
        max_detections=MAX_DETECTIONS,
        ap=mean_precision(scored),
        ap_all_fixed=all_fixed,
        num_images=len(examined.images),
        num_objects=int(positives.sum()),
        num_detections=len(examined.score),
        errors=cost_errors(truth, examined, positives),
        confusion=confusion,
        scores=thresholds,
        classes=draw_classes(truth, scored, thresholds),
        slices=slice_objects(truth, examined),
        levels=levels,
        num_traced=sum(sum(level.counts.values()) for level in levels),
        calibration=bins,
        calibration_error=calibration_error,
        worst_images=_worst_images(truth, examined, positives, cost, confusion.score),
        costly_misses=_misses(truth, examined, positives),
        false_alarms=tuple(_finding(truth, examined, row, cost) for row in _first(cost)),
        truth_suspects=_suspects(truth, examined, cost),
    )


def _unfound(truth: GroundTruth, examined: Examination) -> np.ndarray:
    counted = np.isin(truth.image_id, examined.images) & ~truth.crowd & ~truth.difficult
    counted[examined.found] = False
    return np.flatnonzero(counted)


def _cost_of_misses(truth: GroundTruth, objects: np.ndarray, positives: np.ndarray) -> np.ndarray:
    category = np.searchsorted(truth.category_ids, truth.category_id[objects])
    return 1 / (positives[category] * max(int((positives > 0).sum()), 1))


def _worst_images(
    truth: GroundTruth, examined: Examination, positives: np.ndarray, cost: np.ndarray, score: float
) -> tuple[WorstImage, ...]:
    """score  from which false detections are counted"""
    missed = _unfound(truth, examined)
    counted = ~truth.crowd & ~truth.difficult
    place = np.searchsorted(examined.images, examined.image_id)
    missed_place = np.searchsorted(examined.images, truth.image_id[missed])
    own = np.flatnonzero(counted & np.isin(truth.image_id, examined.images))
    size = len(examined.images)
    total = np.bincount(place, cost, size)
    total += np.bincount(missed_place, _cost_of_misses(truth, missed, positives), size)
    shown = (examined.kind != CORRECT) & ~examined.ignored & (examined.score >= score)
    wrong = np.bincount(place[shown], minlength=size)
    lost = np.bincount(missed_place, minlength=size)
    objects = np.bincount(np.searchsorted(examined.images, truth.image_id[own]), minlength=size)
    order = np.argsort(-total, kind="stable")[:_LISTED]
    return tuple(
        WorstImage(
            truth.original_id(int(examined.images[row])),
            float(total[row]),
            int(wrong[row]),
            int(lost[row]),
            int(objects[row]),
            _largest(truth, missed[missed_place == row]),
        )
        for row in order.tolist()
        if total[row] > 0
    )


def _largest(truth: GroundTruth, objects: np.ndarray) -> tuple[Missed, ...]:
    order = objects[np.argsort(-truth.area[objects], kind="stable")][:_LISTED]
    return tuple(Missed(_label(truth, one), _box(truth.bbox[one])) for one in order.tolist())


def _misses(truth: GroundTruth, examined: Examination, positives: np.ndarray) -> tuple[Finding, ...]:
    objects = _unfound(truth, examined)
    cost = _cost_of_misses(truth, objects, positives)
    order = np.lexsort((-truth.area[objects], -cost))[:_LISTED]  # of equal costs, the large ones first
    return tuple(
        Finding(
            kind="missed",
            image_id=truth.original_id(int(truth.image_id[one])),
            label=_label(truth, one),
            bbox=_box(truth.bbox[one]),
            score=None,
            cost=float(cost[place]),
        )
        for place, one in zip(order.tolist(), objects[order].tolist(), strict=True)
    )


def _suspects(truth: GroundTruth, examined: Examination, cost: np.ndarray) -> tuple[Finding, ...]:
    """Confident errors that a mistake of the truth would explain: about an object that nothing finds, or about none."""
    kinds = [ERROR_KINDS.index(kind) for kind in _SUSPECTS]
    background = examined.kind == ERROR_KINDS.index("background")
    likely = np.isin(examined.kind, kinds) & (examined.fixes | background) & ~examined.ignored
    rows = np.flatnonzero(likely & (examined.score >= _SUSPICIOUS_SCORE))
    rows = rows[np.argsort(-examined.score[rows], kind="stable")][:_LISTED]
    return tuple(_finding(truth, examined, row, cost, suspect=True) for row in rows.tolist())


def _finding(
    truth: GroundTruth, examined: Examination, row: int, cost: np.ndarray, *, suspect: bool = False
) -> Finding:
    kind, target = ERROR_KINDS[examined.kind[row]], int(examined.target[row])
    return Finding(
        kind=_SUSPECTS[kind] if suspect else kind,
        image_id=truth.original_id(int(examined.image_id[row])),
        label=truth.names[examined.category[row]],
        bbox=_box(examined.bbox[row]),
        score=float(examined.score[row]),
        cost=float(cost[row]),
        other_label=_label(truth, target) if target >= 0 else None,
        other_bbox=_box(truth.bbox[target]) if target >= 0 else None,
    )


def _first(cost: np.ndarray) -> list[int]:
    return [row for row in np.argsort(-cost, kind="stable")[:_LISTED].tolist() if cost[row] > 0]


def _label(truth: GroundTruth, one: int) -> str:
    return truth.names[int(np.searchsorted(truth.category_ids, truth.category_id[one]))]


def _box(bbox: np.ndarray) -> tuple[float, float, float, float]:
    x, y, width, height = (round(float(side), 3) for side in bbox)
    return x, y, width, height
