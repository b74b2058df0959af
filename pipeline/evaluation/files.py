"""Evaluation from files alone: a COCO results file and an annotation file."""

from __future__ import annotations

from typing import Any

from refinedet.pipeline.evaluation.metrics import Metrics, check_rule, evaluate_by_rule
from refinedet.pipeline.evaluation.truth import GroundTruth, read_json_file
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs.errors import UserError


def evaluate_files(detections: str, annotations: str, *, rule: str = "coco") -> Metrics:
    """Metrics of the results file `detections` against the COCO instances file `annotations`.

    rule  coco; voc2007 (11 points) or voc2012 (area), which leave `difficult` (or `ignore`) annotations out
    UserError where a file is missing, cut short or not what it should be.
    """
    checked = check_rule(rule)
    truth = GroundTruth.of(annotations)
    rows: Any = read_json_file(detections, "detections")
    if not isinstance(rows, list):
        kind = "an annotation file" if isinstance(rows, dict) and "annotations" in rows else type(rows).__name__
        raise UserError(
            f"detections: {detections} holds no list of detections, received {kind}; give the results file, "
            "[{image_id, category_id, bbox, score}, ...]"
        )
    return evaluate_by_rule(checked, truth, DetectionTable.of(rows))
