"""CrowdHuman's log-average miss rate (mMR, the lower the better), with AP beside it.

Objects marked `ignore` or `iscrowd` are regions: a detection that lies in one by half of its own area is ignored.
The miss rate is read at nine numbers of false positives per image, from 0.01 to 1, and averaged geometrically.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from refinedet.pipeline.evaluation.box_matching import MatchedDetections, match_boxes
from refinedet.pipeline.evaluation.coco_metric import average_precision, curves_by_iou
from refinedet.pipeline.evaluation.curves import accumulate_curves, best_first
from refinedet.pipeline.evaluation.protocols import COCO_AREAS, Metric, Metrics, Protocol
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable

FALSE_POSITIVES_PER_IMAGE = (0.0100, 0.0178, 0.0316, 0.0562, 0.1000, 0.1778, 0.3162, 0.5623, 1.0000)


def _match(
    protocol: Protocol, truth: GroundTruth, detections: DetectionTable, image_ids: Sequence[int] | None
) -> MatchedDetections:
    region = truth.crowd | truth.difficult
    return match_boxes(protocol, truth, detections, image_ids, crowd=region, ignored=region)


def _accumulate(protocol: Protocol, truth: GroundTruth, matches: Sequence[MatchedDetections]) -> Metrics:
    precision, _ = accumulate_curves(protocol, truth, matches)
    positives = np.sum([part.positives[:, 0] for part in matches], axis=0)
    category, score, image_id, rank, true, false = (
        np.concatenate([getattr(part, name) for part in matches])
        for name in ("category", "score", "image_id", "rank", "true", "false")
    )
    order = best_first(category, score, image_id, rank)
    first = protocol.bits[0, 0]
    per_class = {}
    for k, name in enumerate(truth.names):
        rows = order[category[order] == k]
        found, wrong = (np.cumsum((column[rows] & first) != 0) for column in (true, false))
        rate = miss_rate(found, wrong, int(positives[k]), len(truth.image_ids))
        per_class[name] = {**average_precision(protocol, precision[:, :, k : k + 1]), "mMR": rate}
    valid = [values["mMR"] for values in per_class.values() if values["mMR"] >= 0]
    values = {**average_precision(protocol, precision), "mMR": float(np.mean(valid)) if valid else -1.0}
    return Metrics(protocol, values, per_class, curves_by_iou(protocol, truth, precision))


def miss_rate(found: np.ndarray, wrong: np.ndarray, num_objects: int, num_images: int) -> float:
    """Geometric mean of the miss rate at FALSE_POSITIVES_PER_IMAGE; -1 without objects.

    found, wrong  [D] true and false positives up to each detection, best first
    """
    if not num_objects:
        return -1.0
    missed = np.append(1 - found / num_objects, 1.0 if not len(found) else 1 - found[-1] / num_objects)
    places = np.searchsorted(wrong / num_images, FALSE_POSITIVES_PER_IMAGE, side="left")
    return float(np.exp(np.mean(np.log(np.maximum(missed[places], 1e-10)))))


METRIC = Metric(
    Protocol("crowdhuman", ious=(0.5,), areas=COCO_AREAS[:1], max_detections=()),
    _match,
    _accumulate,
    supports=frozenset({"crowd", "difficult"}),
    fixed=frozenset({"ious", "areas"}),
)
