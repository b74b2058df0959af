"""The results of a run as tables: metrics, classes, merge methods, precision over recall."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from refinedet.pipeline.report import charts
from refinedet.pipeline.report.charts import Series
from refinedet.pipeline.report.run_data import RunFolder

MODE_TITLES = {"single": "Single scale", "multiscale": "Multi-scale"}
METRIC_MEANINGS = {
    "AP": "IoU 0.50 to 0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small, below 32² px",
    "APm": "medium",
    "APl": "large, above 96² px",
    "APr": "rare classes",
    "APc": "common classes",
    "APf": "frequent classes",
    "AR1": "1 detection per image",
    "AR10": "10 detections",
    "AR100": "100 detections",
    "AR300": "300 detections",
    "ARs": "small",
    "ARm": "medium",
    "ARl": "large",
    "mAP": "mean over classes",
    "mMR": "log-average miss rate, lower is better",
}
_RULE_COLUMNS = ("AP", "AP50", "AP75", "APs", "AR100", "mAP")  # as many as fit; metrics.json has all


def metric_rows(run: RunFolder) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for result in run.evaluations.values() for name in result.values)
    rows = []
    for name in sorted_metrics(names):
        values = [result.values.get(name) for result in run.evaluations.values()]
        rows.append({"name": name, "values": values, "gain": _gain(values)})
    return rows


def sorted_metrics(names: Iterable[str]) -> list[str]:
    """The usual metrics in their usual order, then those of own IoUs, areas and limits."""
    usual = list(METRIC_MEANINGS)
    return sorted(names, key=lambda name: (usual.index(name) if name in usual else len(usual), name))


def class_rows(run: RunFolder, truth: Mapping[str, Any]) -> list[dict[str, Any]]:
    """AP of every class, best first by the first mode."""
    names = dict.fromkeys(name for result in run.evaluations.values() for name in result.per_class)
    counts = _object_counts(truth)
    rows = []
    for name in names:
        values = [result.per_class.get(name, {}).get("AP") for result in run.evaluations.values()]
        rows.append({"name": name, "values": values, "gain": _gain(values), "objects": counts.get(name)})
    return sorted(rows, key=lambda row: -(row["values"][0] if row["values"][0] is not None else -1))


def precision_recall(run: RunFolder) -> str:
    """Mean precision over recall at each IoU that the evaluation kept curves of, the first mode that has them."""
    for mode, result in run.evaluations.items():
        lines = []
        for index, (threshold, precision) in enumerate(sorted(result.curves.items()), start=1):
            recalls = [position / (len(precision) - 1) for position in range(len(precision))]
            lines.append(Series(f"IoU {threshold}", recalls, precision, colour=index))
        if lines:
            note = f"mean over classes, {MODE_TITLES[mode].lower()}"
            return charts.line_chart(
                "Precision over recall", lines, note=note, x_name="recall", y_max=1.0, x_max=1.0, end_values=False
            )
    return ""


def rule_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns and rows of the comparison of merge methods; the best of each column is marked."""
    if not rows:
        return {}
    columns = [name for name in _RULE_COLUMNS if name in rows[0]]
    label = next((name for name in ("rule", "method", "name") if name in rows[0]), "name")
    best = {name: max(row.get(name) or 0 for row in rows) for name in columns}
    body = [
        {
            "name": str(row.get(label, "")).replace("_", " "),
            "cells": [(row.get(name), row.get(name) == best[name]) for name in columns],
        }
        for row in rows
    ]
    return {"columns": columns, "rows": body}


def _gain(values: Sequence[float | None]) -> float | None:
    return values[1] - values[0] if len(values) == 2 and values[0] is not None and values[1] is not None else None


def _object_counts(truth: Mapping[str, Any]) -> dict[str, int]:
    if not truth:
        return {}
    names = {category["id"]: category["name"] for category in truth["categories"]}
    counts = dict.fromkeys(names.values(), 0)
    for row in truth["annotations"]:
        if not row.get("iscrowd") and row.get("category_id") in names:
            counts[names[row["category_id"]]] += 1
    return counts
