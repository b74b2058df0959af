"""The driver's side of training's records: the bar, `metrics.jsonl`, MLflow, Prometheus."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import ray
from refinedet.pipeline.cluster.gauges import TrainingGauges
from refinedet.pipeline.cluster.result_pictures import ResultPictures
from refinedet.pipeline.cluster.worker_task import NodeSample
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.lines import LinesLog, read_lines
from refinedet.pipeline.runs.progress import ProgressDisplay
from refinedet.pipeline.training.goodput import read_goodput
from refinedet.pipeline.training.records import Event, StepRecord
from rich.markup import escape

if TYPE_CHECKING:
    from refinedet.pipeline.tracking.runs import RunTracker

logger = logging.getLogger(__name__)

METRICS_LOG = "metrics.jsonl"
EVENTS_LOG = "events.jsonl"
_TOLD = ("preflight", "resumed", "resized")
_WARNED = (
    "passed_over",
    "skipped",
    "save_failed",
    "straggler",
    "stalled",
    "restarted",
    "preempted",
    "waiting",
)


class TrainingRecorder:
    """Takes the messages of `run_training`.

    tracker   may begin later than the workers do; what beginning it raised is raised at the first message
    pictures  draws what validations found
    """

    def __init__(
        self, run: Run, display: ProgressDisplay, tracker: Future[RunTracker], pictures: ResultPictures
    ) -> None:
        self._display, self._begun, self._pictures = display, tracker, pictures
        self._run = run
        self._gauges = TrainingGauges(run.spec.name)
        self._metrics = LinesLog(run.file(METRICS_LOG))
        self._events = LinesLog(run.file(EVENTS_LOG))
        self._every = run.spec.tracking.log_every_steps
        self._counts = Counter(event["kind"] for event in read_lines(self._run.file(EVENTS_LOG)))
        self._last_step = 0
        self._logged: set[int] | None = None
        self._validated_on = {"val": "validation", "train": "training"}[run.spec.training.validate_on]

    @property
    def _tracker(self) -> RunTracker:
        return self._begun.result()

    def __call__(self, message: StepRecord | Event | NodeSample) -> None:
        if self._begun.done():
            self._begun.result()
        if isinstance(message, NodeSample):
            if message.node != ray.get_runtime_context().get_node_id():  # which the tracker samples by itself
                self._tracker.log_load(message.values)
        elif isinstance(message, StepRecord):
            self._step(message)
        else:
            self._event(message)

    def close(self) -> None:
        self._metrics.close()
        self._events.close()
        try:
            self._write_ledger()
        except Exception:  # must not hide how training ended
            logger.exception("the ledger of the run's time could not be written")

    def _write_ledger(self) -> None:
        """Write where the time went, for the report and MLflow; a run that never took a step has no ledger."""
        ledger = asdict(read_goodput(self._run.path))
        if not ledger["attempts"]:
            return
        storage.write_json(self._run.file("ledger.json"), {**ledger, "events": read_lines(self._run.file(EVENTS_LOG))})
        self._tracker.log_metrics(self._last_step, {f"goodput/{name}": float(value) for name, value in ledger.items()})

    def _step(self, record: StepRecord) -> None:
        self._last_step = record.step
        self._display.update(
            record.step,
            record.total_steps,
            unit="steps",
            epoch=str(record.epoch + 1),
            loss=f"{record.losses.get('total', float('nan')):.3f}",
            lr=f"{record.learning_rate:.2g}",
            speed=f"{record.images_per_s:.1f} images/s",
        )
        self._gauges.step(record)
        if record.step % self._every and record.step != record.total_steps:
            return
        if self._logged is None:
            self._logged = self._deliver_earlier()
        line = record.line()
        self._metrics.append(line)
        self._log(line)

    def _deliver_earlier(self) -> set[int]:
        """Log the steps of earlier starts that MLflow lacks, since their driver was killed; return all that it has."""
        if not self._tracker.resumed:
            return set()
        self._logged = self._tracker.logged_steps("loss/total")
        for line in read_lines(self._run.file(METRICS_LOG)):
            if "losses" in line:
                self._log(line)
        return self._logged

    def _log(self, line: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl, unless its step was logged before: steps after a save are taken again."""
        assert self._logged is not None
        if line["step"] in self._logged:
            return
        self._logged.add(line["step"])
        self._tracker.log_metrics(
            line["step"],
            {
                **{f"loss/{name}": value for name, value in line["losses"].items()},
                **{f"anchors/{name}": value for name, value in line["shares"].items()},
                **{f"time/{name}_s": value for name, value in line["times"].items()},
                **{name: line[name] for name in ("epoch", "learning_rate", "gradient_norm", "images_per_s")},
                **{name: line[name] for name in ("model_tflops", "mfu") if name in line},
                "memory_gb": line["memory_bytes"] / 2**30,
            },
            time_s=line["time"],
        )

    def _event(self, event: Event) -> None:
        logger.info("%s at step %s: %s", event.kind, event.step, event.message)
        self._events.append({"time": time.time(), **asdict(event)})
        if event.kind == "validated":
            self._validated(event)
        elif event.kind in _TOLD:
            self._display.note(f"  {escape(event.message)}")
        elif event.kind in _WARNED:
            self._display.warn(event.message)
            self._counts[event.kind] += 1
            self._tracker.log_metrics(event.step, {f"events/{event.kind}": self._counts[event.kind]})
        if event.kind in _WARNED or event.kind in _TOLD:
            self._tracker.set_tags({f"last_{event.kind}": f"step {event.step}: {event.message}"})

    def _validated(self, event: Event) -> None:
        values = {name: float(value) for name, value in event.facts.items() if isinstance(value, int | float)}
        epoch = int(values.pop("epoch"))
        self._metrics.append({"step": event.step, "epoch": epoch, "validation": values})
        self._pictures.log_validation(self._tracker, event.step, epoch)
        self._gauges.validated(values)
        self._tracker.log_metrics(event.step, {f"validation/{name}": value for name, value in values.items()})
        shown = "  ".join(f"{name} {values[name]:.3f}" for name in ("AP", "AP50", "mAP") if name in values)
        self._display.note(f"  {event.message}: {shown} on the {self._validated_on} images")
