"""What a run leaves for people: its MLflow run, its report, its pictures and its packaged model.

The names below are loaded when they are first used: MLflow takes seconds to import, drawing boxes must not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from refinedet.pipeline.lazy import import_when_asked

if TYPE_CHECKING:
    from refinedet.pipeline.tracking.packaging import package_model
    from refinedet.pipeline.tracking.pictures import Boxes, draw_detections
    from refinedet.pipeline.tracking.redaction import redact, redact_text
    from refinedet.pipeline.tracking.report import build_report
    from refinedet.pipeline.tracking.runs import RunTracker
    from refinedet.pipeline.tracking.summary import merge_rule_rows, summary_rows

__all__ = [
    "Boxes",
    "RunTracker",
    "build_report",
    "draw_detections",
    "merge_rule_rows",
    "package_model",
    "redact",
    "redact_text",
    "summary_rows",
]


__getattr__ = import_when_asked(
    __name__,
    {
        "packaging": ["package_model"],
        "pictures": ["Boxes", "draw_detections"],
        "redaction": ["redact", "redact_text"],
        "report": ["build_report"],
        "runs": ["RunTracker"],
        "summary": ["merge_rule_rows", "summary_rows"],
    },
)
