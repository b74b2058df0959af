"""Cost of errors: TIDE's AP with the errors of one kind fixed, and the cost of single detections and objects.

D detections, K categories. A fixed classification or localization error becomes correct where it is the best one about
an object that nothing finds, and disappears otherwise. Other false detections disappear, missed objects do not count.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from refinedet.pipeline.evaluation.diagnosis import ERROR_KINDS, ErrorKind
from refinedet.pipeline.evaluation.diagnosis_examination import CORRECT, Examination
from refinedet.pipeline.evaluation.truth import GroundTruth

_RECALLS = np.arange(101) / 100  # as TIDE; np.linspace differs in the last digit
_CLASSIFICATION, _MISSED = ERROR_KINDS.index("classification"), ERROR_KINDS.index("missed")


@dataclass(frozen=True)
class Scored:
    """Detections that count, as a curve of precision over recall needs them; positives [K] objects."""

    category: np.ndarray
    score: np.ndarray
    correct: np.ndarray
    positives: np.ndarray


def count_objects(truth: GroundTruth, examined: Examination) -> np.ndarray:
    """[K] objects of the examined images that are to be found, by category."""
    counted = np.isin(truth.image_id, examined.images) & ~truth.crowd & ~truth.difficult
    category = np.searchsorted(truth.category_ids, truth.category_id[counted])
    return np.bincount(category, minlength=len(truth.names))


def as_scored(examined: Examination, positives: np.ndarray) -> Scored:
    """The detections as they are."""
    counts = ~examined.ignored
    return Scored(examined.category[counts], examined.score[counts], examined.kind[counts] == CORRECT, positives)


def fix(truth: GroundTruth, examined: Examination, positives: np.ndarray, kinds: tuple[int, ...]) -> Scored:
    """The detections with every error of some kinds (indices of ERROR_KINDS) fixed."""
    fixed = np.isin(examined.kind, kinds)
    kept = np.where(fixed, examined.fixes, ~examined.ignored)
    category = examined.category.astype(np.int64)
    reclassified = fixed & examined.fixes & (examined.kind == _CLASSIFICATION)
    category[reclassified] = np.searchsorted(truth.category_ids, truth.category_id[examined.target[reclassified]])
    if _MISSED in kinds:
        missed = np.searchsorted(truth.category_ids, truth.category_id[examined.missed])
        positives = positives - np.bincount(missed, minlength=len(positives))
    correct = (examined.kind == CORRECT) | fixed
    return Scored(category[kept], examined.score[kept], correct[kept], positives)


def average_precisions(scored: Scored) -> np.ndarray:
    """[K] AP by 101 recall levels; -1 for a category without objects."""
    order = np.lexsort((-scored.score, scored.category))
    category, correct = scored.category[order], scored.correct[order]
    borders = np.searchsorted(category, np.arange(len(scored.positives) + 1))
    result = np.full(len(scored.positives), -1.0)
    for k in np.flatnonzero(scored.positives > 0).tolist():
        own = correct[borders[k] : borders[k + 1]]
        hits = np.cumsum(own)
        precision = hits / np.arange(1, len(own) + 1)
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0.0)
        result[k] = envelope[np.searchsorted(hits / scored.positives[k], _RECALLS, side="left")].mean()
    return result


def mean_precision(scored: Scored) -> float | None:
    """Mean AP over the categories with objects; None without any."""
    values = average_precisions(scored)
    return float(values[values >= 0].mean()) if (values >= 0).any() else None


def cost_errors(truth: GroundTruth, examined: Examination, positives: np.ndarray) -> tuple[ErrorKind, ...]:
    """Each kind of ERROR_KINDS with its number and the AP that fixing it alone gives."""
    before = mean_precision(as_scored(examined, positives)) or 0.0
    result = []
    for index, kind in enumerate(ERROR_KINDS):
        count = len(examined.missed) if index == _MISSED else int((examined.kind == index).sum())
        after = mean_precision(fix(truth, examined, positives, (index,)))
        result.append(ErrorKind(kind, count, max((before if after is None else after) - before, 0.0)))
    return tuple(result)


def cost_detections(examined: Examination, positives: np.ndarray) -> np.ndarray:
    """[D] of a false detection, the mean AP that removing it gives (curves not smoothed); 0 of others."""
    cost = np.zeros(len(examined.score))
    rows = np.flatnonzero(~examined.ignored)
    rows = rows[np.lexsort((-examined.score[rows], examined.category[rows]))]
    borders = np.searchsorted(examined.category[rows], np.arange(len(positives) + 1))
    for k in np.flatnonzero(positives > 0).tolist():
        own = rows[borders[k] : borders[k + 1]]
        correct = examined.kind[own] == CORRECT
        place = np.arange(1, len(own) + 1)
        # One false detection fewer lifts the precision of every correct one behind it from h / n to h / (n - 1).
        gain = np.where(correct, np.cumsum(correct) / (place * np.maximum(place - 1, 1)), 0.0)
        behind = np.cumsum(gain[::-1])[::-1]
        cost[own] = np.where(correct, 0.0, behind / positives[k])
    return cost / max(int((positives > 0).sum()), 1)
