"""What a run leaves for people: its MLflow run, its report, its pictures and its packaged model.

The names below are loaded when they are first used: MLflow takes seconds to import, drawing boxes must not.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.tracking.packaging import package_model
    from pipeline.tracking.pictures import Boxes, draw_detections
    from pipeline.tracking.redaction import redact, redact_text
    from pipeline.tracking.report import build_report
    from pipeline.tracking.runs import RunTracker
    from pipeline.tracking.summary import merge_rule_rows, summary_rows

_HOMES = {
    "Boxes": "pictures",
    "RunTracker": "runs",
    "build_report": "report",
    "draw_detections": "pictures",
    "merge_rule_rows": "summary",
    "package_model": "packaging",
    "redact": "redaction",
    "redact_text": "redaction",
    "summary_rows": "summary",
}

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
