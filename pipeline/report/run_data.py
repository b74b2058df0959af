"""A run as its directory holds it, for the report: what is missing or broken is excluded, and listed.

Files: `spec.yaml`, `tracking.json`, `metrics.jsonl` (one line per step and per validation), `metrics.json`
({"single": ..., "multiscale": ..., "merge_rules": [...]}), `detections/single.json` and `detections/multiscale.json`,
`ground_truth.json`, `data.json`, `ledger.json`, `environment.json`, `timeline.jsonl`, `goodput/attempt-*.json`.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.directory import JOB_STATISTICS, check_run_directory
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.lines import read_lines
from refinedet.pipeline.runs.metrics_file import metric_values
from refinedet.pipeline.runs.redaction import redact
from refinedet.pipeline.runs.timeline import Span, read_timeline

logger = logging.getLogger(__name__)

MODES = ("single", "multiscale")
MAX_RUNS = 6
"""in a comparison: as many columns as a page holds"""


@dataclass(frozen=True)
class EvaluationResult:
    """One evaluation. Values are 0..1, or None where there is no truth to measure by.

    values     name -> value, of the metric that the evaluation was made by
    per_class  class name -> name -> value
    curves     IoU ("0.50") -> mean precision over classes at evenly spaced recalls from 0 to 1
    """

    values: dict[str, float | None]
    per_class: dict[str, dict[str, float | None]]
    curves: dict[str, list[float]] = field(default_factory=dict)
    diagnosis: dict[str, Any] = field(default_factory=dict)
    """as the evaluation writes it; empty where it was not made"""
    unreadable: list[dict[str, Any]] = field(default_factory=list)
    """images without detections because they could not be read: {"image_id", "file_name", "reason"}"""


@dataclass(frozen=True)
class RunFolder:
    path: str
    name: str
    spec: dict[str, Any]
    """resolved and redacted; empty where there is none"""
    tracking: dict[str, Any]
    steps: list[dict[str, float]]
    """ascending by step; a step that was taken twice counts as it was taken last"""
    validations: list[dict[str, float]]
    """ascending by step: {"step", "epoch", "AP", ...}"""
    evaluations: dict[str, EvaluationResult]
    """by mode, in the order of MODES"""
    merge_rules: list[dict[str, Any]]
    ledger: dict[str, Any]
    environment: dict[str, Any]
    data: dict[str, Any]
    """statistics of the data; empty for runs of earlier releases"""
    missing: list[str]
    """files that do not exist or cannot be read"""
    shards: str
    """directory of the validation shards"""
    attempts: list[dict[str, Any]]
    """pages of the goodput ledger, one for each start of training"""
    spans: list[Span]
    marks: list[tuple[str, float]]
    """the job's timeline"""

    @property
    def status(self) -> str:
        """MLflow's word; without a run in MLflow, as of a job that failed before one began, by the last stage's end."""
        ended = {"failed": "FAILED", "stopped": "KILLED"}.get(self.spans[-1].status if self.spans else "", "UNKNOWN")
        return str(self.tracking.get("status", ended))


def read_runs(paths: Sequence[str]) -> list[RunFolder]:
    """Read two to six runs, to compare them; UserError for another number, or where a directory is no run's."""
    if not 2 <= len(paths) <= MAX_RUNS:
        raise UserError(f"Give 2 to {MAX_RUNS} runs to compare, received {len(paths)}.")
    for path in paths:
        check_run_directory(path)
    return [read_run(path) for path in paths]


def read_run(path: str) -> RunFolder:
    """Read everything except the pictures."""
    missing: list[str] = []
    spec = _read(path, "spec.yaml", missing, dict)
    metrics = _read(path, "metrics.json", missing, dict)
    steps, validations = _read_records(path, missing)
    evaluations = {mode: _evaluation(metrics[mode]) for mode in MODES if isinstance(metrics.get(mode), Mapping)}
    rules = metrics.get("merge_rules")
    spans, marks = read_timeline(path)
    data = spec.get("data")
    shards = data.get("shards") if isinstance(data, Mapping) else None
    return RunFolder(
        path=path,
        name=str(spec.get("name") or path.rstrip("/").rsplit("/", 1)[-1]),
        spec=redact(spec),
        tracking=redact(_read(path, "tracking.json", missing, dict)),
        steps=steps,
        validations=validations,
        evaluations=evaluations,
        merge_rules=[
            {**row, **_measured(row)} for row in (rules if isinstance(rules, list) else []) if isinstance(row, Mapping)
        ],
        ledger=_read(path, "ledger.json", missing, dict),
        environment=redact(_read(path, "environment.json", missing, dict)),
        data=_read(path, JOB_STATISTICS, [], dict),
        missing=missing,
        shards=storage.join(storage.absolute(str(shards)) if shards else storage.join(path, "shards"), "val"),
        attempts=_attempts(path),
        spans=spans,
        marks=marks,
    )


def read_detections(path: str, mode: str) -> list[dict[str, Any]]:
    """COCO result rows of one mode; empty where there are none."""
    rows = _read(path, f"detections/{mode}.json", [], list)
    return [row for row in rows if isinstance(row, dict) and {"image_id", "category_id", "bbox", "score"} <= set(row)]


def read_ground_truth(path: str, part: str = "val") -> dict[str, Any]:
    """COCO instances of the images of a part, "val" or "train"; empty where there are none."""
    name = "ground_truth.json" if part == "val" else f"ground_truth_{part}.json"
    truth = _read(path, name, [], dict)
    whole = all(isinstance(truth.get(key), list) for key in ("images", "annotations", "categories"))
    return truth if whole else {}


def _read(path: str, name: str, missing: list[str], kind: type) -> Any:
    file = storage.join(path, name)
    try:
        content = storage.read_bytes(file).decode()
        value = yaml.safe_load(content) if name.endswith(".yaml") else json.loads(content)
        if not isinstance(value, kind):
            raise ValueError(f"holds a {type(value).__name__}")
        return value
    except FileNotFoundError:
        pass
    except (OSError, ValueError, yaml.YAMLError) as error:
        logger.warning("%s is excluded from the report: %s", file, error)
    missing.append(name)
    return kind()


def _read_records(path: str, missing: list[str]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    file = storage.join(path, "metrics.jsonl")
    try:
        lines = read_lines(file)
    except OSError:
        lines = []
    if not lines:
        missing.append("metrics.jsonl")
    steps: dict[float, dict[str, float]] = {}
    validations: dict[float, dict[str, float]] = {}
    for record in lines:
        try:
            step = float(record["step"])
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(record.get("validation"), Mapping):
            values = record["validation"]
            validations[step] = _numbers({"step": step, "epoch": record.get("epoch"), **values})
        else:
            steps[step] = _numbers(_flat_record(record))
    return [steps[step] for step in sorted(steps)], [validations[step] for step in sorted(validations)]


def _flat_record(record: Mapping[str, Any]) -> dict[str, Any]:
    """A step's record without its groups `losses`, `shares`, `times`: "loss", "arm_box", "rows", "forward_s"."""
    flat = {name: value for name, value in record.items() if not isinstance(value, Mapping | list)}
    for name, value in (record.get("losses") or {}).items():
        flat["loss" if name == "total" else name] = value
    flat.update(record.get("shares") or {})
    for name, value in (record.get("times") or {}).items():
        flat["data_wait_s" if name == "data" else f"{name}_s"] = value
    return flat


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value
    }


def _evaluation(content: Mapping[str, Any]) -> EvaluationResult:
    values = metric_values(content)
    rows = content.get("per_class") or {}
    if isinstance(rows, list):  # [{"name": ..., "AP": ...}, ...]
        rows = {str(row.get("name")): row for row in rows if isinstance(row, Mapping)}
    per_class = {str(name): _measured(row if isinstance(row, Mapping) else {"AP": row}) for name, row in rows.items()}
    diagnosis, unreadable = content.get("diagnosis"), content.get("unreadable")
    images = unreadable.get("images") if isinstance(unreadable, Mapping) else None
    return EvaluationResult(
        _measured(values),
        per_class,
        _mean_curves(content.get("curves")),
        dict(diagnosis) if isinstance(diagnosis, Mapping) else {},
        [dict(row) for row in images if isinstance(row, Mapping)] if isinstance(images, list) else [],
    )


def _attempts(path: str) -> list[dict[str, Any]]:
    directory = storage.join(path, "goodput")
    names = [name for name in storage.list_folder(directory) if re.fullmatch(r"attempt-\d+\.json", name)]
    pages = [_read(path, f"goodput/{name}", [], dict) for name in sorted(names)]
    return [page for page in pages if page]


def _measured(values: Mapping[str, Any]) -> dict[str, float | None]:
    """Numbers only; COCO's -1, nothing to measure by, becomes None."""
    return {name: value if value >= 0 else None for name, value in _numbers(values).items()}


def _mean_curves(curves: Any) -> dict[str, list[float]]:
    """Mean over classes of {"precision50": {class: [precision at each recall]}}, by IoU: {"0.50": [...]}."""
    means: dict[str, list[float]] = {}
    for name, by_class in curves.items() if isinstance(curves, Mapping) else ():
        if not (str(name).startswith("precision") and isinstance(by_class, Mapping)):
            continue
        rows = [row for row in by_class.values() if isinstance(row, list) and row and min(row) >= 0]
        if rows and len({len(row) for row in rows}) == 1:
            means[f"0.{str(name).removeprefix('precision')}"] = [sum(col) / len(col) for col in zip(*rows, strict=True)]
    return means
