"""Evaluation from files alone: a COCO results file and an annotation file."""

from __future__ import annotations

from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.evaluation.coco import CocoMetrics, evaluate_coco
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.truth import GroundTruth, read_json_file
from pipeline.evaluation.voc import VocMetrics, evaluate_voc


def evaluate_files(
    detections: str, annotations: str, *, rule: Literal["coco", "voc2007", "voc2012"] = "coco"
) -> CocoMetrics | VocMetrics:
    """Metrics of the results file `detections` against the COCO instances file `annotations`.

    UserError where a file is missing, cut short or not what it should be.
    """
    if rule not in ("coco", "voc2007", "voc2012"):
        raise UserError(f"the rule must be coco, voc2007 or voc2012, received {rule}")
    truth = GroundTruth.of(annotations)
    rows: Any = read_json_file(detections, "detections")
    if not isinstance(rows, list):
        kind = "an annotation file" if isinstance(rows, dict) and "annotations" in rows else type(rows).__name__
        raise UserError(
            f"detections: {detections} holds no list of detections, received {kind}; give the results file, "
            "[{image_id, category_id, bbox, score}, ...]"
        )
    table = DetectionTable.of(rows)
    return evaluate_coco(truth, table) if rule == "coco" else evaluate_voc(truth, table, rule=rule)
