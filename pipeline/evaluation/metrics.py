"""COCO's and VOC's rules behind one pair of functions: matching where the detections are, accumulating in one place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

from refinedet.pipeline.evaluation.box_matching import Matches, match
from refinedet.pipeline.evaluation.coco_metric import CocoMetrics, accumulate
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.evaluation.voc_metric import VocMatches, VocMetrics, accumulate_voc, match_voc
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs.errors import UserError

Rule = Literal["coco", "voc2007", "voc2012"]
Metrics = CocoMetrics | VocMetrics


def check_rule(rule: str) -> Rule:
    """`rule`, if there is one of that name."""
    if rule not in get_args(Rule):
        raise UserError(f"the rule must be coco, voc2007 or voc2012, received {rule}")
    return rule  # type: ignore[return-value]


def usual_rule(data_format: str, image_set: str | None) -> Rule:
    """COCO's; for a `voc` set the year's own: 11 points in 2007, the area after. `image_set` as in VOC2007/test."""
    if data_format != "voc":
        return "coco"
    return "voc2007" if image_set and image_set.startswith("VOC2007") else "voc2012"


def match_by_rule(
    rule: Rule, truth: GroundTruth, detections: DetectionTable, image_ids: Sequence[int] | None = None
) -> Matches | VocMatches:
    """What `rule` needs of the detections of `image_ids` (default: all images of the truth)."""
    return match(truth, detections, image_ids) if rule == "coco" else match_voc(truth, detections, image_ids)


def accumulate_by_rule(rule: Rule, truth: GroundTruth, matches: Iterable[Any]) -> Metrics:
    """Metrics from what `match_by_rule` returned for the same rule, in the order of the images."""
    return accumulate(truth, matches) if rule == "coco" else accumulate_voc(truth, matches, rule=rule)


def evaluate_by_rule(rule: Rule, truth: GroundTruth, detections: DetectionTable) -> Metrics:
    """Evaluate in one process."""
    return accumulate_by_rule(rule, truth, [match_by_rule(rule, truth, detections)])
