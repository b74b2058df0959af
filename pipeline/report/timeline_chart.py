"""Charts of a job's time: stages from submission to the end, and the uses of training's time."""

from __future__ import annotations

import datetime
from typing import Any

from markupsafe import Markup
from refinedet.pipeline.report import charts
from refinedet.pipeline.report.run_data import RunFolder
from refinedet.pipeline.report.training_charts import duration

_ENDED = "ended"
_WAITING = "starting, stopped, between stages"


def timeline_view(run: RunFolder) -> dict[str, Any]:
    """The whole job, from its first mark to its last sign of life; empty where no timeline was written."""
    times = [at for _, at in run.marks] + [at for span in run.spans for at in (span.begin, span.end) if at is not None]
    if len(times) < 2:
        return {}
    begin, end = min(times), max(times)
    whole = max(end - begin, 1e-9)
    rows, parts, covered = [], {}, 0.0
    for index, span in enumerate(run.spans):
        later = [other.begin for other in run.spans[index + 1 :]]
        stop = span.end if span.end is not None else min([*later, end])
        seconds = max(stop - span.begin, 0.0)
        covered += seconds
        parts[span.name] = parts.get(span.name, 0.0) + seconds
        rows.append(
            {
                "name": span.name,
                "left": 100 * (span.begin - begin) / whole,
                "width": 100 * seconds / whole,
                "clock": _clock(span.begin),
                "duration": duration(seconds),
                "status": span.status or "not ended",
            }
        )
    parts[_WAITING] = max(whole - covered, 0.0)
    names = [(name, seconds, duration(seconds)) for name, seconds in parts.items()]
    return {
        "rows": rows,
        "total": duration(whole),
        "starts": max(1, sum(name == "launched" for name, _ in run.marks)),
        "from": "submission" if any(name == "submitted" for name, _ in run.marks) else "the first start",
        "bar": Markup(charts.share_bar(names, label="time of the whole job")),
    }


def training_bar(run: RunFolder) -> Markup:
    """Draw the uses of training's time, starts and restarts apart."""
    start, restarts = split_starts(run)
    parts = [
        ("useful", _seconds(run, "useful_s")),
        ("lost, and done again", _seconds(run, "lost_s")),
        ("start", start),
        ("restarts", restarts),
        ("waiting for data and saves", _seconds(run, "waiting_s")),
    ]
    return Markup(charts.share_bar([(name, size, duration(size)) for name, size in parts], label="time of training"))


def split_starts(run: RunFolder) -> tuple[float, float]:
    """Seconds until the first step of the first start, and of all later ones."""
    both = _seconds(run, "restart_s")
    if num_restarts(run) == 0:
        return both, 0.0
    first = run.attempts[0] if run.attempts else {}
    begun, stepped = first.get("started_at"), first.get("first_step_at")
    start = stepped - begun if isinstance(begun, int | float) and isinstance(stepped, int | float) else 0.0
    start = min(max(start, 0.0), both)
    return start, both - start


def num_restarts(run: RunFolder) -> int:
    """Starts of training after the first."""
    attempts = run.ledger.get("attempts")
    count = int(attempts) if isinstance(attempts, int | float) else len(run.attempts)
    return max(count - 1, 0)


def _seconds(run: RunFolder, name: str) -> float:
    value = run.ledger.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _clock(time_s: float) -> str:
    return datetime.datetime.fromtimestamp(time_s, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
