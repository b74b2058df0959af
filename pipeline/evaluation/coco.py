"""COCO's average precision and recall of boxes, exact, in pieces.

`match` needs the detections of some images and is done where they are; `accumulate` needs only what `match` returns.
Numbers equal pycocotools' to the last digit, in whatever pieces the images came.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.truth import GroundTruth

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class CocoMetrics:
    """Result of an evaluation; -1 where there is no truth to measure by, as pycocotools says it.

    values     the twelve numbers, by METRIC_NAMES
    per_class  category name -> {"AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"}
    recalls    [101] recall levels of the curves
    curves     category name -> [10, 101] precision at each IoU threshold (0.50 .. 0.95) and recall level; all areas
    """

    values: dict[str, float]
    per_class: dict[str, dict[str, float]]
    recalls: np.ndarray
    curves: dict[str, np.ndarray]

    def to_json(self) -> dict[str, Any]:
        """What `metrics.json` holds: {"coco": the twelve, "per_class": ..., "curves": AP50 and AP75 curves}."""
        raise NotImplementedError


@dataclass(frozen=True)
class Matches:
    """What accumulation needs of the detections of some images (opaque, picklable, small)."""


def match(truth: GroundTruth, detections: DetectionTable, image_ids: Sequence[int] | None = None) -> Matches:
    """Match the detections of `image_ids` (default: all images of the truth), each image in exactly one call."""
    raise NotImplementedError


def accumulate(truth: GroundTruth, matches: Iterable[Matches]) -> CocoMetrics:
    """Metrics from the matches of all images, in any order."""
    raise NotImplementedError


def evaluate_coco(
    ground_truth: GroundTruth | Mapping[str, Any] | str, detections: DetectionTable | Sequence[Mapping[str, Any]]
) -> CocoMetrics:
    """Evaluate in one process. `ground_truth` is a COCO instances dict, its file, or a GroundTruth."""
    raise NotImplementedError
