"""Detections, COCO and VOC evaluation, multi-scale testing. Pure functions; pieces make them restartable."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refinedet.pipeline.lazy import import_when_asked

if TYPE_CHECKING:
    from refinedet.pipeline.evaluation.coco import METRIC_NAMES, CocoMetrics, accumulate, evaluate_coco
    from refinedet.pipeline.evaluation.comparison import best_first, format_comparison
    from refinedet.pipeline.evaluation.detect import detect_piece
    from refinedet.pipeline.evaluation.detections import DetectionTable
    from refinedet.pipeline.evaluation.files import evaluate_files
    from refinedet.pipeline.evaluation.matching import Matches, match
    from refinedet.pipeline.evaluation.measures import (
        Metrics,
        Rule,
        accumulate_by_rule,
        evaluate_by_rule,
        match_by_rule,
        usual_rule,
    )
    from refinedet.pipeline.evaluation.multiscale import detect_by_rules
    from refinedet.pipeline.evaluation.pieces import (
        Piece,
        merge_pieces,
        read_piece,
        split_into_pieces,
        write_piece,
    )
    from refinedet.pipeline.evaluation.recipes import (
        MERGE_RULES,
        describe_cost,
        estimate_cost,
        resolve_merge,
        resolve_passes,
        rules_to_compare,
    )
    from refinedet.pipeline.evaluation.submission import write_submission
    from refinedet.pipeline.evaluation.truth import GroundTruth
    from refinedet.pipeline.evaluation.validation import validate
    from refinedet.pipeline.evaluation.voc import (
        VocMatches,
        VocMetrics,
        accumulate_voc,
        evaluate_voc,
        match_voc,
        write_voc_files,
    )

__all__ = [
    "MERGE_RULES",
    "METRIC_NAMES",
    "CocoMetrics",
    "DetectionTable",
    "GroundTruth",
    "Matches",
    "Metrics",
    "Piece",
    "Rule",
    "VocMatches",
    "VocMetrics",
    "accumulate",
    "accumulate_by_rule",
    "accumulate_voc",
    "best_first",
    "describe_cost",
    "detect_by_rules",
    "detect_piece",
    "estimate_cost",
    "evaluate_by_rule",
    "evaluate_coco",
    "evaluate_files",
    "evaluate_voc",
    "format_comparison",
    "match",
    "match_by_rule",
    "match_voc",
    "merge_pieces",
    "read_piece",
    "resolve_merge",
    "resolve_passes",
    "rules_to_compare",
    "split_into_pieces",
    "usual_rule",
    "validate",
    "write_piece",
    "write_submission",
    "write_voc_files",
]

__getattr__ = import_when_asked(
    __name__,
    {
        "coco": ("METRIC_NAMES", "CocoMetrics", "accumulate", "evaluate_coco"),
        "comparison": ("best_first", "format_comparison"),
        "detect": ("detect_piece",),
        "detections": ("DetectionTable",),
        "files": ("evaluate_files",),
        "matching": ("Matches", "match"),
        "measures": ("Metrics", "Rule", "accumulate_by_rule", "evaluate_by_rule", "match_by_rule", "usual_rule"),
        "multiscale": ("detect_by_rules",),
        "pieces": (
            "Piece",
            "merge_pieces",
            "read_piece",
            "split_into_pieces",
            "write_piece",
        ),
        "recipes": (
            "MERGE_RULES",
            "describe_cost",
            "estimate_cost",
            "resolve_merge",
            "resolve_passes",
            "rules_to_compare",
        ),
        "submission": ("write_submission",),
        "truth": ("GroundTruth",),
        "validation": ("validate",),
        "voc": ("VocMatches", "VocMetrics", "accumulate_voc", "evaluate_voc", "match_voc", "write_voc_files"),
    },
)
