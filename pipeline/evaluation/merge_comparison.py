"""Every merge rule on the same multi-scale detections: which one suits a model, at the cost of one test."""

from __future__ import annotations

from collections.abc import Mapping

from refinedet.pipeline.evaluation.protocols import Metrics


def sort_by_metric(metrics: Mapping[str, Metrics]) -> dict[str, Metrics]:
    """The same, by descending AP (mAP)."""
    return dict(sorted(metrics.items(), key=lambda entry: -next(iter(entry[1].values.values()))))


def format_comparison(metrics: Mapping[str, Metrics]) -> str:
    """A table in plain text, a rule a line, percent; - where there is no truth to measure by."""
    width = max((len(name) for name in metrics), default=0)
    columns = list(dict.fromkeys(key for one in metrics.values() for key in one.values))
    lines = [" " * width + "".join(f"{name:>7}" for name in columns)]
    for name, one in metrics.items():
        numbers = (one.values[key] for key in columns)
        lines.append(f"{name:{width}}" + "".join(f"{100 * n:7.1f}" if n >= 0 else f"{'-':>7}" for n in numbers))
    return "\n".join(lines)
