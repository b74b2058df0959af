"""LVIS's average precision: a category counts in an image only where annotators looked for it (federated annotations).

The rules are those of the `lvis` package. Of each image the best 300 detections count, whatever their categories. Of
those, detections of a category that is neither annotated in the image nor verified to be absent are dropped; of a
category that is not annotated exhaustively there, a detection that finds nothing is ignored. There are no crowds.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from refinedet.pipeline.evaluation.box_matching import MatchedDetections, check_known, match_boxes
from refinedet.pipeline.evaluation.coco_metric import average_precision, curves_by_iou, mean
from refinedet.pipeline.evaluation.curves import accumulate_curves
from refinedet.pipeline.evaluation.protocols import Metric, Metrics, Protocol
from refinedet.pipeline.evaluation.truth import GroundTruth, pair_keys
from refinedet.pipeline.inference.detections import DetectionTable

FREQUENCIES = ("r", "c", "f")  # rare, common, frequent: by the training images that a category occurs in


def _match(
    protocol: Protocol, truth: GroundTruth, detections: DetectionTable, image_ids: Sequence[int] | None
) -> MatchedDetections:
    images = truth.image_ids if image_ids is None else np.unique(np.asarray(image_ids, np.int64))
    check_known(truth, images, detections)
    table = detections.select(looked_for(truth, detections, protocol.max_detections[-1]))
    unpunished = np.isin(pair_keys(truth, table.image_id, table.category_id), truth.not_exhaustive)
    return match_boxes(
        protocol,
        truth,
        table,
        image_ids,
        crowd=np.zeros(len(truth), bool),
        ignored=truth.difficult,
        unpunished=unpunished,
    )


def looked_for(truth: GroundTruth, detections: DetectionTable, limit: int) -> np.ndarray:
    """Rows among the best `limit` of their image whose category annotators looked for there, in their order."""
    order = np.lexsort((-detections.score, detections.image_id))
    image_id = detections.image_id[order]
    best = order[np.arange(len(order)) - np.searchsorted(image_id, image_id) < limit]
    rows = np.sort(best)
    keys = pair_keys(truth, detections.image_id[rows], detections.category_id[rows])
    annotated = pair_keys(truth, truth.image_id, truth.category_id)
    return rows[np.isin(keys, truth.verified_absent) | np.isin(keys, annotated)]


def _accumulate(protocol: Protocol, truth: GroundTruth, matches: Sequence[MatchedDetections]) -> Metrics:
    precision, recall = accumulate_curves(protocol, truth, matches)
    values = average_precision(protocol, precision)
    groups = np.array(truth.frequencies)
    for group in FREQUENCIES:
        values[f"AP{group}"] = mean(np.ascontiguousarray(precision[:, :, groups == group, 0]))
    limit = protocol.max_detections[-1]
    for place, (name, *_) in enumerate(protocol.areas):
        short = "" if place == 0 else name[0]
        values[f"AR{short}{limit}"] = mean(np.ascontiguousarray(recall[..., place, -1]))
    per_class = {}
    for k, name in enumerate(truth.names):
        own = average_precision(protocol, precision[:, :, k : k + 1])
        per_class[name] = {**own, f"AR{limit}": mean(np.ascontiguousarray(recall[:, k, 0, -1]))}
    return Metrics(protocol, values, per_class, curves_by_iou(protocol, truth, precision))


METRIC = Metric(
    Protocol("lvis", max_detections=(300,)),
    _match,
    _accumulate,
    supports=frozenset({"federated", "difficult"}),
    requires=frozenset({"federated"}),
)
