"""Evaluation and diagnosis from files alone: a file of detections and an annotation file."""

from __future__ import annotations

from refinedet.pipeline.evaluation.diagnose import diagnose
from refinedet.pipeline.evaluation.diagnosis import Diagnosis
from refinedet.pipeline.evaluation.diagnosis_examination import can_examine
from refinedet.pipeline.evaluation.predictions import read_predictions
from refinedet.pipeline.evaluation.truth import MARKS, GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs.errors import UserError


def read_files(detections: str, annotations: str) -> tuple[GroundTruth, DetectionTable]:
    """The objects of a COCO instances file, and the detections of a file (formats: `read_predictions`) with their ids.

    UserError where a file is missing, cut short or not what it should be.
    """
    truth = GroundTruth.of(annotations)
    return truth, read_predictions(detections, truth)


def diagnose_files(truth: GroundTruth, detections: DetectionTable) -> Diagnosis:
    """The diagnosis of what `read_files` returned; UserError where it has no rule for marks of the truth."""
    if not can_examine(truth):
        marked = " and ".join(MARKS[mark] for mark in sorted(truth.marks - {"crowd", "difficult"}))
        raise UserError(f"the annotations {marked}, which the diagnosis does not support; remove --diagnose")
    return diagnose(truth, detections)
