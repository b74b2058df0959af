"""Evaluation from files alone: a file of detections and an annotation file."""

from __future__ import annotations

from refinedet.pipeline.evaluation.metrics import accumulate_matches, make_protocol, match_detections
from refinedet.pipeline.evaluation.predictions import read_predictions
from refinedet.pipeline.evaluation.protocols import Metrics, Protocol
from refinedet.pipeline.evaluation.truth import GroundTruth


def evaluate_files(detections: str, annotations: str, protocol: Protocol | str = "coco") -> Metrics:
    """Metrics of the file `detections` (formats: `read_predictions`) against the COCO instances file `annotations`.

    protocol  or the name of a metric, for its published one
    UserError where a file is missing, cut short or not what it should be, or where the metric does not fit the truth.
    """
    protocol = make_protocol(protocol) if isinstance(protocol, str) else protocol
    truth = GroundTruth.of(annotations)
    table = read_predictions(detections, truth)
    return accumulate_matches(protocol, truth, [match_detections(protocol, truth, table)])
