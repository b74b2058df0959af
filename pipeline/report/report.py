"""`report.html`: one page about a run, built from the run's directory alone, any number of times."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import logging
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup
from refinedet.pipeline.inference.pictures import Boxes
from refinedet.pipeline.report.data_statistics import statistics_tables
from refinedet.pipeline.report.diagnosis_section import diagnosis_view
from refinedet.pipeline.report.findings import FindingGroup, LoadImages, finding_groups
from refinedet.pipeline.report.gallery import Gallery, build_gallery, find_from
from refinedet.pipeline.report.result_tables import (
    METRIC_MEANINGS,
    MODE_TITLES,
    class_rows,
    metric_rows,
    precision_recall,
    rule_table,
)
from refinedet.pipeline.report.run_data import MODES, RunFolder, read_detections, read_ground_truth, read_run
from refinedet.pipeline.report.shard_images import ShardImages
from refinedet.pipeline.report.timeline_chart import timeline_view, training_bar
from refinedet.pipeline.report.training_charts import (
    curves,
    duration,
    get,
    goodput,
    ledger_events,
    ledger_total,
    step_bar,
)
from refinedet.pipeline.report.verdict import headline, signed, verdict
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.redaction import flatten

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
_PART_TITLES = {"train": "Training", "val": "Validation"}
_ROUTINE_EVENTS = ("preflight", "started", "saved", "validated")


def build_report(run_dir: str, *, status: str | None = None, load_images: LoadImages | None = None) -> str:
    """Write `report.html` into the run's directory and return its path.

    status       shown instead of the one in `tracking.json`, which is still RUNNING while the report is a stage
    load_images  where the pictures' images come from; default: the run's validation shards
    """
    run = read_run(run_dir)
    if status:
        run.tracking["status"] = status
        if run.spans and run.spans[-1].end is None:  # the stage that builds this report
            run.spans[-1] = dataclasses.replace(run.spans[-1], end=time.time(), status="done")
    page = template_environment().get_template("report.html.j2").render(**_content(run, load_images))
    path = storage.join(run_dir, REPORT_FILE)
    storage.write_bytes(path, page.encode())
    return path


@functools.cache
def template_environment() -> jinja2.Environment:
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
    truth = read_ground_truth(run.path)
    classes, events = class_rows(run, truth), ledger_events(run)
    measured = [row for row in classes if any(value is not None for value in row["values"])]
    gallery, findings = _pictures(run, truth, load_images)
    diagnosed = next(((mode, one) for mode, one in run.evaluations.items() if one.diagnosis), None)
    return {
        "run": run,
        "modes": [(mode, MODE_TITLES[mode]) for mode in run.evaluations],
        "subtitle": subtitle(run),
        "verdict": verdict(run, len(truth["images"]) if truth else None),
        "tiles": _tiles(run),
        "facts": _facts(run),
        "metrics": metric_rows(run),
        "unmeasured": truth.get("annotations") == [],
        "classes": measured,
        "num_empty_classes": len(classes) - len(measured),
        "precision_recall": Markup(precision_recall(run)),
        "merge_rules": rule_table(run.merge_rules),
        "gallery": gallery,
        "findings": findings,
        "diagnosis": diagnosis_view(diagnosed[1].diagnosis) if diagnosed else {},
        "diagnosed_mode": MODE_TITLES[diagnosed[0]].lower() if diagnosed else "",
        "unreadable": max((one.unreadable for one in run.evaluations.values()), key=len, default=[]),
        "curves": [Markup(chart) for chart in curves(run) if chart],
        "data_parts": [_PART_TITLES[part] for part, found in _truths(run, truth).items() if found],
        "data_rows": statistics_tables(_truths(run, truth), run.data),
        "data_findings": run.data.get("findings", []),
        "step_bar": Markup(step_bar(run)),
        "training_bar": training_bar(run),
        "timeline": timeline_view(run),
        "events": events,
        "notable_events": [event for event in events if event["kind"] not in _ROUTINE_EVENTS],
        "spec_text": yaml.safe_dump(run.spec, sort_keys=False, allow_unicode=True) if run.spec else "",
        "environment": _environment_groups(run),
        "repeat": _repeat(run),
        "files": _files(run),
        "meanings": METRIC_MEANINGS,
        "mode_titles": MODE_TITLES,
        "built": built_at(),
    }


def built_at() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _truths(run: RunFolder, truth: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {"train": read_ground_truth(run.path, "train"), "val": truth}


# --- the head of the page


def subtitle(run: RunFolder) -> str:
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
    for name in ("AP", "AP50") if not single or headline(single.values) == "AP" else ("mAP",):
        if single and single.values.get(name) is not None:
            tiles.append({"value": f"{single.values[name]:.3f}", "name": name, "note": "single scale"})
    if multi:
        name = headline(multi.values)
        value, before = multi.values.get(name), single.values.get(name) if single else None
        if value is not None:
            note = "multi-scale" if before is None else f"multi-scale, {signed(value - before)}"
            tiles.append({"value": f"{value:.3f}", "name": name, "note": note})
    rates = sorted(row["images_per_s"] for row in run.steps if "images_per_s" in row)
    if rates:
        tiles.append({"value": f"{rates[len(rates) // 2]:.3g}", "name": "images/s", "note": "in training"})
    shares = sorted(row["mfu"] for row in run.steps if "mfu" in row)
    if shares:
        tiles.append(
            {"value": f"{100 * shares[len(shares) // 2]:.1f} %", "name": "MFU", "note": "of the devices' peak"}
        )
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
        "Multi-scale": ("recipe", "passes", "selection", "merge"),
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


# --- pictures


def _pictures(
    run: RunFolder, truth: Mapping[str, Any], load_images: LoadImages | None
) -> tuple[Gallery | None, list[FindingGroup]]:
    if not truth:
        return None, []
    detections = {mode: read_detections(run.path, mode) for mode in MODES}
    mode, diagnosis = next(((mode, one.diagnosis) for mode, one in run.evaluations.items() if one.diagnosis), ("", {}))
    names = {image["id"]: str(image.get("file_name") or image["id"]) for image in truth["images"]}
    count = int(get(run.spec, "tracking.report_images", 12))
    try:
        load = load_images or ShardImages(run.shards, [image["id"] for image in truth["images"]])
        gallery = build_gallery(truth, detections, load, count=count, titles=MODE_TITLES)
        return gallery, finding_groups(
            diagnosis,
            names,
            load,
            drawn=_worst_boxes(truth, detections.get(mode, []), diagnosis),
            class_names=[one["name"] for one in sorted(truth["categories"], key=lambda category: category["id"])],
        )
    except Exception as error:  # pictures are worth less than the page
        logger.warning("The report has no pictures: %s", error)
        return None, []


def _worst_boxes(
    truth: Mapping[str, Any], rows: list[dict[str, Any]], diagnosis: Mapping[str, Any]
) -> dict[int, Boxes]:
    """Detections on the worst images that are as confident as those of the confusion matrix."""
    try:
        ids = [row["image_id"] for row in diagnosis["worst_images"]]
        return find_from(truth, rows, ids, float(diagnosis["confusion"]["score"]))
    except (KeyError, TypeError, ValueError):  # no diagnosis, or one of another layout
        return {}


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


def _repeat(run: RunFolder) -> list[str]:
    """Commands that run the same job again; empty where the spec is not known."""
    if not run.spec:
        return []
    commit = str(run.environment.get("commit") or "")
    commands = []
    if commit:
        remark = "  # there were changes beside it" if commit.endswith("+changes") else ""
        commands.append(f"git checkout {commit.removesuffix('+changes')}{remark}")
    spec = shlex.quote(storage.join(run.path, "spec.yaml"))
    return [*commands, f"refinedet launch {spec} {shlex.quote(f'name={run.name}-again')}"]


def _files(run: RunFolder) -> list[str]:
    """Files of the run that a reader may want, relative to the report."""
    names = ["spec.yaml", "metrics.json", "metrics.jsonl", "detections/single.json", "detections/multiscale.json"]
    names += ["ground_truth.json", "weights.safetensors", "ledger.json", "environment.json"]
    for mode in MODES:  # what a server takes: a zip, or a directory of text files
        folder = f"submission/{mode}"
        names += [f"{folder}/{name}" for name in storage.list_folder(storage.join(run.path, folder))]
    return [name for name in names if storage.exists(storage.join(run.path, name))]
