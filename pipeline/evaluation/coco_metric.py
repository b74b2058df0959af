"""COCO's average precision and recall of boxes, exact, in pieces.

`match` needs the detections of some images and is done where they are; `accumulate` needs only what `match` returns.
Numbers equal pycocotools' to the last digit, in whatever pieces the images came. T IoU thresholds, R recall levels,
K categories, A area ranges.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from refinedet.pipeline.evaluation.box_matching import (
    AREA_RANGES,
    IOU_THRESHOLDS,
    MAX_DETECTIONS,
    RECALLS,
    Matches,
    check_images_once,
    match,
)
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
_DETECTIONS_A_THREAD = 50_000


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
    """Metrics from the matches of all images, in any order.

    pycocotools' arithmetic, at the true positives alone: recall rises and precision peaks nowhere else. A curve is the
    detections of one area range, IoU threshold and category, best first; curves are numbered (a * T + t) * K + k.
    """
    matches = list(matches)
    check_images_once(truth, (part.images for part in matches))
    positives = np.sum([part.positives for part in matches], axis=0)  # [K, A]
    borders = [np.searchsorted(part.category, np.arange(len(truth.names) + 1)) for part in matches]

    def curves_of(categories: range) -> tuple[np.ndarray, np.ndarray]:
        first, last = categories.start, categories.stop
        category, score, image_id, rank, true, false = (
            np.concatenate(
                [getattr(part, name)[at[first] : at[last]] for part, at in zip(matches, borders, strict=True)]
            )
            for name in ("category", "score", "image_id", "rank", "true", "false")
        )
        order = _best_first(category, score, image_id, rank)
        return _curves(positives[first:last], category[order] - first, rank[order], true[order], false[order])

    # Categories do not meet before the means: they are shared out to threads, in which NumPy works side by side.
    shares = _shares(np.diff(np.sum(borders, axis=0)), os.cpu_count() or 1)
    with ThreadPoolExecutor(len(shares), thread_name_prefix="accumulate") as pool:
        precision, recall = zip(*pool.map(curves_of, shares), strict=True)
    return _summarize(
        truth,
        np.ascontiguousarray(np.concatenate(precision, axis=2)),
        np.ascontiguousarray(np.concatenate(recall, axis=1)),
    )


def _shares(detections: np.ndarray, most: int) -> list[range]:
    """Neighbouring categories in at most `most` shares of about as many detections, enough to be worth a thread.

    detections  [K]
    """
    total = int(detections.sum())
    count = max(1, min(most, total // _DETECTIONS_A_THREAD))
    borders = np.searchsorted(np.cumsum(detections), total * np.arange(1, count) / count) + 1
    ends = sorted({*borders.tolist(), len(detections)})
    return [range(first, last) for first, last in itertools.pairwise([0, *ends])]


def _curves(
    positives: np.ndarray, category: np.ndarray, rank: np.ndarray, true: np.ndarray, false: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Precision [T, R, K, A] at the recall levels, and recall [T, K, A, M]; -1 where there is nothing to find.

    positives  [K, A]
    others     [D] sorted by category, best first, as in Matches
    """
    column, row, before = _true_positives(category, true, false)
    num_areas, num_thresholds, num_categories = len(AREA_RANGES), len(IOU_THRESHOLDS), len(positives)
    curve = column * num_categories + category[row]
    found = np.bincount(curve, minlength=num_areas * num_thresholds * num_categories)
    start = np.cumsum(found) - found
    hits = np.arange(1, len(curve) + 1) - start[curve]
    precision = hits / (before + hits.astype(np.float64) + np.spacing(1))
    for first, last in zip(start.tolist(), (start + found).tolist(), strict=True):
        backwards = precision[first:last][::-1]
        np.maximum.accumulate(backwards, out=backwards)

    by_curve = num_areas, num_thresholds, num_categories, 1
    start, found = start.reshape(by_curve), found.reshape(by_curve)
    needed = _hits_before_recalls(positives)  # [A, 1, K, R]
    at_recall = np.append(precision, 0.0)[np.where(needed < found, start + needed, -1)]  # [A, T, K, R]
    countable = (positives.T > 0)[:, None]  # [A, 1, K]
    recalled = [np.bincount(curve[rank[row] < limit], minlength=found.size) for limit in MAX_DETECTIONS]
    recall = np.stack(recalled, -1).reshape(*by_curve[:3], len(MAX_DETECTIONS))
    recall = recall / np.maximum(positives.T, 1)[:, None, :, None]
    return (
        np.where(countable[..., None], at_recall, -1.0).transpose(1, 3, 2, 0),
        np.where(countable[..., None], recall, -1.0).transpose(1, 2, 0, 3),
    )


def _best_first(category: np.ndarray, score: np.ndarray, image_id: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """[D] the order by category, falling score, image id and rank."""
    order = np.argsort(-score)
    order = order[np.argsort(category[order], kind="stable")]
    # Sorting by all four takes five times as long; ties are few.
    same = (np.diff(score[order]) == 0) & (np.diff(category[order]) == 0)
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    rows = order[tied]
    order[tied] = rows[np.lexsort((rank[rows], image_id[rows], -score[rows], category[rows]))]
    return order


def _true_positives(
    category: np.ndarray, true: np.ndarray, false: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True positives by column a * T + t, then by row: column [N], row [N], false positives of its curve before it [N].

    category, true, false  [D] sorted by category, best first, as in Matches
    """
    num_areas, num_thresholds = len(AREA_RANGES), len(IOU_THRESHOLDS)
    start = np.searchsorted(category, np.arange(category.max(initial=-1) + 1))  # first row of each category
    # Most detections overlap no object, and are false at all thresholds of an area: those are counted once an area.
    lowest = false & np.uint64(sum(1 << area * num_thresholds for area in range(num_areas)))
    rows = np.flatnonzero((true != 0) | (lowest * np.uint64(2**num_thresholds - 1) != false))  # [S] all others
    lowest[rows] = 0
    elsewhere = np.zeros((num_areas, 1, len(false) + 1), np.int32)
    for area in range(num_areas):
        once = (lowest >> np.uint64(area * num_thresholds)) & np.uint64(1)
        np.cumsum(once, dtype=np.int32, out=elsewhere[area, 0, 1:])
    misses = np.zeros((num_areas * num_thresholds, len(rows) + 1), np.int32)
    np.cumsum(_unpack(false[rows]), axis=1, dtype=np.int32, out=misses[:, 1:])
    misses = misses.reshape(num_areas, num_thresholds, -1)
    before_category = misses[:, :, np.searchsorted(rows, start)] + elsewhere[:, :, start]
    misses = misses[:, :, 1:] + elsewhere[:, :, rows] - before_category[:, :, category[rows]]  # [A, T, S]

    hits = _unpack(true[rows])
    column, place = np.divmod(np.flatnonzero(hits), max(len(rows), 1))
    return column, rows[place], misses.reshape(hits.shape)[column, place]


def _unpack(bits: np.ndarray) -> np.ndarray:
    """[D] uint64 -> [A * T, D] bool."""
    count = len(AREA_RANGES) * len(IOU_THRESHOLDS)
    rows = np.unpackbits(bits.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, count=count, bitorder="little")
    return np.ascontiguousarray(rows.T).view(bool)


def _hits_before_recalls(positives: np.ndarray) -> np.ndarray:
    """[A, 1, K, R] true positives before the one that reaches each recall level; positives [K, A]."""
    counts, where = np.unique(positives, return_inverse=True)
    needed = [np.searchsorted(np.arange(1, count + 1) / max(count, 1), RECALLS, side="left") for count in counts]
    table = np.array(needed, np.int64).reshape(len(counts), len(RECALLS))
    return table[where.reshape(positives.shape)].transpose(1, 0, 2)[:, None]


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
