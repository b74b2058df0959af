"""Parts of every metric: its protocol as data, its two functions, and the numbers that come out."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs.errors import UserError

COCO_IOUS: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
RECALLS: tuple[float, ...] = tuple(np.linspace(0.0, 1.0, 101).tolist())
"""levels at which precision is read from a curve, of every metric"""
COCO_AREAS = (("all", 0.0, 1e10), ("small", 0.0, 32.0**2), ("medium", 32.0**2, 96.0**2), ("large", 96.0**2, 1e10))
_BITS = 64  # a detection's outcomes, one bit for each area range and IoU


@dataclass(frozen=True)
class Protocol:
    """Protocol of a measurement. A, T, M, R: number of area ranges, IoUs, limits of detections, RECALLS.

    metric          key of METRICS
    ious            overlaps from which a detection finds an object, ascending
    areas           (name, low, high) of objects that count, square pixels, both ends included
    max_detections  of one category in one image, ascending; for lvis, of one image; empty: no limit
    """

    metric: str
    ious: tuple[float, ...] = COCO_IOUS
    areas: tuple[tuple[str, float, float], ...] = COCO_AREAS
    max_detections: tuple[int, ...] = (1, 10, 100)

    def __post_init__(self) -> None:
        checked = (
            ("ious", self.ious, 0.0, 1.0),
            ("max_detections", self.max_detections or (1,), 1, np.inf),
        )
        for name, values, low, high in checked:
            if not values or list(values) != sorted(set(values)) or not low <= values[0] <= values[-1] <= high:
                raise UserError(
                    f"{name} must be ascending numbers from {low:g} to {high:g}, received {list(values)}; give some"
                )
        if len(self.areas) * len(self.ious) > _BITS:
            raise UserError(
                f"at most {_BITS} pairs of an area range and an IoU can be measured at once, received "
                f"{len(self.areas)} x {len(self.ious)}; measure fewer"
            )

    @property
    def limit(self) -> int:
        """The most detections that count."""
        return self.max_detections[-1] if self.max_detections else sys.maxsize

    @property
    def bits(self) -> np.ndarray:
        """[A, T] uint64, one bit each."""
        count = len(self.areas) * len(self.ious)
        return (np.uint64(1) << np.arange(count, dtype=np.uint64)).reshape(len(self.areas), len(self.ious))

    def to_json(self) -> dict[str, Any]:
        """The entry "protocol" of an evaluation in metrics.json."""
        return {
            "metric": self.metric,
            "ious": [round(iou, 6) for iou in self.ious],
            "areas": [list(area) for area in self.areas],
            "max_detections": list(self.max_detections),
            "num_recalls": len(RECALLS),
        }


@dataclass(frozen=True)
class Metrics:
    """The numbers of an evaluation; -1 where there is no truth to measure by, as in pycocotools.

    values     by name; the first is the one that models are compared by
    per_class  category name -> name -> value
    curves     IoU -> category name -> [R] precision at each recall level
    """

    protocol: Protocol
    values: dict[str, float]
    per_class: dict[str, dict[str, float]]
    curves: dict[float, dict[str, np.ndarray]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """{<metric>: values, "per_class", "curves": {"recall", "precision50": {class: [...]}, ...}, "protocol"}."""
        return {
            self.protocol.metric: self.values,
            "per_class": self.per_class,
            "curves": {
                "recall": [round(level, 2) for level in RECALLS],
                **{
                    f"precision{100 * iou:.0f}": {name: curve.tolist() for name, curve in by_class.items()}
                    for iou, by_class in self.curves.items()
                },
            },
            "protocol": self.protocol.to_json(),
        }


MatchFunction = Callable[[Protocol, GroundTruth, DetectionTable, Sequence[int] | None], Any]
"""Matches the detections of some images (default: all of the truth); each image belongs in one call."""

AccumulateFunction = Callable[[Protocol, GroundTruth, Sequence[Any]], Metrics]
"""Metrics from the matches of all images."""


@dataclass(frozen=True)
class Metric:
    """One way to measure detections.

    protocol  the published one
    supports  marks of the truth that it has a rule for, of truth.MARKS
    requires  marks that the truth must have
    fixed     fields of the protocol that cannot be set
    """

    protocol: Protocol
    match: MatchFunction
    accumulate: AccumulateFunction
    supports: frozenset[str] = frozenset()
    requires: frozenset[str] = frozenset()
    fixed: frozenset[str] = frozenset()


def name_iou(name: str, iou: float) -> str:
    """AP50 of AP and 0.5."""
    return f"{name}{100 * iou:.0f}"
