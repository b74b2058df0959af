"""A training run in numbers that Prometheus collects with Ray's own: `ray_refinedet_<name>{run="..."}`.

Created in the driver once Ray is connected; it costs nothing where no one collects a cluster's metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from ray.util.metrics import Gauge
from refinedet.pipeline.training.records import StepRecord

GAUGES = {
    "step": "steps taken",
    "total_steps": "steps that training takes",
    "loss": "loss, the sum of its parts",
    "learning_rate": "learning rate",
    "images_per_second": "images per second, all workers",
    "memory_bytes": "device memory in use at its highest, or resident memory on a CPU, of the first worker",
    "skipped_steps": "steps skipped for a loss or gradient that was not finite",
}
_ATTRIBUTES = {name: name for name in GAUGES if name not in ("loss", "images_per_second")} | {
    "images_per_second": "images_per_s"
}
STEP_SECONDS = "step_seconds"
"""seconds of the last step, by `part`: data, forward, backward, reduce, optimizer, checkpoint"""
VALIDATION = "validation"
"""last validation, by `metric`: AP, AP50, ..."""


class TrainingGauges:
    """Keeps the gauges of one run at the last record."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges = {
            name: Gauge(f"refinedet_{name}", description=text, tag_keys=("run",)) for name, text in GAUGES.items()
        }
        self._times = Gauge(f"refinedet_{STEP_SECONDS}", description="parts of a step", tag_keys=("run", "part"))
        self._validation = Gauge(f"refinedet_{VALIDATION}", description="validation", tag_keys=("run", "metric"))

    def step(self, record: StepRecord) -> None:
        values = {name: getattr(record, attribute) for name, attribute in _ATTRIBUTES.items()}
        for name, value in {**values, "loss": record.losses.get("total")}.items():
            if value is not None:
                self._gauges[name].set(float(value), tags=self._tags)
        for part, seconds in asdict(record.times).items():
            if part != "total":
                self._times.set(float(seconds), tags={**self._tags, "part": part})

    def validated(self, values: Mapping[str, float]) -> None:
        for metric, value in values.items():
            self._validation.set(float(value), tags={**self._tags, "metric": metric})
