"""The stages of a job, in order."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from refinedet.pipeline.cluster.detection_stage import DetectionPool
from refinedet.pipeline.cluster.evaluate import detect_and_measure
from refinedet.pipeline.cluster.job import Job, Outcome, Stage
from refinedet.pipeline.cluster.job_tracking import log_model, log_result, update_description
from refinedet.pipeline.cluster.preparation_stage import run_preparation
from refinedet.pipeline.cluster.recorder import TrainingRecorder
from refinedet.pipeline.cluster.training_stage import run_training
from refinedet.pipeline.config.identity import lasting_part
from refinedet.pipeline.data.index import check_same_categories, find_parts, open_shards
from refinedet.pipeline.data.job_statistics import job_statistics
from refinedet.pipeline.evaluation.detection_job import DetectionJob, Mode, make_detection_job
from refinedet.pipeline.report.report import build_report
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.directory import JOB_STATISTICS
from refinedet.pipeline.training.training_job import check_classes


def _always(job: Job) -> Mapping[str, Any]:
    return {}


# --- prepare


def _prepare(job: Job) -> Outcome:
    parts = [part for part in ("train", "val") if getattr(job.spec.data, part)]

    found = run_preparation(
        job.run,
        parts,
        mailbox=job.mailbox,
        on_progress=lambda done, total: job.display.update(done, total, unit="images"),
        stop_requested=job.stop.is_set,
    )
    statistics = job_statistics(find_parts(job.run.shards), job.spec.model)
    storage.write_json(job.run.file(JOB_STATISTICS), statistics)
    for finding in statistics["findings"]:
        job.display.warn(finding)
    return Outcome(", ".join(f"{facts['num_samples']} {part} images" for part, facts in found.items()))


# --- train


def _train_inputs(job: Job) -> Mapping[str, Any]:
    shards = open_shards(storage.join(job.run.shards, "train"))
    check_classes(job.run, shards)
    validated = storage.join(job.run.shards, "val")
    if job.spec.data.val and storage.exists(storage.join(validated, "index.json")):
        check_same_categories(shards, open_shards(validated))
    return {
        "shards": shards.digest,
        "spec": storage.digest_json(lasting_part(job.spec.model_dump(mode="json", exclude_defaults=True))),
    }


def _train(job: Job) -> Outcome:
    recorder = TrainingRecorder(job.run, job.display, job.begun, job.pictures)
    try:
        result = run_training(job.run, job.mailbox, recorder, job.stop)
    finally:
        recorder.close()
    return Outcome(f"{result.step} steps", ("weights.safetensors",))


# --- evaluate, multiscale


def _detection_inputs(mode: Mode, job: Job) -> Mapping[str, Any] | None:
    if not job.spec.data.val or (mode == "multiscale" and job.spec.multiscale is None):
        return None
    return _detection(job, mode)[1]


def _detect(mode: Mode, job: Job) -> Outcome:
    found, text = detect_and_measure(
        job.run, _detection(job, mode)[0], _detection_pool(job), display=job.display, stop=job.stop
    )
    step = log_result(job.tracker, job.run, mode)
    if found.metrics is not None:
        job.pictures.log_evaluation(job.tracker, mode, step)
    return Outcome(text, tuple(found.files))


@functools.lru_cache
def _detection(job: Job, mode: Mode) -> tuple[DetectionJob, dict[str, Any]]:
    return make_detection_job(job.run, mode)


@functools.lru_cache
def _detection_pool(job: Job) -> DetectionPool:
    """The same workers for both stages."""
    return job.keep(DetectionPool())


# --- report


@storage.patience()
def _report(job: Job) -> Outcome:
    if storage.exists(job.run.weights):
        log_model(job.tracker, job.run, job.model_folder)
    update_description(job.tracker, job.run, "FINISHED")
    path = build_report(job.run.path, status="FINISHED")  # only the end of the MLflow run follows
    job.tracker.log_artifact(job.local_copy(path))
    return Outcome(path)


STAGES = (
    Stage("prepare", _always, _prepare, unit="images"),
    Stage("train", _train_inputs, _train, unit="steps"),
    Stage(
        "evaluate",
        functools.partial(_detection_inputs, "single"),
        functools.partial(_detect, "single"),
        unit="images",
    ),
    Stage(
        "multiscale",
        functools.partial(_detection_inputs, "multiscale"),
        functools.partial(_detect, "multiscale"),
        unit="images",
    ),
    Stage("report", _always, _report),
)
