"""`report.html`: one page that tells a run, built from the run's folder alone, as often as one likes."""

from __future__ import annotations

import datetime
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from refinedet.pipeline.report import charts
from refinedet.pipeline.report.charts import Series
from refinedet.pipeline.report.gallery import Gallery, LoadImages, build_gallery
from refinedet.pipeline.report.run_data import MODES, RunFolder, read_detections, read_ground_truth, read_run
from refinedet.pipeline.report.shard_images import ShardImages
from refinedet.pipeline.report.training_charts import (
    curves,
    duration,
    get,
    goodput,
    ledger_bar,
    ledger_events,
    ledger_total,
    step_bar,
)
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.redaction import flatten

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
MODE_TITLES = {"single": "Single scale", "multiscale": "Multi-scale"}
_ROUTINE_EVENTS = ("preflight", "started", "saved", "validated")
_RULE_COLUMNS = ("AP", "AP50", "AP75", "APs", "AR100", "mAP")  # as many as fit; metrics.json has all
_METRIC_MEANINGS = {
    "AP": "IoU 0.50 to 0.95",
    "AP50": "IoU 0.50",
    "AP75": "IoU 0.75",
    "APs": "small, below 32² px",
    "APm": "medium",
    "APl": "large, above 96² px",
    "AR1": "1 detection an image",
    "AR10": "10 detections",
    "AR100": "100 detections",
    "ARs": "small",
    "ARm": "medium",
    "ARl": "large",
    "mAP": "mean over classes",
}


def build_report(run_dir: str, *, status: str | None = None, load_images: LoadImages | None = None) -> str:
    """Write `report.html` into the run's folder and return its path.

    status       shown instead of the one in `tracking.json`, which is still RUNNING while the report is a stage
    load_images  where the pictures' images come from; default: the run's validation shards
    """
    run = read_run(run_dir)
    if status:
        run.tracking["status"] = status
    page = _environment().get_template("report.html.j2").render(**_content(run, load_images))
    path = storage.join(run_dir, REPORT_FILE)
    storage.write_bytes(path, page.encode())
    return path


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["score"] = lambda value: "–" if value is None else f"{value:.3f}"
    environment.filters["gain"] = lambda value: "" if value is None else signed(value)
    return environment


def _content(run: RunFolder, load_images: LoadImages | None) -> dict[str, Any]:
    modes = list(run.evaluations)
    classes, events = _class_rows(run), ledger_events(run)
    measured = [row for row in classes if any(value is not None for value in row["values"])]
    return {
        "run": run,
        "modes": [(mode, MODE_TITLES[mode]) for mode in modes],
        "subtitle": _subtitle(run),
        "tiles": _tiles(run),
        "facts": _facts(run),
        "metrics": _metric_rows(run),
        "unmeasured": read_ground_truth(run.path).get("annotations") == [],
        "classes": measured,
        "num_empty_classes": len(classes) - len(measured),
        "precision_recall": Markup(_precision_recall(run)),
        "merge_rules": _rule_table(run.merge_rules),
        "gallery": _gallery(run, load_images),
        "curves": [Markup(chart) for chart in curves(run) if chart],
        "step_bar": Markup(step_bar(run)),
        "ledger_bar": Markup(ledger_bar(run)),
        "events": events,
        "notable_events": [event for event in events if event["kind"] not in _ROUTINE_EVENTS],
        "spec_text": yaml.safe_dump(run.spec, sort_keys=False, allow_unicode=True) if run.spec else "",
        "environment": _environment_groups(run),
        "files": _files(run),
        "meanings": _METRIC_MEANINGS,
        "mode_titles": MODE_TITLES,
        "built": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


# --- the head of the page


def signed(value: float) -> str:
    """A difference with a proper sign: +0.021, −0.004, 0.000."""
    text = f"{value:+.3f}"
    return "0.000" if float(text) == 0 else text.replace("-", "−")


def _subtitle(run: RunFolder) -> str:
    if not run.spec:
        return ""
    size = get(run.spec, "model.input_size")
    classes = get(run.spec, "model.num_classes")
    data = {"shapes": "synthetic shapes", "coco": "COCO", "voc": "Pascal VOC"}.get(get(run.spec, "data.format"), "")
    parts = ["RefineDet++", get(run.spec, "model.backbone"), f"{size} px" if size else None, data]
    return " · ".join(str(part) for part in [*parts, f"{classes} classes" if classes else None] if part)


def _tiles(run: RunFolder) -> list[dict[str, str]]:
    tiles: list[dict[str, str]] = []
    single, multi = run.evaluations.get("single"), run.evaluations.get("multiscale")
    for name in ("AP", "AP50") if not single or "AP" in single.values else ("mAP",):
        if single and single.values.get(name) is not None:
            tiles.append({"value": f"{single.values[name]:.3f}", "name": name, "note": "single scale"})
    if multi:
        name = "AP" if "AP" in multi.values else "mAP"
        value, before = multi.values.get(name), single.values.get(name) if single else None
        if value is not None:
            note = "multi-scale" if before is None else f"multi-scale, {signed(value - before)}"
            tiles.append({"value": f"{value:.3f}", "name": name, "note": note})
    rates = sorted(row["images_per_s"] for row in run.steps if "images_per_s" in row)
    if rates:
        tiles.append({"value": f"{rates[len(rates) // 2]:.3g}", "name": "images/s", "note": "in training"})
    seconds = _training_seconds(run)
    if seconds:
        epochs = int(run.steps[-1].get("epoch", 0)) + 1 if run.steps else 0
        tiles.append({"value": duration(seconds), "name": "training", "note": f"{epochs} epochs" if epochs else ""})
    useful = goodput(run)
    if useful is not None:
        tiles.append({"value": f"{100 * useful:.1f} %", "name": "goodput", "note": "useful time"})
    return tiles


def _training_seconds(run: RunFolder) -> float:
    if ledger_total(run):
        return ledger_total(run)
    times = [row["time"] for row in run.steps if "time" in row]
    return max(times) - min(times) if len(times) > 1 else 0.0


def _facts(run: RunFolder) -> list[tuple[str, list[tuple[str, str]]]]:
    """The spec in short: group -> (name, value)."""
    wanted = {
        "Model": ("backbone", "input_size", "num_classes", "head", "theta", "norm"),
        "Data": ("format", "root", "augmentation"),
        "Training": ("global_batch", "epochs", "learning_rate", "decay_epochs", "precision", "zero_stage"),
        "Multi-scale": ("recipe", "passes", "merge"),
        "Cluster": ("workers", "cpus_per_worker", "gpus_per_worker", "placement"),
    }
    groups = []
    for title, names in wanted.items():
        section = run.spec.get(title.lower().replace("-", ""))
        if isinstance(section, Mapping):
            pairs = [(name.replace("_", " "), _short(section.get(name))) for name in names]
            groups.append((title, [(name, value) for name, value in pairs if value]))
    return [group for group in groups if group[1]]


def _short(value: Any) -> str:
    if value is None or value == "" or value == [] or value == {}:
        return ""
    if isinstance(value, Mapping):
        on = [name.replace("_", " ") for name, item in value.items() if item is True]
        rest = [f"{name.replace('_', ' ')} {item}" for name, item in value.items() if item and item is not True]
        return ", ".join(on or rest)
    if isinstance(value, list):
        return f"{len(value)}" if any(isinstance(item, Mapping) for item in value) else ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- results


def _metric_rows(run: RunFolder) -> list[dict[str, Any]]:
    names = dict.fromkeys(name for result in run.evaluations.values() for name in result.values)
    known = [name for name in _METRIC_MEANINGS if name in names]
    rows = []
    for name in known:
        values = [run.evaluations[mode].values.get(name) for mode in run.evaluations]
        rows.append({"name": name, "values": values, "gain": _gain(values)})
    return rows


def _gain(values: Sequence[float | None]) -> float | None:
    return values[1] - values[0] if len(values) == 2 and values[0] is not None and values[1] is not None else None


def _class_rows(run: RunFolder) -> list[dict[str, Any]]:
    """AP of every class, best first by the first mode."""
    names = dict.fromkeys(name for result in run.evaluations.values() for name in result.per_class)
    counts = _object_counts(run)
    rows = []
    for name in names:
        values = [result.per_class.get(name, {}).get("AP") for result in run.evaluations.values()]
        ap50 = [result.per_class.get(name, {}).get("AP50") for result in run.evaluations.values()]
        row = {"name": name, "values": values, "ap50": ap50, "gain": _gain(values), "objects": counts.get(name)}
        rows.append(row)
    return sorted(rows, key=lambda row: -(row["values"][0] if row["values"][0] is not None else -1))


def _object_counts(run: RunFolder) -> dict[str, int]:
    truth = read_ground_truth(run.path)
    if not truth:
        return {}
    names = {category["id"]: category["name"] for category in truth["categories"]}
    counts = dict.fromkeys(names.values(), 0)
    for row in truth["annotations"]:
        if not row.get("iscrowd") and row.get("category_id") in names:
            counts[names[row["category_id"]]] += 1
    return counts


def _precision_recall(run: RunFolder) -> str:
    """Mean precision over recall at each IoU that the evaluation kept curves of, the first mode that has them."""
    for mode, result in run.evaluations.items():
        lines = []
        for index, (threshold, precision) in enumerate(sorted(result.curves.items()), start=1):
            recalls = [position / (len(precision) - 1) for position in range(len(precision))]
            lines.append(Series(f"IoU {threshold}", recalls, precision, colour=index))
        if lines:
            note = f"mean over classes, {MODE_TITLES[mode].lower()}"
            return charts.line_chart(
                "Precision over recall", lines, note=note, x_name="recall", y_max=1.0, x_max=1.0, labels_at=0.5
            )
    return ""


def _rule_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Columns and rows of the comparison of merge rules; the best of each column is marked."""
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


def _gallery(run: RunFolder, load_images: LoadImages | None) -> Gallery | None:
    truth = read_ground_truth(run.path)
    detections = {mode: read_detections(run.path, mode) for mode in MODES}
    if not truth or not any(detections.values()):
        return None
    count = int(get(run.spec, "tracking.report_images", 12))
    try:
        load = load_images or ShardImages(run.shards, [image["id"] for image in truth["images"]])
        return build_gallery(truth, detections, load, count=count, titles=MODE_TITLES)
    except Exception as error:  # pictures are worth less than the page
        logger.warning("The report has no pictures: %s", error)
        return None


# --- the end of the page


def _environment_groups(run: RunFolder) -> list[tuple[str, list[tuple[str, str]]]]:
    """`environment.json` as groups of (name, value): its nested mappings, and one of what is not nested."""
    groups: list[tuple[str, list[tuple[str, str]]]] = []
    loose = []
    for name, value in run.environment.items():
        if isinstance(value, Mapping):
            groups.append((name.replace("_", " "), [(key, str(item)) for key, item in flatten(value).items()]))
        elif isinstance(value, list):
            loose.append((name.replace("_", " "), ", ".join(map(str, value)) or "none"))
        elif name.endswith("_bytes") and isinstance(value, int | float):
            loose.append((name.removesuffix("_bytes").replace("_", " "), f"{value / 2**30:.1f} GiB"))
        else:
            loose.append((name.replace("_", " "), str(value)))
    return ([("machine", loose)] if loose else []) + groups


def _files(run: RunFolder) -> list[str]:
    """Files of the run that a reader may want, relative to the report."""
    names = ["spec.yaml", "metrics.json", "metrics.jsonl", "detections/single.json", "detections/multiscale.json"]
    names += ["ground_truth.json", "weights.safetensors", "ledger.json", "environment.json"]
    for mode in MODES:  # what a server takes: a zip, or a folder of text files
        folder = f"submission/{mode}"
        names += [f"{folder}/{name}" for name in storage.list_folder(storage.join(run.path, folder))]
    return [name for name in names if storage.exists(storage.join(run.path, name))]
