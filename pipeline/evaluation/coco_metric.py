"""COCO's average precision and recall of boxes: pycocotools' numbers to the last digit, in whatever chunks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from refinedet.pipeline.evaluation.box_matching import MatchedDetections, match_boxes
from refinedet.pipeline.evaluation.curves import accumulate_curves
from refinedet.pipeline.evaluation.protocols import Metric, Metrics, Protocol, name_iou
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable

_NAMED_IOUS = (0.5, 0.75)  # have a number and curves of their own


def _match(
    protocol: Protocol, truth: GroundTruth, detections: DetectionTable, image_ids: Sequence[int] | None
) -> MatchedDetections:
    return match_boxes(protocol, truth, detections, image_ids, crowd=truth.crowd, ignored=truth.crowd)


def _accumulate(protocol: Protocol, truth: GroundTruth, matches: Sequence[MatchedDetections]) -> Metrics:
    precision, recall = accumulate_curves(protocol, truth, matches)
    per_class = {}
    last = f"AR{protocol.max_detections[-1]}"
    for k, name in enumerate(truth.names):
        values = average_precision(protocol, precision[:, :, k : k + 1])
        recalls = _average_recall(protocol, recall[:, k : k + 1])
        per_class[name] = {**values, last: recalls[last]}
    values = {**average_precision(protocol, precision), **_average_recall(protocol, recall)}
    return Metrics(protocol, values, per_class, curves_by_iou(protocol, truth, precision))


def average_precision(protocol: Protocol, precision: np.ndarray) -> dict[str, float]:
    """AP, AP at the named IoUs, and AP of each area range but the first; precision [T, R, K, A]."""
    values = {"AP": mean(np.ascontiguousarray(precision[..., 0]))}
    values |= {name_iou("AP", iou): mean(precision[row, ..., 0]) for row, iou in _named_rows(protocol)}
    for place, (name, *_) in enumerate(protocol.areas[1:], start=1):
        values[f"AP{_short(name)}"] = mean(np.ascontiguousarray(precision[..., place]))
    return values


def _average_recall(protocol: Protocol, recall: np.ndarray) -> dict[str, float]:
    """AR at each limit of detections, and of each area range at the last; recall [T, K, A, M]."""
    values = {
        f"AR{limit}": mean(np.ascontiguousarray(recall[..., 0, place]))
        for place, limit in enumerate(protocol.max_detections)
    }
    for place, (name, *_) in enumerate(protocol.areas[1:], start=1):
        values[f"AR{_short(name)}"] = mean(np.ascontiguousarray(recall[..., place, -1]))
    return values


def curves_by_iou(protocol: Protocol, truth: GroundTruth, precision: np.ndarray) -> dict[float, dict[str, np.ndarray]]:
    """Precision over recall at the named IoUs, all areas; at the first IoU where neither of them is measured."""
    rows = _named_rows(protocol) or [(0, protocol.ious[0])]
    return {iou: {name: precision[row, :, k, 0] for k, name in enumerate(truth.names)} for row, iou in rows}


def mean(values: np.ndarray) -> float:
    """Mean of the values that are measured; -1 where none is."""
    valid = values[values > -1]
    return float(np.mean(valid)) if len(valid) else -1.0


def _named_rows(protocol: Protocol) -> list[tuple[int, float]]:
    return [(row, iou) for row, iou in enumerate(protocol.ious) if iou in _NAMED_IOUS]


def _short(area: str) -> str:
    return area[0] if area in ("small", "medium", "large") else f"_{area}"


METRIC = Metric(Protocol("coco"), _match, _accumulate, supports=frozenset({"crowd"}))
