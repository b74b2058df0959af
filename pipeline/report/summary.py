"""What a run came to, in a few rows for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refinedet.pipeline.report.results import MODE_TITLES
from refinedet.pipeline.report.run_data import read_run

_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
_VOC_COLUMNS = ("mAP",)


def summary_rows(run_dir: str) -> list[dict[str, str]]:
    """One row an evaluation, {"": "Single scale", "AP": "0.503", ...}; empty before the first one."""
    return [_row(MODE_TITLES[mode], result.values) for mode, result in read_run(run_dir).evaluations.items()]


def merge_rule_rows(run_dir: str) -> list[dict[str, str]]:
    """One row a merge rule, best first; empty where none were compared."""
    return [_row(str(rule.get("rule", "")), rule) for rule in read_run(run_dir).merge_rules]


def _row(title: str, values: Mapping[str, Any]) -> dict[str, str]:
    names = _COLUMNS if "AP" in values else _VOC_COLUMNS
    cells = {name: values.get(name) for name in names}
    return {"": title} | {
        name: f"{value:.3f}" if isinstance(value, int | float) and value >= 0 else "–" for name, value in cells.items()
    }
