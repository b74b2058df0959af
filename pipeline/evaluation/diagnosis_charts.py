"""The parts of a diagnosis that are drawn: confusion, curves over confidence, slices, calibration.

D detections, K categories
"""

from __future__ import annotations

import numpy as np
from refinedet.pipeline.evaluation.diagnosis import CalibrationBin, ClassCurves, Confusion, Slice
from refinedet.pipeline.evaluation.diagnosis_errors import Scored, average_precisions
from refinedet.pipeline.evaluation.diagnosis_examination import CORRECT, Examination
from refinedet.pipeline.evaluation.truth import GroundTruth

_SIZES = (("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, np.inf))
_ASPECTS = (("very tall", 0.0, 1 / 3), ("tall", 1 / 3, 3 / 4), ("square", 3 / 4, 4 / 3), ("wide", 4 / 3, 3.0))
_ASPECTS += (("very wide", 3.0, np.inf),)
_CROWDING = (("1 object", 0.0, 2.0), ("2 to 4", 2.0, 5.0), ("5 to 9", 5.0, 10.0), ("10 to 19", 10.0, 20.0))
_CROWDING += (("20 and more", 20.0, np.inf),)
_BINS = 10


def best_threshold(
    scores: np.ndarray, correct: np.ndarray, num_objects: int
) -> tuple[float, float, float, float] | None:
    """(score, F1, precision, recall) of the threshold with the highest F1; None without detections or objects."""
    if not len(scores) or not num_objects:
        return None
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(correct[order])
    f1 = 2 * hits / (np.arange(1, len(hits) + 1) + num_objects)
    last = np.append(np.diff(scores[order]) != 0, True)  # a threshold cuts between different scores only
    best = int(np.where(last, f1, -1.0).argmax())
    return float(scores[order][best]), float(f1[best]), float(hits[best] / (best + 1)), float(hits[best] / num_objects)


def count_confusion(truth: GroundTruth, examined: Examination, positives: np.ndarray) -> Confusion:
    """Objects against detections from the score of the best F1 over all classes on; pairs by falling IoU, each once."""
    counts = ~examined.ignored
    best = best_threshold(examined.score[counts], examined.kind[counts] == CORRECT, int(positives.sum()))
    score = best[0] if best else 0.0
    confident = examined.score >= score
    pairs = np.flatnonzero(confident[examined.pair_detection])
    pairs = pairs[np.argsort(-examined.pair_iou[pairs], kind="stable")]
    detection_of: dict[int, int] = {}
    used: set[int] = set()
    for row, target in zip(examined.pair_detection[pairs].tolist(), examined.pair_object[pairs].tolist(), strict=True):
        if target not in detection_of and row not in used:
            detection_of[target] = row
            used.add(row)
    background = len(truth.names)
    objects = np.flatnonzero(np.isin(truth.image_id, examined.images) & ~truth.crowd & ~truth.difficult)
    true = np.searchsorted(truth.category_ids, truth.category_id[objects])
    rows = np.array([detection_of.get(target, -1) for target in objects.tolist()], np.int64)
    seen = (
        np.where(rows >= 0, examined.category[rows], background)
        if len(examined.score)
        else np.full(len(rows), background)
    )
    alone = np.flatnonzero(confident & counts)
    alone = alone[~np.isin(alone, np.fromiter(used, np.int64, len(used)))]
    cells = np.concatenate(
        [np.stack([true, seen], 1), np.stack([np.full(len(alone), background), examined.category[alone]], 1)]
    ).astype(np.int64)
    cells, number = np.unique(cells, axis=0, return_counts=True)
    table = [(int(row), int(column), int(n)) for (row, column), n in zip(cells.tolist(), number, strict=True)]
    return Confusion(score, truth.names, tuple(table))


def draw_classes(truth: GroundTruth, scored: Scored, thresholds: tuple[float, ...]) -> tuple[ClassCurves, ...]:
    """Precision, recall and F1 of every class at the thresholds."""
    values = average_precisions(scored)
    order = np.lexsort((-scored.score, scored.category))
    borders = np.searchsorted(scored.category[order], np.arange(len(truth.names) + 1))
    result = []
    for k, name in enumerate(truth.names):
        own = order[borders[k] : borders[k + 1]]
        objects = int(scored.positives[k])
        hits = np.append(0, np.cumsum(scored.correct[own]))
        kept = np.searchsorted(-scored.score[own], -np.array(thresholds), side="right")
        found = hits[kept]
        best = best_threshold(scored.score[own], scored.correct[own], objects) or (None,) * 4
        result.append(
            ClassCurves(
                name=name,
                num_objects=objects,
                ap=float(values[k]) if objects else None,
                best_score=best[0],
                best_f1=best[1],
                best_precision=best[2],
                best_recall=best[3],
                precision=tuple(
                    round(f / n, 4) if n else None for f, n in zip(found.tolist(), kept.tolist(), strict=True)
                ),
                recall=tuple(round(f / max(objects, 1), 4) for f in found.tolist()),
                f1=tuple(
                    round(2 * f / (n + objects), 4) if n and objects else None
                    for f, n in zip(found.tolist(), kept.tolist(), strict=True)
                ),
            )
        )
    return tuple(result)


def slice_objects(truth: GroundTruth, examined: Examination) -> dict[str, tuple[Slice, ...]]:
    """AP and recall by size (the annotation's area), aspect (width / height) and objects in the image.

    Detections of objects outside a slice are ignored; false ones count in the slice that their own box lies in.
    """
    counted = ~truth.crowd & ~truth.difficult & np.isin(truth.image_id, examined.images)
    image, objects = np.unique(truth.image_id[counted], return_counts=True)

    def crowding(image_id: np.ndarray) -> np.ndarray:
        place = np.minimum(np.searchsorted(image, image_id), max(len(image) - 1, 0))
        return np.where(image[place] == image_id, objects[place], 0) if len(image) else np.zeros(len(image_id))

    width, height = examined.bbox[:, 2].astype(float), examined.bbox[:, 3].astype(float)
    measures = {
        "size": (_SIZES, truth.area, width * height),
        "aspect": (_ASPECTS, _ratio(truth.bbox[:, 2], truth.bbox[:, 3]), _ratio(width, height)),
        "crowding": (_CROWDING, crowding(truth.image_id), crowding(examined.image_id)),
    }
    return {
        name: tuple(_slice(truth, examined, counted, one, of_object, of_box) for one in slices)
        for name, (slices, of_object, of_box) in measures.items()
    }


def _slice(
    truth: GroundTruth,
    examined: Examination,
    counted: np.ndarray,
    one: tuple[str, float, float],
    of_object: np.ndarray,
    of_box: np.ndarray,
) -> Slice:
    name, low, high = one
    objects = counted & (of_object >= low) & (of_object < high)
    category = np.searchsorted(truth.category_ids, truth.category_id[objects])
    correct = examined.kind == CORRECT
    inside = (of_box >= low) & (of_box < high) & ~correct & ~examined.ignored
    inside |= correct & objects[examined.target] if len(truth) else correct
    positives = np.bincount(category, minlength=len(truth.names))
    values = average_precisions(Scored(examined.category[inside], examined.score[inside], correct[inside], positives))
    total = int(objects.sum())
    found = int(objects[examined.found].sum()) if len(truth) else 0
    ap = float(values[values >= 0].mean()) if (values >= 0).any() else None
    return Slice(name, total, ap, found / total if total else None)


def bin_scores(examined: Examination) -> tuple[tuple[CalibrationBin, ...], float | None]:
    """Bins of equal width, and the expected calibration error."""
    counts = ~examined.ignored
    score, correct = examined.score[counts], examined.kind[counts] == CORRECT
    place = np.clip((score * _BINS).astype(int), 0, _BINS - 1)
    bins, error = [], 0.0
    for number in range(_BINS):
        own = place == number
        count = int(own.sum())
        mean, share = (float(score[own].mean()), float(correct[own].mean())) if count else (None, None)
        bins.append(CalibrationBin(number / _BINS, (number + 1) / _BINS, count, mean, share))
        if mean is not None and share is not None:
            error += count * abs(mean - share)
    return tuple(bins), error / len(score) if len(score) else None


def _ratio(width: np.ndarray, height: np.ndarray) -> np.ndarray:
    return np.divide(width, height, out=np.full(len(width), 1.0), where=height > 0)
