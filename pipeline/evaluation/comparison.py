"""Every merge rule on the same multi-scale detections: which one suits a model, at the cost of one test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from model import RefineDet
from pipeline.data import EvaluationSamples, ShardSet
from pipeline.evaluation.detect import Found, as_table
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.measures import Metrics, Rule, evaluate_by_rule
from pipeline.evaluation.merging import merge_boxes
from pipeline.evaluation.multiscale import look_many_times, resolve_merge, resolve_passes
from pipeline.evaluation.truth import GroundTruth
from pipeline.spec import MergeRule, Multiscale

MERGE_RULES: dict[str, MergeRule] = {
    "NMS 0.45": MergeRule(method="nms"),
    "soft-NMS, linear": MergeRule(method="soft_nms_linear"),
    "soft-NMS, Gaussian": MergeRule(method="soft_nms_gaussian"),
    "box voting": MergeRule(method="vote"),
    "soft box voting": MergeRule(method="soft_vote"),
    "soft box voting, +1": MergeRule(method="soft_vote", plus_one=True),
    "weighted box fusion": MergeRule(method="wbf"),
}


def rules_to_compare(multiscale: Multiscale) -> dict[str, MergeRule]:
    """MERGE_RULES with the job's own score threshold and number of detections."""
    own = resolve_merge(multiscale)
    limits = {"score_threshold": own.score_threshold, "max_detections": own.max_detections}
    return {name: rule.model_copy(update=limits) for name, rule in MERGE_RULES.items()}


def detect_by_rules(
    model: RefineDet,
    shards: ShardSet,
    positions: Sequence[int],
    *,
    multiscale: Multiscale,
    rules: Mapping[str, MergeRule] = MERGE_RULES,
    autocast: torch.dtype | None = None,
) -> dict[str, DetectionTable]:
    """Detections of the samples at `positions` by each rule; every image is looked at once for all of them."""
    num_looks = sum(1 + one.flip for one in resolve_passes(multiscale, model.config))
    tables: dict[str, list[DetectionTable]] = {name: [] for name in rules}
    for batch, found in look_many_times(model, EvaluationSamples(shards, positions), multiscale, autocast):
        for name, rule in rules.items():
            merged = merge_boxes(rule, found.boxes, found.scores, found.labels, found.image, num_looks=num_looks)
            tables[name].append(as_table(Found(*merged), batch, shards.categories))
    return {name: DetectionTable.concatenate(parts) for name, parts in tables.items()}


def compare_rules(truth: GroundTruth, tables: Mapping[str, DetectionTable], *, by: Rule = "coco") -> dict[str, Metrics]:
    """Metrics by merge rule, best first."""
    return best_first({name: evaluate_by_rule(by, truth, table) for name, table in tables.items()})


def best_first(metrics: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """The same, by descending AP (mAP)."""
    return dict(sorted(metrics.items(), key=lambda entry: -next(iter(entry[1].values.values()))))


def format_comparison(metrics: Mapping[str, Metrics]) -> str:
    """A table in plain text, a rule a line, percent; - where there is no truth to measure by."""
    width = max((len(name) for name in metrics), default=0)
    columns = list(dict.fromkeys(key for one in metrics.values() for key in one.values))
    lines = [" " * width + "".join(f"{name:>7}" for name in columns)]
    for name, one in metrics.items():
        numbers = (one.values[key] for key in columns)
        lines.append(f"{name:{width}}" + "".join(f"{100 * n:7.1f}" if n >= 0 else f"{'-':>7}" for n in numbers))
    return "\n".join(lines)
