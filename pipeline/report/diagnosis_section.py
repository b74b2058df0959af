"""The diagnosis of an evaluation as the report shows it: error kinds, confusion, curves, slices, lost objects.

The layout of the data is that of `diagnosis` in `metrics.json`. A part that is absent or broken is not shown.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from markupsafe import Markup
from refinedet.pipeline.report import charts
from refinedet.pipeline.report.charts import Series

_ERROR_WORDS = {
    "classification": ("wrong class", "the box fits an object of another class"),
    "localization": ("wrong box", "right class, the box fits badly"),
    "both": ("wrong class and box", "the box fits an object of another class badly"),
    "duplicate": ("duplicate", "a second box on a found object"),
    "background": ("background", "a box on no object"),
    "missed": ("missed", "an object that no box fits, wrong class or wrong box included"),
}
_STAGE_WORDS = {
    "found": "found",
    "uncovered": "no anchor near",
    "first_regression": "lost by the ARM's boxes",
    "filter": "lost by the negative filter",
    "second_regression": "lost by the ADM's boxes",
    "classification": "lost by classification",
    "suppression": "lost by NMS or limits",
}
_MAX_CONFUSIONS = 12
_SLICE_TITLES = {"size": "By size", "aspect": "By aspect ratio", "crowding": "By crowding"}


def diagnosis_view(diagnosis: Mapping[str, Any]) -> dict[str, Any]:
    """Parts of the section for the template; empty where there is no diagnosis."""
    if not diagnosis:
        return {}
    parts: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "errors": error_rows,
        "confusion": _confusion,
        "curves": _class_curves,
        "slices": _slices,
        "stages": _stages,
        "levels": _levels,
        "calibration": _calibration,
    }
    view: dict[str, Any] = {"iou": diagnosis.get("iou"), "calibration_error": diagnosis.get("calibration_error")}
    for name, part in parts.items():
        try:
            view[name] = part(diagnosis)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):  # of another layout: not shown
            view[name] = None
    return view


def error_rows(diagnosis: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each error kind, costliest first."""
    rows = []
    for error in diagnosis["errors"]:
        words, note = _ERROR_WORDS.get(error["kind"], (str(error["kind"]), ""))
        rows.append({"name": words, "note": note, "count": int(error["count"]), "cost": float(error["ap_cost"])})
    top = max((row["cost"] for row in rows), default=0.0) or 1.0
    return sorted(({**row, "share": max(row["cost"], 0) / top} for row in rows), key=lambda row: -row["cost"])


def lost_stages(diagnosis: Mapping[str, Any]) -> dict[str, int]:
    """Stage -> objects that end there, over all anchor levels, in the detector's order."""
    counts = dict.fromkeys(_STAGE_WORDS, 0)
    for level in diagnosis["levels"]:
        for stage, count in level["counts"].items():
            counts[stage] = counts.get(stage, 0) + int(count)
    return counts


def error_name(kind: str) -> str:
    """Name of a kind of error for people; a kind that is not known stays."""
    return _ERROR_WORDS.get(kind, (kind,))[0]


def stage_words(stage: str) -> str:
    return _STAGE_WORDS.get(stage, stage.replace("_", " "))


def _stages(diagnosis: Mapping[str, Any]) -> Markup:
    counts = lost_stages(diagnosis)
    parts = [(stage_words(stage), float(count), f"{count} objects") for stage, count in counts.items()]
    return Markup(charts.share_bar(parts, label="Where objects end"))


def _levels(diagnosis: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for level in diagnosis["levels"]:
        counts = {stage: int(level["counts"].get(stage, 0)) for stage in _STAGE_WORDS}
        total = sum(counts.values())
        cells = [
            {"share": count / total, "colour": index, "title": f"{stage_words(stage)}: {count}"}
            for index, (stage, count) in enumerate(counts.items(), start=1)
            if count
        ]
        if total:
            rows.append({"name": f"stride {level['stride']}", "total": total, "found": counts["found"], "cells": cells})
    return rows


def _slices(diagnosis: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"title": _SLICE_TITLES.get(name, f"By {name}"), "rows": [dict(row) for row in rows]}
        for name, rows in diagnosis["slices"].items()
        if rows
    ]


def _calibration(diagnosis: Mapping[str, Any]) -> Markup:
    bins = [one for one in diagnosis["calibration"] if one["count"] and one["score"] is not None]
    if len(bins) < 2:
        return Markup("")
    chart = charts.line_chart(
        "Calibration",
        [
            Series("", [0.0, 1.0], [0.0, 1.0], 2, faint=True),
            Series("correct", [one["score"] for one in bins], [one["correct"] for one in bins], 1, dots=True),
        ],
        note="share that is correct",
        x_name="score",
        y_max=1.0,
        x_min=0.0,
        x_max=1.0,
        y_format="{:.2f}",
    )
    return Markup(chart)


def _class_curves(diagnosis: Mapping[str, Any]) -> dict[str, Any] | None:
    """Data for the chooser of classes, three digits each, so that eighty classes stay small."""
    scores = [float(score) for score in diagnosis["scores"]]
    classes = []
    for row in diagnosis["classes"]:
        best = row["best_score"]
        words = "no detections" if best is None else (
            f"best threshold {best:.2f}: F1 {row['best_f1']:.2f}, precision {row['best_precision']:.2f}, "
            f"recall {row['best_recall']:.2f}"
        )  # fmt: skip
        curves = {name: [_short(value) for value in row[name]] for name in ("precision", "recall", "f1")}
        if any(len(curve) != len(scores) for curve in curves.values()):
            raise ValueError("curves of another length than their scores")
        words = f"{row['num_objects']} objects, {words}"
        classes.append({**curves, "best": None if best is None else _short(best), "words": words})
    if not classes or not scores:
        return None
    names = [str(row["name"]) for row in diagnosis["classes"]]
    return {"names": names, "data": json.dumps({"scores": [_short(score) for score in scores], "classes": classes})}


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), 3)


def _confusion(diagnosis: Mapping[str, Any]) -> dict[str, Any] | None:
    """The matrix as a drawing, and its most frequent confusions as rows."""
    confusion = diagnosis["confusion"]
    names = [*map(str, confusion["labels"]), "background"]
    cells = [(int(true), int(found), int(count)) for true, found, count in confusion["cells"]]
    if not cells:
        return None
    totals: dict[int, int] = {}
    for true, _, count in cells:
        totals[true] = totals.get(true, 0) + count
    wrong = sorted((cell for cell in cells if cell[0] != cell[1]), key=lambda cell: -cell[2])[:_MAX_CONFUSIONS]
    rows = [
        {"true": names[true], "found": names[found], "count": count, "share": count / totals[true]}
        for true, found, count in wrong
    ]
    return {"score": confusion["score"], "rows": rows, "drawing": Markup(_matrix(names, cells, totals))}


def _matrix(names: Sequence[str], cells: Sequence[tuple[int, int, int]], totals: Mapping[int, int]) -> str:
    """Rows are true classes, columns detected ones, background last; darker is a larger share of the row."""
    side, count = 320, len(names)
    cell = side / count
    parts = [f'<rect class="empty" width="{side}" height="{side}"/>']
    for true, found, number in cells:
        share = number / totals[true]
        colour = "--series-1" if true == found else "--series-2"
        words = f"{names[true]} as {names[found]}: {number} ({100 * share:.0f} %)"
        parts.append(
            f'<rect x="{found * cell:.2f}" y="{true * cell:.2f}" width="{cell:.2f}" height="{cell:.2f}" '
            f'style="fill:var({colour});opacity:{0.08 + 0.92 * share:.2f}"><title>{escape(words)}</title></rect>'
        )
    edge = side - cell
    parts.append(f'<path class="edge" d="M0 {edge:.2f}H{side}M{edge:.2f} 0V{side}"/>')
    return (
        f'<svg class="matrix" viewBox="0 0 {side} {side}" role="img" '
        f'aria-label="Confusion matrix of {count - 1} classes and background">{"".join(parts)}</svg>'
    )
