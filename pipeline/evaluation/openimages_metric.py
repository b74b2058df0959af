"""Open Images' average precision: IoU 0.5, groups of objects, image-level labels.

As the detection evaluator of Open Images V2: a detection that finds no object and lies half in a group (`is_group_of`)
is ignored, groups are not counted as objects. Where images list the categories that are verified, detections of other
categories are dropped. The hierarchy of classes is not expanded: expand annotations and detections beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence

from refinedet.pipeline.evaluation.lvis_metric import looked_for
from refinedet.pipeline.evaluation.protocols import COCO_AREAS, Metric, Protocol
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.evaluation.voc_metric import (
    BestObjectMatches,
    accumulate_best_objects,
    area_under_curve,
    match_best_objects,
)
from refinedet.pipeline.inference.detections import DetectionTable


def _match(
    protocol: Protocol, truth: GroundTruth, detections: DetectionTable, image_ids: Sequence[int] | None
) -> BestObjectMatches:
    if truth.federated:
        detections = detections.select(looked_for(truth, detections, len(detections)))
    return match_best_objects(protocol, truth, detections, image_ids, groups=truth.group_of)


METRIC = Metric(
    Protocol("openimages", ious=(0.5,), areas=COCO_AREAS[:1], max_detections=()),
    _match,
    lambda protocol, truth, matches: accumulate_best_objects(protocol, truth, matches, area_under_curve),
    supports=frozenset({"group_of", "federated", "difficult"}),
    fixed=frozenset({"areas"}),
)
