"""Evaluation and diagnosis from files alone: a file of detections and an annotation file."""

from __future__ import annotations

from refinedet.pipeline.evaluation.diagnose import diagnose
from refinedet.pipeline.evaluation.diagnosis import Diagnosis
from refinedet.pipeline.evaluation.diagnosis_examination import can_examine
from refinedet.pipeline.evaluation.metrics import evaluate, make_protocol
from refinedet.pipeline.evaluation.predictions import read_predictions
from refinedet.pipeline.evaluation.protocols import Metrics, Protocol
from refinedet.pipeline.evaluation.truth import MARKS, GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs.errors import UserError


def evaluate_files(detections: str, annotations: str, protocol: Protocol | str = "coco") -> Metrics:
    """Metrics of the file `detections` (formats: `read_predictions`) against the COCO instances file `annotations`.

    protocol  or the name of a metric, for its published one
    UserError where a file is missing, cut short or not what it should be, or where the metric does not fit the truth.
    """
    protocol = make_protocol(protocol) if isinstance(protocol, str) else protocol
    return evaluate(protocol, *read_files(detections, annotations))


def read_files(detections: str, annotations: str) -> tuple[GroundTruth, DetectionTable]:
    """The objects of an annotation file, and the detections of a file with their ids; errors as `evaluate_files`."""
    truth = GroundTruth.of(annotations)
    return truth, read_predictions(detections, truth)


def diagnose_files(truth: GroundTruth, detections: DetectionTable) -> Diagnosis:
    """The diagnosis of what `read_files` returned; UserError where it has no rule for marks of the truth."""
    if not can_examine(truth):
        marked = " and ".join(MARKS[mark] for mark in sorted(truth.marks - {"crowd", "difficult"}))
        raise UserError(f"the annotations {marked}, which the diagnosis does not support; remove --diagnose")
    return diagnose(truth, detections)
