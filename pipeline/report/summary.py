"""Summary of a run: a few rows for the terminal, a few sentences for MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refinedet.pipeline.report.report import subtitle
from refinedet.pipeline.report.result_tables import MODE_TITLES
from refinedet.pipeline.report.run_data import read_ground_truth, read_run
from refinedet.pipeline.report.verdict import verdict

_COLUMNS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


def describe_run(run_dir: str, status: str, data: str) -> str:
    """Describe a run's model, data and results so far, as Markdown.

    data  of training and validation, in words
    """
    run = read_run(run_dir)
    run.tracking["status"] = status
    truth = read_ground_truth(run_dir)
    parts = [
        f"**{subtitle(run)}**, {data}",
        " ".join(verdict(run, len(truth["images"]) if truth else None)),
    ]
    return "\n\n".join(part for part in parts if part)


def summary_rows(run_dir: str) -> list[dict[str, str]]:
    """One row an evaluation, {"": "Single scale", "AP": "0.503", ...}; empty before the first one."""
    return [_row(MODE_TITLES[mode], result.values) for mode, result in read_run(run_dir).evaluations.items()]


def merge_rule_rows(run_dir: str) -> list[dict[str, str]]:
    """One row a merge rule, best first; empty where none were compared."""
    return [_row(str(rule.get("rule", "")), rule) for rule in read_run(run_dir).merge_rules]


def _row(title: str, values: Mapping[str, Any]) -> dict[str, str]:
    names = [name for name in _COLUMNS if name in values] or [name for name in values if name != "rule"]
    cells = {name: values.get(name) for name in names}
    return {"": title} | {
        name: f"{value:.3f}" if isinstance(value, int | float) and value >= 0 else "–" for name, value in cells.items()
    }
