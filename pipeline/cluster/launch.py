"""`refinedet launch`: the stages of a job, one after the other, each done once."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal

from refinedet.pipeline.cluster.capacity import gpus_of
from refinedet.pipeline.cluster.progress import ProgressDisplay, summary_table
from refinedet.pipeline.cluster.session import load_ray, ray_session, session_nodes
from refinedet.pipeline.config.checks import check_spec
from refinedet.pipeline.config.identity import lasting_part
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.environment import describe_environment
from refinedet.pipeline.runs.errors import StoppedError, UserError
from refinedet.pipeline.runs.logs import log_folder, log_to_file, restore_loggers

if TYPE_CHECKING:
    from refinedet.pipeline.cluster.detection_pool import DetectionPool
    from refinedet.pipeline.cluster.monitor import Monitor
    from refinedet.pipeline.tracking.runs import RunTracker

logger = logging.getLogger(__name__)

STAGES = ("prepare", "train", "evaluate", "multiscale", "report")


def launch(
    spec: JobSpec,
    *,
    address: str | None = None,
    stages: Sequence[str] = STAGES,
    display: ProgressDisplay,
) -> None:
    """Run the stages of a job that are not done yet, here or on the cluster at `address`.

    Raises UserError for a mistake in the spec or its data, StoppedError after a stop that was asked for (SIGINT,
    SIGTERM), JobError for a failure that retries did not overcome.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise UserError(f"There is no stage {unknown[0]!r}; the stages are {', '.join(STAGES)}.")
    run = Run(spec)
    check_spec(spec)
    check_weights(spec)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals(display))
        stack.enter_context(run.open(on_lost=lambda said: stop.set()))
        log_to_file(os.path.join(log_folder(run.path), "launch.log"), who="driver")
        load_ray()
        # MLflow and Ray Train take seconds to load: beside the start of Ray, and the writing of shards.
        threading.Thread(target=_load_tracking, daemon=True).start()
        stack.enter_context(ray_session(spec.cluster, address))
        beside = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="beside"))
        if "train" in stages:
            beside.submit(importlib.import_module, "refinedet.pipeline.cluster.training_stage")
        tracker = beside.submit(_begin_tracking, run)
        from refinedet.pipeline.cluster.preflight import check_nodes

        job = _Job(run, tracker, display, stop, stack)
        try:
            check_nodes(run)
            for stage in STAGES:
                if stage in stages:
                    job.run_stage(stage)
        except StoppedError as error:
            job.end_tracking("KILLED", str(error))
            raise
        except BaseException as error:
            job.end_tracking("FAILED", f"{type(error).__name__}: {error}")
            job.report_after_failure()
            raise
        job.finish()


def _load_tracking() -> None:
    with suppress(Exception):  # raised again where it is needed
        importlib.import_module("refinedet.pipeline.tracking.runs")


def _begin_tracking(run: Run) -> RunTracker:
    """Start or resume the job's MLflow run, and say what it runs on."""
    from refinedet.pipeline.tracking.runs import RunTracker

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


def check_weights(spec: JobSpec) -> None:
    """UserError where the weights to start from do not exist."""
    weights = spec.training.init_weights
    if weights and not storage.exists(storage.absolute(weights)):
        raise UserError(f"training.init_weights: there is no {weights!r}; give a file or URI of weights.")


@contextmanager
def stop_signals(display: ProgressDisplay) -> Iterator[threading.Event]:
    """SIGINT and SIGTERM set the event; a second SIGINT ends at once."""
    stop = threading.Event()

    def on_signal(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        display.note("  stopping: saving first (Ctrl-C again ends at once, and loses the steps since the last save)")

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Job:
    """The state that the stages of one launch share."""

    def __init__(
        self,
        run: Run,
        tracker: Future[RunTracker],
        display: ProgressDisplay,
        stop: threading.Event,
        stack: ExitStack,
    ) -> None:
        """`stack` ends with the launch, before its Ray does."""
        self.run, self._tracker, self.display, self.stop, self._stack = run, tracker, display, stop, stack
        self._workers: DetectionPool | None = None
        self._messages: Monitor | None = None
        self.spec = run.spec
        self._stages: dict[str, Callable[[], None]] = {
            "prepare": self._prepare,
            "train": self._train,
            "evaluate": lambda: self._detect("single"),
            "multiscale": lambda: self._detect("multiscale"),
            "report": self._report,
        }

    @property
    def tracker(self) -> RunTracker:
        """Once it has begun; raises what beginning it raised."""
        return self._tracker.result()

    def end_tracking(self, status: Literal["FAILED", "KILLED"], reason: str) -> None:
        """Give the MLflow run its true end, where it has begun; must not hide why the job ended."""
        try:
            if self._tracker.exception() is None:
                self.tracker.finish(status, reason)
        except Exception:
            logger.exception("the end of the MLflow run could not be set")

    def _check_tracking(self) -> None:
        """Raise what beginning the MLflow run raised, as soon as it is known; waits for nothing."""
        if self._tracker.done():
            self._tracker.result()

    def run_stage(self, stage: str) -> None:
        if self.stop.is_set():
            raise StoppedError(f"before the stage {stage}; the same command goes on there")
        self._check_tracking()
        logger.info("stage %s begins", stage)
        self._stages[stage]()

    def _monitor(self) -> Monitor:
        """The same for all stages: to start one takes Ray seconds."""
        if self._messages is None:
            from refinedet.pipeline.cluster.monitor import Monitor

            self._messages = self._stack.enter_context(Monitor(self.run.path))
        return self._messages

    # --- prepare

    def _prepare(self) -> None:
        from refinedet.pipeline.cluster.preparation_stage import run_preparation

        parts = [part for part in ("train", "val") if getattr(self.spec.data, part)]
        self.display.stage("prepare", unit="images")
        counts = run_preparation(
            self.run,
            parts,
            monitor=self._monitor(),
            on_progress=lambda done, total: self._progress(done, total, "images"),
            stop_requested=self.stop.is_set,
        )
        self._tracker.add_done_callback(lambda begun: begun.exception() or self._track_data(begun.result(), counts))
        self.display.done(", ".join(f"{facts['num_samples']} {part} images" for part, facts in counts.items()))

    def _track_data(self, tracker: RunTracker, counts: Mapping[str, Mapping[str, Any]]) -> None:
        for part, facts in counts.items():
            tracker.log_dataset(
                part,
                facts["digest"],
                context="training" if part == "train" else "validation",
                source=storage.join(self.run.shards, part),
                num_samples=facts["num_samples"],
            )

    def _progress(self, done: int, total: int, unit: str) -> None:
        self._check_tracking()
        self.display.update(done, total, unit=unit)

    # --- train

    def _train(self) -> None:
        from refinedet.pipeline.cluster.recorder import TrainingRecorder
        from refinedet.pipeline.cluster.training_stage import run_training
        from refinedet.pipeline.data.index import check_same_categories, open_shards

        shards = open_shards(storage.join(self.run.shards, "train"))
        if shards.num_classes != self.spec.model.num_classes:
            raise UserError(
                f"model.num_classes is {self.spec.model.num_classes}, but the data set has {shards.num_classes} "
                f"categories; set model.num_classes={shards.num_classes}."
            )
        validated = storage.join(self.run.shards, "val")
        if self.spec.data.val and storage.exists(storage.join(validated, "index.json")):
            check_same_categories(shards, open_shards(validated))
        inputs = {
            "shards": shards.digest,
            "spec": storage.digest_json(lasting_part(self.spec.model_dump(mode="json"))),
        }
        if self.run.stage_is_done("train", inputs):
            self.display.stage("train")
            self.display.done("done before")
            return
        self.display.stage("train", unit="steps")
        recorder = TrainingRecorder(self.run, self.display, self._tracker)
        try:
            result = run_training(self.run, monitor=self._monitor(), on_message=recorder, stop_requested=self.stop)
        finally:
            recorder.close()
        self.run.commit_stage("train", inputs, ["weights.safetensors"])
        self.display.done(f"{result['step']} steps")

    # --- evaluate, multiscale

    def _detect(self, mode: Literal["single", "multiscale"]) -> None:
        from refinedet.pipeline.cluster.detection_job import make_detection_job
        from refinedet.pipeline.cluster.evaluate import detect_and_measure

        stage = "evaluate" if mode == "single" else "multiscale"
        if not self.spec.data.val or (mode == "multiscale" and self.spec.multiscale is None):
            return
        self.display.stage(stage, unit="images")
        job, inputs = make_detection_job(self.run, mode)
        if self.run.stage_is_done(stage, inputs):
            self.display.done("done before")
            return
        found = detect_and_measure(self.run, job, display=self.display, stop=self.stop, pool=self._pool())
        if found.metrics is not None:
            self.tracker.log_metrics(0, {f"{mode}/{name}": value for name, value in found.metrics.values.items()})
        self.run.commit_stage(stage, inputs, list(found.files))

    def _pool(self) -> DetectionPool:
        """The same workers for both stages."""
        if self._workers is None:
            from refinedet.pipeline.cluster.detection_pool import DetectionPool

            self._workers = self._stack.enter_context(DetectionPool())
        return self._workers

    # --- report

    def _report(self) -> None:
        from refinedet.pipeline.report.report import build_report

        self.display.stage("report")
        if storage.exists(self.run.weights):
            self._package_model()
        path = build_report(self.run.path, status="FINISHED")  # the last stage: what follows is saying so
        self.tracker.log_artifact(self._local_copy(path))
        self.display.done(path)

    def _package_model(self) -> None:
        from refinedet.pipeline.tracking.packaging import package_model

        folder = self._model_folder
        part = "val" if self.spec.data.val else "train"
        categories = storage.read_json(self.run.ground_truth(part))["categories"]
        package_model(
            folder,
            config=self.spec.model,
            weights=self.run.weights,
            categories=sorted(categories, key=lambda category: category["id"]),
            facts={"run": self.spec.name},
        )
        self.tracker.log_model(folder, name=self.spec.name, digest=storage.digest_file(self.run.weights).sha256)

    @property
    def _model_folder(self) -> str:
        return os.path.join(self._local_folder, "model")

    def report_after_failure(self) -> None:
        """A failed job leaves its report too; whatever goes wrong with it must not hide why the job failed."""
        try:
            from refinedet.pipeline.report.report import build_report

            build_report(self.run.path)
        except Exception:
            logger.exception("the report of the failed job could not be built")

    def finish(self) -> None:
        for name in ("spec.yaml", "metrics.json", "detections/single.json", "detections/multiscale.json"):
            if storage.exists(self.run.file(name)):
                self.tracker.log_artifact(self._local_copy(self.run.file(name)), os.path.dirname(name) or None)
        if not self.tracker.finish("FINISHED"):
            self.display.warn(
                f"MLflow ({self.tracker.location}) did not take everything; {log_folder(self.run.path)} says what, and "
                "the run's folder has it all"
            )
        self._print_summary()

    def _local_copy(self, path: str) -> str:
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
        """On this machine: the run's own folder, or what stands for it where the run is behind a URI."""
        return os.path.dirname(log_folder(self.run.path))

    def _print_summary(self) -> None:
        from refinedet.pipeline.report.summary import merge_rule_rows, summary_rows

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
            (
                "model",
                "in MLflow, and as a folder for mlflow.pyfunc.load_model: " + _shown(self._model_folder),
            ),
            ("MLflow", self.tracker.location),
            ("logs", log_folder(self.run.path)),
        ):
            self.display.console.print(f"  {what:<8} {_shown(where)}", markup=False, soft_wrap=True)


def _shown(path: str) -> str:
    """A path below the current folder, relative to it."""
    here = os.getcwd() + os.sep
    return path.replace(here, "")
