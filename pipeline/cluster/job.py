"""State that the stages of one launch share: the run, its MLflow run, the terminal, and what Ray keeps for it."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from refinedet.pipeline.cluster.job_tracking import begin_tracking, update_description
from refinedet.pipeline.cluster.mailbox import Mailbox
from refinedet.pipeline.cluster.recorder import METRICS_LOG
from refinedet.pipeline.cluster.result_pictures import ResultPictures
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.report.report import build_report
from refinedet.pipeline.report.summary import merge_rule_rows, summary_rows
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import StoppedError, UserError
from refinedet.pipeline.runs.logs import log_folder
from refinedet.pipeline.runs.progress import ProgressDisplay, summary_table
from refinedet.pipeline.runs.timeline import Timeline
from refinedet.pipeline.tracking.runs import RunTracker

logger = logging.getLogger(__name__)

_ARTIFACTS = ("spec.yaml", "metrics.json", "detections/single.json", "detections/multiscale.json")


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
        self._beside = self._stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="tracking"))
        self._begun: Future[RunTracker] | None = None
        self._timeline = Timeline(run.path)

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @cached_property
    def mailbox(self) -> Mailbox:
        return self._stack.enter_context(Mailbox())

    @cached_property
    def pictures(self) -> ResultPictures:
        return self._stack.enter_context(contextlib.closing(ResultPictures(self.run)))

    def keep(self, resource: Any) -> Any:
        """Enter a context manager, which ends with the job."""
        return self._stack.enter_context(resource)

    @property
    def begun(self) -> Future[RunTracker]:
        """The MLflow run, begun by the first stage that needs it and beside that stage: it may take long to answer.

        The data is prepared by then, so that a mistake in it leaves no failed run.
        """
        if self._begun is None:
            self._begun = self._beside.submit(begin_tracking, self.run)
        return self._begun

    @property
    def tracker(self) -> RunTracker:
        """Waits until the MLflow run has begun; raises what beginning it raised."""
        return self.begun.result()

    def run_stage(self, stage: Stage) -> None:
        """Run a stage unless it is done, and commit its manifest."""
        if self.stop.is_set():
            raise StoppedError(f"before the stage {stage.name}; run the same command again to resume")
        if self._begun and self._begun.done():
            self._begun.result()
        with storage.patience():
            inputs = stage.inputs(self)
        if inputs is None:
            return
        logger.info("stage %s begins", stage.name)
        self.display.stage(stage.name, unit=stage.unit)
        with storage.patience():
            done_before = inputs and self.run.stage_is_done(stage.name, inputs)
        if done_before:
            self.display.done("done before")
            return
        with self._timeline.stage(stage.name):
            outcome = stage.run(self)
            with storage.patience():
                if inputs:
                    self.run.commit_stage(stage.name, inputs, list(outcome.outputs))
        self.display.done(outcome.text)

    def fail(self, error: BaseException) -> None:
        """End the MLflow run as `error` ended the job, and build the report; must not hide the error."""
        stopped, trained = isinstance(error, StoppedError), storage.exists(self.run.file(METRICS_LOG))
        reason = str(error) if stopped else f"{type(error).__name__}: {error}"
        status = "KILLED" if stopped else "FAILED"
        try:
            if self._begun and self._begun.exception() is None:
                if isinstance(error, UserError) and not trained and not self.tracker.resumed:
                    self.tracker.discard(reason)
                else:
                    update_description(self.tracker, self.run, status)
                    self.tracker.finish(status, reason)
            if trained and not stopped:
                build_report(self.run.path)
        except Exception:
            logger.exception("the end of the job could not be recorded")

    def finish(self) -> None:
        """Log what is left to MLflow, end its run, and print where everything is."""
        with storage.patience():
            self._finish()

    def _finish(self) -> None:
        self.pictures.close()
        profile = [f"profile/{name}" for name in storage.list_folder(self.run.file("profile"))]
        for name in (*_ARTIFACTS, *profile) if self._begun else ():
            if storage.exists(self.run.file(name)):
                self.tracker.log_artifact(self.local_copy(self.run.file(name)), os.path.dirname(name) or None)
        if self._begun and not self.tracker.finish("FINISHED"):
            self.display.warn(
                f"MLflow ({self.tracker.location}) did not take all; {log_folder(self.run.path)} has the reason, and "
                "the run directory has it all"
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
            ("model", f"in MLflow, and as a directory for mlflow.pyfunc.load_model: {self.model_folder}"),
            ("MLflow", self.tracker.location if self._begun else ""),
            ("logs", log_folder(self.run.path)),
        ):
            shown = where.replace(os.getcwd() + os.sep, "")
            if shown and (what not in ("report", "weights") or storage.exists(where)):
                self.display.console.print(f"  {what:<8} {shown}", markup=False, soft_wrap=True)
