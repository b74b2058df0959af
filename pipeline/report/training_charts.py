"""The report's pictures of training: curves over epochs, where a step's time goes, and where the job's time went."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from refinedet.pipeline.report import charts
from refinedet.pipeline.report.charts import Series
from refinedet.pipeline.report.run_data import RunFolder

_LOSSES = {
    "arm_class": "ARM class",
    "arm_box": "ARM box",
    "adm_class": "ADM class",
    "adm_box": "ADM box",
}
_STEP_PARTS = {
    "forward_s": "forward",
    "backward_s": "backward",
    "optimizer_s": "optimizer",
    "reduce_s": "reduce",
    "data_wait_s": "data wait",
    "checkpoint_s": "checkpoint",
}
_LEDGER_PARTS = ("useful_s", "lost_s", "restart_s", "waiting_s")


def curves(run: RunFolder) -> list[str]:
    return [_loss_chart(run), _ap_chart(run), _survivor_chart(run), _rate_chart(run), _learning_rate_chart(run)]


def epochs_of(run: RunFolder, rows: Sequence[Mapping[str, float]]) -> list[float]:
    """Position of each row in epochs, a fraction within an epoch."""
    steps_per_epoch = max(_steps_per_epoch(run), 1e-9)
    return [row["step"] / steps_per_epoch for row in rows]


def _steps_per_epoch(run: RunFolder) -> float:
    """From the whole number of steps where it is known; else read off the records of the epochs that are over."""
    last = run.steps[-1] if run.steps else {}
    epochs = get(run.spec, "training.epochs")
    if isinstance(epochs, int) and (last.get("total_steps") or last.get("epoch") == epochs - 1):
        return last.get("total_steps", last["step"]) / epochs
    firsts: dict[float, float] = {}
    for row in run.steps:
        if "epoch" in row:
            firsts.setdefault(row["epoch"], row["step"])
    if len(firsts) > 1:
        return (firsts[max(firsts)] - firsts[min(firsts)]) / (max(firsts) - min(firsts))
    return last.get("step", 1.0) / (last.get("epoch", 0.0) + 1)


def _line(run: RunFolder, key: str) -> tuple[list[float], list[float]]:
    rows = [row for row in run.steps if key in row]
    return epochs_of(run, rows), [row[key] for row in rows]


def _loss_chart(run: RunFolder) -> str:
    series = []
    window = max(5, len(run.steps) // 30)
    x, y = _line(run, "loss")
    top = 0.0
    if y:
        mean = charts.smoothed(y, window)
        series += [Series("", x, y, 1, faint=True), Series("total", x, mean, 1)]
        top = sorted(mean)[int(0.99 * (len(mean) - 1))] * 1.05
    for colour, (key, name) in enumerate(_LOSSES.items(), start=2):
        x, y = _line(run, key)
        if y:
            series.append(Series(name, x, charts.smoothed(y, window), colour))
    return charts.line_chart(
        "Loss", series, note="its parts, smoothed", y_max=top or None, y_format="{:.2f}", x_min=0.0
    )


def _ap_chart(run: RunFolder) -> str:
    series = []
    for colour, name in enumerate(("AP50", "AP", "AP75", "mAP"), start=1):
        rows = [row for row in run.validations if name in row and row[name] >= 0]
        if rows:
            series.append(Series(name, epochs_of(run, rows), [row[name] for row in rows], colour, dots=True))
    where = "training images" if get(run.spec, "training.validate_on") == "train" else "validation images"
    return charts.line_chart("Average precision", series, note=where, y_format="{:.3f}", x_min=0.0)


def _survivor_chart(run: RunFolder) -> str:
    """Shares of the anchors that the ARM's negative filter leaves, by level, and that the ADM computes."""
    series = []
    window = max(5, len(run.steps) // 30)
    names = {f"survivors_{level}": f"stride {4 * 2**level}" for level in range(1, 6)} | {"rows": "ADM rows"}
    for colour, (key, name) in enumerate(names.items(), start=1):
        x, y = _line(run, key)
        if y:
            series.append(Series(name, x, charts.smoothed(y, window), colour))
    title, note = "Anchors that survive the filter", "share of each level's anchors, smoothed"
    return charts.line_chart(title, series, note=note, y_format="{:.2f}", x_min=0.0)


def _rate_chart(run: RunFolder) -> str:
    x, y = _line(run, "images_per_s")
    if not y:
        return ""
    window = max(5, len(y) // 30)
    series = [Series("", x, y, 1, faint=True), Series("images/s", x, charts.smoothed(y, window), 1)]
    return charts.line_chart("Throughput", series, note="images per second, all workers", x_min=0.0)


def _learning_rate_chart(run: RunFolder) -> str:
    x, y = _line(run, "learning_rate")
    return charts.line_chart("Learning rate", [Series("", x, y, 1)], y_format="{:.2g}", x_min=0.0) if y else ""


def step_bar(run: RunFolder) -> str:
    """Draw the uses of a step's time, over all recorded steps."""
    totals = [(name, sum(row.get(key, 0.0) for row in run.steps)) for key, name in _STEP_PARTS.items()]
    count = len(run.steps)
    whole = sum(row.get("total_s", 0.0) for row in run.steps)
    rest = whole - sum(size for _, size in totals)
    if rest > 0.005 * whole:
        totals.append(("other", rest))
    parts = [(name, size, f"{1000 * size / count:.3g} ms") for name, size in totals if size > 0]
    return charts.share_bar(parts, label="time of a step") if len(parts) > 1 else ""


def ledger_total(run: RunFolder) -> float:
    return sum(float(run.ledger.get(key) or 0) for key in _LEDGER_PARTS)


def goodput(run: RunFolder) -> float | None:
    total = ledger_total(run)
    return float(run.ledger.get("useful_s") or 0) / total if total > 0 else None


def ledger_events(run: RunFolder) -> list[dict[str, str]]:
    events = run.ledger.get("events")
    rows = []
    for event in events if isinstance(events, list) else []:
        if isinstance(event, Mapping):
            when = event.get("time")
            clock = datetime.datetime.fromtimestamp(when, datetime.UTC).strftime("%H:%M:%S") if when else ""
            text = str(event.get("message") or event.get("text") or "")
            rows.append({"time": clock, "kind": str(event.get("kind", "")).replace("_", " "), "text": text})
    return rows


def duration(seconds: float) -> str:
    """A length of time as people write it: 42 s, 3 m 20 s, 2 h 5 m, 4 d 3 h."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} m {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} m" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def get(spec: Mapping[str, Any], path: str, default: Any = None) -> Any:
    """The value at a dotted path, or `default` where it is not set."""
    value: Any = spec
    for name in path.split("."):
        if not isinstance(value, Mapping) or value.get(name) is None:
            return default
        value = value[name]
    return value
