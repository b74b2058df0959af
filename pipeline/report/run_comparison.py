"""Runs side by side: results, differences of their specs, curves, classes; and all runs of a directory as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup
from refinedet.pipeline.report import charts
from refinedet.pipeline.report.charts import Series
from refinedet.pipeline.report.report import built_at, subtitle, template_environment
from refinedet.pipeline.report.result_tables import MODE_TITLES, sorted_metrics
from refinedet.pipeline.report.run_data import RunFolder, read_run
from refinedet.pipeline.report.training_charts import duration, epochs_of, get, ledger_total
from refinedet.pipeline.report.verdict import headline, signed, verdict
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.redaction import flatten

_NOT_COMPARED = ("name", "runs")
_MAX_CLASSES = 15


@dataclass(frozen=True)
class Row:
    """One line of a comparison: a value for each run, and the last run's difference from the first."""

    name: str
    values: tuple[str, ...]
    difference: str = ""


@dataclass(frozen=True)
class Comparison:
    """Runs in the order given.

    results  metrics of every evaluation, and the time of training
    spec     settings that are not the same in all runs
    classes  AP of the classes that differ most between the first and the last run
    """

    names: tuple[str, ...]
    results: tuple[Row, ...]
    spec: tuple[Row, ...]
    classes: tuple[Row, ...]


def build_comparison(runs: Sequence[RunFolder], output: str) -> str:
    """Write the runs of `run_data.read_runs` side by side as one offline page to `output`; returns it."""
    comparison = compare_runs(runs)
    page = template_environment().get_template("comparison.html.j2").render(
        comparison=comparison,
        runs=[
            {"name": name, "subtitle": subtitle(run), "verdict": verdict(run, None), "status": run.status}
            for name, run in zip(comparison.names, runs, strict=True)
        ],
        curves=[Markup(chart) for chart in _curves(comparison.names, runs) if chart],
        built=built_at(),
    )  # fmt: skip
    storage.write_bytes(output, page.encode())
    return output


def run_rows(runs_dir: str) -> list[dict[str, str]]:
    """One row for each run below `runs_dir`, by name: status, network, steps, AP at both scales, time of training.

    Raises UserError where there is no such directory.
    """
    if not storage.is_folder(runs_dir):
        raise UserError(f"There is no directory {runs_dir}; give the one in which runs are kept.")
    rows = []
    for name in storage.list_folder(runs_dir):
        path = storage.join(runs_dir, name)
        if not storage.exists(storage.join(path, "spec.yaml")):
            continue
        run = read_run(path)
        size, backbone = get(run.spec, "model.input_size", ""), get(run.spec, "model.backbone", "")
        row = {"run": name, "status": run.status.lower(), "network": f"{backbone} {size}".strip()}
        row["steps"] = f"{int(run.steps[-1]['step'])}" if run.steps else "–"
        for mode, title in MODE_TITLES.items():
            values = run.evaluations[mode].values if mode in run.evaluations else {}
            row[f"AP, {title.lower()}"] = _score(values.get(headline(values)))
        row["training"] = duration(ledger_total(run)) if ledger_total(run) else "–"
        rows.append(row)
    return rows


def compare_runs(runs: Sequence[RunFolder]) -> Comparison:
    """Compare what `run_data.read_runs` has read."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):  # the same name in different directories
        names = [f"{name} ({index})" for index, name in enumerate(names, start=1)]
    return Comparison(tuple(names), tuple(_results(runs)), tuple(_spec_rows(runs)), tuple(_class_rows(runs)))


def _results(runs: Sequence[RunFolder]) -> list[Row]:
    rows = []
    for mode, title in MODE_TITLES.items():
        by_run = [run.evaluations[mode].values if mode in run.evaluations else {} for run in runs]
        for metric in sorted_metrics({name for found in by_run for name in found}):
            values = [found.get(metric) for found in by_run]
            if any(value is not None for value in values):
                rows.append(_score_row(f"{metric}, {title.lower()}", values))
    steps = [f"{int(run.steps[-1]['step'])}" if run.steps else "–" for run in runs]
    times = [duration(ledger_total(run)) if ledger_total(run) else "–" for run in runs]
    return [*rows, Row("steps", tuple(steps)), Row("time of training", tuple(times))]


def _spec_rows(runs: Sequence[RunFolder]) -> list[Row]:
    specs = [flatten({key: value for key, value in run.spec.items() if key not in _NOT_COMPARED}) for run in runs]
    rows = []
    for name in sorted({name for spec in specs for name in spec}):
        values = [spec.get(name) for spec in specs]
        if any(value != values[0] for value in values):
            rows.append(Row(name, tuple("–" if value is None else str(value) for value in values)))
    return rows


def _class_rows(runs: Sequence[RunFolder]) -> list[Row]:
    by_run: list[Mapping[str, Any]] = [
        next(iter(run.evaluations.values())).per_class if run.evaluations else {} for run in runs
    ]
    rows = []
    for name in by_run[0]:
        values = [found.get(name, {}).get("AP") for found in by_run]
        if values[0] is not None and values[-1] is not None:
            rows.append((abs(values[-1] - values[0]), _score_row(name, values)))
    return [row for _, row in sorted(rows, key=lambda pair: -pair[0])[:_MAX_CLASSES]]


def _score_row(name: str, values: Sequence[float | None]) -> Row:
    first, last = values[0], values[-1]
    difference = signed(last - first) if first is not None and last is not None else ""
    return Row(name, tuple(_score(value) for value in values), difference)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _curves(names: Sequence[str], runs: Sequence[RunFolder]) -> list[str]:
    """Total loss and the validation's metric of all runs, over epochs."""
    losses, validations = [], []
    for colour, (name, run) in enumerate(zip(names, runs, strict=True), start=1):
        rows = [row for row in run.steps if "loss" in row]
        smooth = charts.smoothed([row["loss"] for row in rows], max(5, len(rows) // 30))
        losses.append(Series(name, epochs_of(run, rows), smooth, colour))
        metric = "AP" if any("AP" in row for row in run.validations) else "mAP"
        rows = [row for row in run.validations if row.get(metric, -1) >= 0]
        validations.append(Series(name, epochs_of(run, rows), [row[metric] for row in rows], colour, dots=True))
    return [
        charts.line_chart("Loss", losses, note="total, smoothed", y_format="{:.2f}", x_min=0.0),
        charts.line_chart("Average precision", validations, note="in training", y_format="{:.3f}", x_min=0.0),
    ]
