"""Diagnosis of an evaluation: the data that `metrics.json` holds under "diagnosis" of each mode, and its JSON layout.

Every dataclass here is one JSON object with the same field names. All shares, scores and APs lie in 0..1; a value that
has nothing to be computed from is null. A detection is correct where it matches an object at `iou`. Detections below
the best `max_detections` of an image are not part of the diagnosis. Image ids are those of the annotation file.

    {"single": {"coco": {...}, "per_class": {...}, "curves": {...},
                "unreadable": {"count": 1, "images": [{"image_id", "file_name", "reason"}]},
                "diagnosis": {the fields of Diagnosis}}}
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ERROR_KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
"""TIDE's six, in its order: Cls, Loc, Both, Dupe, Bkg, Miss"""

FATES = (
    "found",
    "uncovered",
    "first_regression",
    "filter",
    "second_regression",
    "classification",
    "suppression",
)
"""End of an object: detected, or the first step of the detector after which nothing of it is left.

uncovered          no anchor overlaps it, before or after the ARM's regression
first_regression   an anchor overlapped it, no refined anchor does
filter             refined anchors overlap it, the ARM's negative filter removes all of them
second_regression  anchors that survive overlap it, no box of the ADM does
classification     a box of the ADM overlaps it, its class has no score above the threshold there
suppression        a box with its class overlaps it, the top k, the NMS or the limit per image removes it
"""


@dataclass(frozen=True)
class ErrorKind:
    """One of ERROR_KINDS: how often, and how much AP fixing all of its errors (and no others) gives."""

    kind: str
    count: int
    ap_cost: float


@dataclass(frozen=True)
class Confusion:
    """Objects against detections of at least `score`, matched regardless of class; background is the last index.

    labels  K class names
    cells   [true class, detected class, count] of every pair that occurs; [K, j] is a false alarm, [i, K] a miss
    """

    score: float
    labels: tuple[str, ...]
    cells: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class ClassCurves:
    """Precision, recall and F1 of one class over `Diagnosis.scores`.

    best_score  the threshold with the highest F1, to the digit; best_f1 and the two beside it are measured there
    """

    name: str
    num_objects: int
    ap: float | None
    best_score: float | None
    best_f1: float | None
    best_precision: float | None
    best_recall: float | None
    precision: tuple[float | None, ...]
    recall: tuple[float, ...]
    f1: tuple[float | None, ...]


@dataclass(frozen=True)
class Slice:
    """Objects of one kind, with all other objects ignored."""

    name: str
    num_objects: int
    ap: float | None
    recall: float | None


@dataclass(frozen=True)
class LevelStages:
    """Objects whose best tiled anchor lies on one level, by the stage of FATES at which they end.

    stride  of the level, pixels of the network input
    counts  stage -> number of objects
    """

    stride: int
    counts: dict[str, int]


@dataclass(frozen=True)
class CalibrationBin:
    """Detections with low <= score < high (the last bin includes 1).

    score    mean score of them
    correct  share of them that is correct
    """

    low: float
    high: float
    count: int
    score: float | None
    correct: float | None


@dataclass(frozen=True)
class Missed:
    """An object that no detection finds; `bbox` xywh, pixels of the original image."""

    label: str
    bbox: tuple[float, float, float, float]


@dataclass(frozen=True)
class WorstImage:
    """An image by the errors on it, each weighted as in `Finding.cost`.

    num_false   false detections of at least the score of the confusion matrix
    num_missed  objects that no detection finds, of whatever score
    missed      the largest of them
    """

    image_id: int | str
    cost: float
    num_false: int
    num_missed: int
    num_objects: int
    missed: tuple[Missed, ...]


@dataclass(frozen=True)
class Finding:
    """One missed object, false alarm or suspected mistake of the truth.

    kind   of the error, one of ERROR_KINDS; for a suspect "missing object", "wrong class" or "wrong box"
    label  class name: of the object if missed, else of the detection
    bbox   xywh, pixels of the original image; of the object if missed, else of the detection
    score  of the detection; null for a missed object
    cost   of a false alarm, the mean AP that its removal gives (not smoothed); of a miss, its share of the mean AP
    other_label, other_bbox  of the object that it was confused with or overlaps, or null
    """

    kind: str
    image_id: int | str
    label: str
    bbox: tuple[float, float, float, float]
    score: float | None
    cost: float
    other_label: str | None = None
    other_bbox: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Findings of an evaluation besides its numbers.

    iou          overlap from which a detection is correct; `ap` is the mean over classes at this overlap
    errors       one of each of ERROR_KINDS, in that order
    ap_all_fixed AP with every error fixed: 1 where there is an object
    scores       thresholds of the curves in `classes`
    slices       "size", "aspect" and "crowding" -> slices, in ascending order
    levels       by anchor level, ascending stride; empty where the detector was not traced (detections from a file)
    num_traced   objects that `levels` counts
    calibration_error  expected calibration error: mean over detections of |score - correct| by bin
    """

    iou: float
    max_detections: int
    ap: float | None
    ap_all_fixed: float | None
    num_images: int
    num_objects: int
    num_detections: int
    errors: tuple[ErrorKind, ...]
    confusion: Confusion
    scores: tuple[float, ...]
    classes: tuple[ClassCurves, ...]
    slices: dict[str, tuple[Slice, ...]]
    levels: tuple[LevelStages, ...]
    num_traced: int
    calibration: tuple[CalibrationBin, ...]
    calibration_error: float | None
    worst_images: tuple[WorstImage, ...]
    costly_misses: tuple[Finding, ...]
    false_alarms: tuple[Finding, ...]
    truth_suspects: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and lists with the names of the fields."""
        return asdict(self)
