"""Merging as the papers describe it, in loops over rows [x1, y1, x2, y2, score]; the reference of `model/ops/merge.py`.

Corners are inclusive pixels: a side is x2 - x1 + 1.
"""

from __future__ import annotations

import math

import numpy as np

Row = list[float]


def draw_rows(seed: int, objects: int, views: int) -> list[Row]:
    """Each object as `views` detectors would find it: boxes near it, scores of any height."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(objects):
        x, y = rng.uniform(0, 300, 2)
        width, height = np.exp(rng.uniform(2, 5, 2))
        for _ in range(views):
            moved = np.array([x, y, x + width, y + height]) + rng.normal(0, 0.12, 4) * [width, height, width, height]
            x1, x2 = sorted(moved[::2])
            y1, y2 = sorted(moved[1::2])
            rows.append([float(np.float32(value)) for value in (x1, y1, x2, y2, rng.uniform(0.02, 1))])
    return rows


def answer_by_hand(rows: list[Row]) -> dict[str, list]:
    """The result of every method, under the keys of the authors' own answers."""
    return {
        "boxes_scores": rows,
        "bbox_vote": vote(rows, soft=False),
        "soft_bbox_vote": vote(rows, soft=True),
        "soft_nms_linear": soft_nms(rows, lambda overlap: 1 - overlap if overlap > 0.3 else 1),
        "soft_nms_gaussian": soft_nms(rows, lambda overlap: math.exp(-(overlap**2) / 0.5)),
        "soft_nms_hard": soft_nms(rows, lambda overlap: 0 if overlap > 0.3 else 1),
        "nms_0.45": nms(rows, 0.45),
    }


def overlap_of(one: Row, other: Row) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0]) + 1
    height = min(one[3], other[3]) - max(one[1], other[1]) + 1
    if width <= 0 or height <= 0:
        return 0.0
    areas = [(row[2] - row[0] + 1) * (row[3] - row[1] + 1) for row in (one, other)]
    return width * height / (sum(areas) - width * height)


def nms(rows: list[Row], most: float) -> list[int]:
    kept: list[int] = []
    for index in sorted(range(len(rows)), key=lambda index: -rows[index][4]):
        if all(overlap_of(rows[index], rows[better]) <= most for better in kept):
            kept.append(index)
    return kept


def soft_nms(rows: list[Row], factor) -> list[Row]:
    """Take the best row left; multiply the scores of the others by `factor(overlap)`; forget those below 0.01."""
    left, taken = [list(row) for row in rows], []
    while left:
        best = max(left, key=lambda row: row[4])
        left.remove(best)
        taken.append(best)
        for row in left:
            row[4] *= factor(overlap_of(best, row))
        left = [row for row in left if row[4] >= 0.01]
    return taken


def vote(rows: list[Row], *, soft: bool) -> list[Row]:
    """Merge the best row left with those that overlap it by 0.45; softly, each stays with 1 - overlap of its score."""
    left, found = sorted(rows, key=lambda row: -row[4]), []
    while left:
        best = left[0]
        near = [row for row in left if overlap_of(best, row) >= 0.45]
        left = [row for row in left if overlap_of(best, row) < 0.45]
        weight = sum(row[4] for row in near)
        found.append([sum(row[side] * row[4] for row in near) / weight for side in range(4)] + [best[4]])
        if soft:
            lowered = [[*row[:4], row[4] * (1 - overlap_of(best, row))] for row in near]
            found += [row for row in lowered if row[4] >= 0.01]
    return sorted(found, key=lambda row: -row[4])
