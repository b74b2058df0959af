"""Precision and recall of every category, IoU and area range, from matched detections.

pycocotools' arithmetic, at the true positives alone: recall rises and precision peaks nowhere else. A curve is the
detections of one area range, IoU and category, best first; curves are numbered (a * T + t) * K + k. T IoUs, R recall
levels, K categories, A area ranges, M limits of detections.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from refinedet.pipeline.evaluation.box_matching import MatchedDetections, check_images_once
from refinedet.pipeline.evaluation.protocols import RECALLS, Protocol
from refinedet.pipeline.evaluation.truth import GroundTruth

_DETECTIONS_A_THREAD = 50_000
_MOST_DETECTIONS_A_SHARE = 500_000  # about 400 bytes each while a share is worked on


def accumulate_curves(
    protocol: Protocol, truth: GroundTruth, matches: Sequence[MatchedDetections]
) -> tuple[np.ndarray, np.ndarray]:
    """Precision [T, R, K, A] at the recall levels, and recall [T, K, A, M]; -1 where there is nothing to find.

    Laid out in memory as pycocotools lays them out: the order of a sum decides its last digit. ValueError unless the
    matches hold every image of the truth exactly once; their order does not matter.
    """
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
        order = best_first(category, score, image_id, rank)
        return _curves(protocol, positives[first:last], category[order] - first, rank[order], true[order], false[order])

    # Categories do not meet before the means: they are shared out to threads, in which NumPy works side by side.
    shares = _shares(np.diff(np.sum(borders, axis=0)), os.cpu_count() or 1)
    with ThreadPoolExecutor(min(len(shares), os.cpu_count() or 1), thread_name_prefix="accumulate") as pool:
        precision, recall = zip(*pool.map(curves_of, shares), strict=True)
    return (
        np.ascontiguousarray(np.concatenate(precision, axis=2)),
        np.ascontiguousarray(np.concatenate(recall, axis=1)),
    )


def _shares(detections: np.ndarray, threads: int) -> list[range]:
    """Neighbouring categories in shares of about as many detections.

    A share is large enough to be worth a thread, and small enough to bound the memory of all threads.
    detections  [K]
    """
    total = int(detections.sum())
    count = max(1, min(threads, total // _DETECTIONS_A_THREAD), total // _MOST_DETECTIONS_A_SHARE)
    borders = np.searchsorted(np.cumsum(detections), total * np.arange(1, count) / count) + 1
    ends = sorted({*borders.tolist(), len(detections)})
    return [range(first, last) for first, last in itertools.pairwise([0, *ends])]


def _curves(
    protocol: Protocol,
    positives: np.ndarray,
    category: np.ndarray,
    rank: np.ndarray,
    true: np.ndarray,
    false: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Precision [T, R, K, A] at the recall levels, and recall [T, K, A, M]; -1 where there is nothing to find.

    positives  [K, A]
    others     [D] sorted by category, best first, as in Matches
    """
    num_areas, num_thresholds, num_categories = *protocol.bits.shape, len(positives)
    column, row, before = _true_positives(category, true, false, num_areas, num_thresholds)
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
    needed = _hits_before_recalls(positives, RECALLS)  # [A, 1, K, R]
    at_recall = np.append(precision, 0.0)[np.where(needed < found, start + needed, -1)]  # [A, T, K, R]
    countable = (positives.T > 0)[:, None]  # [A, 1, K]
    limits = protocol.max_detections or (protocol.limit,)
    recalled = [np.bincount(curve[rank[row] < limit], minlength=found.size) for limit in limits]
    recall = np.stack(recalled, -1).reshape(*by_curve[:3], len(recalled))
    recall = recall / np.maximum(positives.T, 1)[:, None, :, None]
    return (
        np.where(countable[..., None], at_recall, -1.0).transpose(1, 3, 2, 0),
        np.where(countable[..., None], recall, -1.0).transpose(1, 2, 0, 3),
    )


def best_first(category: np.ndarray, score: np.ndarray, image_id: np.ndarray, rank: np.ndarray) -> np.ndarray:
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
    category: np.ndarray, true: np.ndarray, false: np.ndarray, num_areas: int, num_thresholds: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True positives by column a * T + t, then by row: column [N], row [N], false positives of its curve before it [N].

    category, true, false  [D] sorted by category, best first, as in Matches
    """
    count = num_areas * num_thresholds
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
    np.cumsum(_unpack(false[rows], count), axis=1, dtype=np.int32, out=misses[:, 1:])
    misses = misses.reshape(num_areas, num_thresholds, -1)
    before_category = misses[:, :, np.searchsorted(rows, start)] + elsewhere[:, :, start]
    misses = misses[:, :, 1:] + elsewhere[:, :, rows] - before_category[:, :, category[rows]]  # [A, T, S]

    hits = _unpack(true[rows], count)
    column, place = np.divmod(np.flatnonzero(hits), max(len(rows), 1))
    return column, rows[place], misses.reshape(hits.shape)[column, place]


def _unpack(bits: np.ndarray, count: int) -> np.ndarray:
    """[D] uint64 -> [count, D] bool."""
    rows = np.unpackbits(bits.astype("<u8").view(np.uint8).reshape(-1, 8), axis=1, count=count, bitorder="little")
    return np.ascontiguousarray(rows.T).view(bool)


def _hits_before_recalls(positives: np.ndarray, recalls: Sequence[float]) -> np.ndarray:
    """[A, 1, K, R] true positives before the one that reaches each recall level; positives [K, A]."""
    counts, where = np.unique(positives, return_inverse=True)
    needed = [np.searchsorted(np.arange(1, count + 1) / max(count, 1), recalls, side="left") for count in counts]
    table = np.array(needed, np.int64).reshape(len(counts), len(recalls))
    return table[where.reshape(positives.shape)].transpose(1, 0, 2)[:, None]
