"""State that the stages of one launch share: the run, its MLflow run, the terminal, and what Ray keeps for it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from refinedet.pipeline.cluster.capacity import gpus_of
from refinedet.pipeline.cluster.mailbox import Mailbox
from refinedet.pipeline.cluster.progress import ProgressDisplay, summary_table
from refinedet.pipeline.cluster.session import session_nodes
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.report.report import build_report
from refinedet.pipeline.report.summary import merge_rule_rows, summary_rows
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.environment import describe_environment
from refinedet.pipeline.runs.errors import StoppedError
from refinedet.pipeline.runs.logs import log_folder, restore_loggers
from refinedet.pipeline.tracking.runs import RunTracker

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """Result of a stage.

    text     for the terminal
    outputs  files, relative to the run, which the manifest of the stage lists
    """

    text: str
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """One step of a job.

    inputs  what the stage depends on, as JSON values; None: the spec has no use for the stage; empty: the stage itself
            finds what is done already
    run     do it
    unit    of its progress
    """

    name: str
    inputs: Callable[[Job], Mapping[str, Any] | None]
    run: Callable[[Job], Outcome]
    unit: str = ""


class Job:
    """One launch of a run; a context manager that ends what the stages started."""

    def __init__(self, run: Run, display: ProgressDisplay, stop: threading.Event) -> None:
        self.run, self.spec, self.display, self.stop = run, run.spec, display, stop
        self._stack = ExitStack()
        # MLflow may take long to answer: beside the stage that writes shards.
        beside = self._stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="tracking"))
        self.begun: Future[RunTracker] = beside.submit(_begin_tracking, run)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def mailbox(self) -> Mailbox:
        return self._stack.enter_context(Mailbox())

    def keep(self, resource: Any) -> Any:
        """Enter a context manager, which ends with the job."""
        return self._stack.enter_context(resource)

    @property
    def tracker(self) -> RunTracker:
        """Waits until the MLflow run has begun; raises what beginning it raised."""
        return self.begun.result()

    def check_tracking(self) -> None:
        """Raise what beginning the MLflow run raised, once it is known; waits for nothing."""
        if self.begun.done():
            self.begun.result()

    def run_stage(self, stage: Stage) -> None:
        """Run a stage unless it is done, and commit its manifest."""
        if self.stop.is_set():
            raise StoppedError(f"before the stage {stage.name}; run the same command again to resume")
        self.check_tracking()
        inputs = stage.inputs(self)
        if inputs is None:
            return
        logger.info("stage %s begins", stage.name)
        self.display.stage(stage.name, unit=stage.unit)
        if inputs and self.run.stage_is_done(stage.name, inputs):
            self.display.done("done before")
            return
        outcome = stage.run(self)
        if inputs:
            self.run.commit_stage(stage.name, inputs, list(outcome.outputs))
        self.display.done(outcome.text)

    def end_tracking(self, status: Literal["FAILED", "KILLED"], reason: str) -> None:
        """End the MLflow run, where it has begun; must not hide why the job ended."""
        try:
            if self.begun.exception() is None:
                self.tracker.finish(status, reason)
        except Exception:
            logger.exception("the end of the MLflow run could not be set")

    def report_after_failure(self) -> None:
        """A failed job leaves its report too; an error of the report must not hide why the job failed."""
        try:
            build_report(self.run.path)
        except Exception:
            logger.exception("the report of the failed job could not be built")

    def finish(self) -> None:
        """Log what is left to MLflow, end its run, and print where everything is."""
        for name in ("spec.yaml", "metrics.json", "detections/single.json", "detections/multiscale.json"):
            if storage.exists(self.run.file(name)):
                self.tracker.log_artifact(self.local_copy(self.run.file(name)), os.path.dirname(name) or None)
        if not self.tracker.finish("FINISHED"):
            self.display.warn(
                f"MLflow ({self.tracker.location}) did not take everything; {log_folder(self.run.path)} says what, and "
                "the run's folder has it all"
            )
        self._print_summary()

    def local_copy(self, path: str) -> str:
        """A file of the run where MLflow can read it: as long as this machine keeps the run's logs."""
        if storage.is_local(path):
            return path
        copy = os.path.join(self._local_folder, path.removeprefix(self.run.path).lstrip("/"))
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        with open(copy, "wb") as file:
            file.write(storage.read_bytes(path))
        return copy

    @property
    def _local_folder(self) -> str:
        """The run's own directory, or the one on this machine that stands for a run behind a URI."""
        return os.path.dirname(log_folder(self.run.path))

    @property
    def model_folder(self) -> str:
        return os.path.join(self._local_folder, "model")

    def _print_summary(self) -> None:
        for title, rows in (
            (f"Run {self.spec.name}", summary_rows(self.run.path)),
            ("Merge rules, multi-scale", merge_rule_rows(self.run.path)),
        ):
            if rows:
                self.display.note("")
                self.display.console.print(summary_table(title, list(rows[0]), rows))
        self.display.note("")
        for what, where in (
            ("report", self.run.file("report.html")),
            ("weights", self.run.weights),
            ("model", f"in MLflow, and as a folder for mlflow.pyfunc.load_model: {self.model_folder}"),
            ("MLflow", self.tracker.location),
            ("logs", log_folder(self.run.path)),
        ):
            shown = where.replace(os.getcwd() + os.sep, "")
            self.display.console.print(f"  {what:<8} {shown}", markup=False, soft_wrap=True)


def _begin_tracking(run: Run) -> RunTracker:
    """Start or resume the MLflow run of the job, and log what it runs on."""
    tracker = RunTracker(run.spec.tracking, name=run.spec.name, run_dir=run.path, runs=run.runs)
    restore_loggers()
    environment: dict[str, Any] = {**describe_environment(), "devices": gpus_of(session_nodes())}
    storage.write_json(run.file("environment.json"), environment)
    tracker.log_spec(run.spec.model_dump(mode="json"))
    tracker.set_tags(
        {"commit": environment["commit"]}
        | {f"version.{name}": version for name, version in environment["versions"].items()}
    )
    return tracker
