"""Every metric by name, and the functions that are the same for all of them.

A metric is one file with a `METRIC`, and one entry here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from refinedet.pipeline.config.spec import Evaluation, MetricName
from refinedet.pipeline.evaluation import coco_metric, crowdhuman_metric, lvis_metric, openimages_metric, voc_metric
from refinedet.pipeline.evaluation.protocols import Metric, Metrics, Protocol
from refinedet.pipeline.evaluation.truth import MARKS, GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs.errors import UserError

METRICS: dict[MetricName, Metric] = {
    "coco": coco_metric.METRIC,
    "voc2007": voc_metric.VOC2007,
    "voc2012": voc_metric.VOC2012,
    "lvis": lvis_metric.METRIC,
    "openimages": openimages_metric.METRIC,
    "crowdhuman": crowdhuman_metric.METRIC,
}
assert METRICS.keys() == set(get_args(MetricName)), "MetricName of config/spec.py must name these metrics"


def usual_metric(data_format: str, image_set: str | None) -> str:
    """COCO's; for a `voc` set the year's own: 11 points in 2007, the area after. `image_set` as in VOC2007/test."""
    if data_format != "voc":
        return "coco"
    return "voc2007" if image_set and image_set.startswith("VOC2007") else "voc2012"


def make_protocol(
    metric: str,
    *,
    ious: Sequence[float] | None = None,
    max_detections: Sequence[int] | None = None,
    areas: Mapping[str, tuple[float, float]] | None = None,
) -> Protocol:
    """The published protocol of a metric, with what is given in place of its own.

    ious, max_detections  ascending
    areas                 name -> (low, high), square pixels; "all" is put first where it is not given
    UserError where there is no such metric, or where the metric has no such setting.
    """
    known = _metric(metric)
    if areas is not None:
        areas = {"all": (0.0, 1e10), **areas}
    changes: dict[str, Any] = {
        "ious": None if ious is None else tuple(map(float, ious)),
        "max_detections": None if max_detections is None else tuple(max_detections),
        "areas": None if areas is None else tuple((name, *map(float, ends)) for name, ends in areas.items()),
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    if unfit := sorted(known.fixed & changes.keys()):
        raise UserError(f"{metric} has its own {' and '.join(unfit)}, which cannot be set; drop the setting")
    return replace(known.protocol, **changes)


def protocol_of(evaluation: Evaluation, data_format: str, image_set: str | None) -> Protocol:
    """The protocol of a job's `evaluation` section; by default the data set's usual metric."""
    return make_protocol(
        evaluation.metric or usual_metric(data_format, image_set),
        ious=evaluation.ious,
        max_detections=evaluation.max_detections,
        areas=evaluation.areas,
    )


def check_truth(protocol: Protocol, truth: GroundTruth) -> None:
    """UserError where the truth has marks that the metric has no rule for, or lacks those that it needs."""
    metric, marks = _metric(protocol.metric), truth.marks
    for mark in sorted(marks - metric.supports):
        fitting = [name for name, one in METRICS.items() if marks <= one.supports and one.requires <= marks]
        remedy = f"measure by {' or '.join(fitting)}" if fitting else "no metric here has rules for all of its marks"
        raise UserError(
            f"the annotations {MARKS[mark]}, which {protocol.metric} has no rule for; {remedy}, or remove the marks"
        )
    for mark in sorted(metric.requires - marks):
        raise UserError(
            f"{protocol.metric} needs annotations that {MARKS[mark]}; give such a file, or measure by another metric"
        )


def match_detections(
    protocol: Protocol, truth: GroundTruth, detections: DetectionTable, image_ids: Sequence[int] | None = None
) -> Any:
    """Match the detections of `image_ids` (default: all images of the truth); each image belongs in one call.

    Raises UserError for detections of images or categories that the truth does not have, or as `check_truth` does.
    """
    check_truth(protocol, truth)
    return _metric(protocol.metric).match(protocol, truth, detections, image_ids)


def accumulate_matches(protocol: Protocol, truth: GroundTruth, matches: Iterable[Any]) -> Metrics:
    """Metrics from what `match_detections` returned for all images, in the order of the images."""
    return _metric(protocol.metric).accumulate(protocol, truth, list(matches))


def evaluate(
    protocol: Protocol | str,
    ground_truth: GroundTruth | Mapping[str, Any] | str,
    detections: DetectionTable | Sequence[Mapping[str, Any]],
) -> Metrics:
    """Evaluate in one process.

    protocol      or the name of a metric, for its published one
    ground_truth  a COCO instances dict, its file, or a GroundTruth
    """
    protocol = make_protocol(protocol) if isinstance(protocol, str) else protocol
    truth = GroundTruth.of(ground_truth)
    return accumulate_matches(protocol, truth, [match_detections(protocol, truth, truth.table_of(detections))])


def _metric(name: str) -> Metric:
    if name not in METRICS:
        raise UserError(f"the metric must be one of {', '.join(METRICS)}, received {name}")
    return METRICS[name]
