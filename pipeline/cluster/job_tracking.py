"""A job in MLflow: its run with environment and data sets, its results at the step of the weights, its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from refinedet.pipeline.cluster.capacity import gpus_of
from refinedet.pipeline.cluster.session import session_nodes
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.data.images import resize_image
from refinedet.pipeline.data.index import ShardSet, open_shards
from refinedet.pipeline.data.reading import EvaluationSamples
from refinedet.pipeline.data.statistics import read_statistics
from refinedet.pipeline.evaluation.detection_job import Mode
from refinedet.pipeline.inference.weight_files import weights_step
from refinedet.pipeline.report.summary import describe_run
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.environment import describe_environment
from refinedet.pipeline.runs.logs import restore_loggers
from refinedet.pipeline.tracking.packaging import package_model
from refinedet.pipeline.tracking.runs import RunTracker, log_later_result
from refinedet.pipeline.tracking.writer import evaluation_metrics

_EXAMPLE_SIDE = 320
"""longest side of the model's input example, pixels"""


def begin_tracking(run: Run) -> RunTracker:
    """Start or resume the MLflow run of a job whose shards exist, and log what it runs on."""
    tracker = RunTracker(run.spec.tracking, name=run.spec.name, run_dir=run.path, runs=run.runs)
    restore_loggers()
    environment: dict[str, Any] = {**describe_environment(), "devices": gpus_of(session_nodes())}
    storage.write_json(run.file("environment.json"), environment)
    tracker.log_spec(run.spec.model_dump(mode="json"))
    tracker.set_tags(
        {"commit": environment["commit"]}
        | {f"version.{name}": version for name, version in environment["versions"].items()}
    )
    update_description(tracker, run, "RUNNING")
    for part, context in (("train", "training"), ("val", "validation")):
        if shards := _shards(run, part):
            tracker.log_dataset(
                f"{shards.format} {part}",
                shards.digest,
                context=context,
                source=shards.url,
                num_samples=shards.num_samples,
                statistics=read_statistics(shards),
            )
    return tracker


def update_description(tracker: RunTracker, run: Run, status: str) -> None:
    """Set the run's description: what is trained on what, and what came of it so far."""
    parts = {"train": _shards(run, "train"), "val": _shards(run, "val")}
    words = {"train": "training", "val": "validation"}
    data = " and ".join(f"{shards.num_samples:,} {words[part]} images" for part, shards in parts.items() if shards)
    tracker.set_description(describe_run(run.path, status, data))


def log_result(tracker: RunTracker, run: Run, mode: Mode) -> int:
    """Log one evaluation from `metrics.json`, where the data set has a truth; returns the step of the weights."""
    content, step = _results(run).get(mode), weights_step(run.weights)
    if content:
        tracker.log_result(mode, step, content)
    return step


def log_result_later(run: Run, mode: Mode) -> bool:
    """Log a result, as `log_result`, of a job that has ended; return whether MLflow took it."""
    content = _results(run).get(mode)
    return content is None or log_later_result(
        run.spec.tracking,
        run_dir=run.path,
        runs=run.runs,
        mode=mode,
        step=weights_step(run.weights),
        content=content,
    )


def log_model(tracker: RunTracker, run: Run, directory: str) -> None:
    """Package the run's weights into a local directory, log them with their metrics, and register them."""
    shards = _shards(run, "val") or open_shards(storage.join(run.shards, "train"))
    step = weights_step(run.weights)
    metrics: dict[str, float] = {}
    for mode, content in _results(run).items():
        metrics |= evaluation_metrics(mode, content)
    scores = {name: value for name, value in metrics.items() if "/class AP/" not in name}
    package_model(
        directory,
        config=run.spec.model,
        weights=run.weights,
        categories=[{"id": category.id, "name": category.name} for category in sorted(shards.categories)],
        facts={"run": run.spec.name, "step": step, **scores},
        input_example=_example(shards),
    )
    tracker.log_model(
        directory,
        name=run.spec.tracking.registered_model or f"{run.spec.tracking.experiment}-{run.spec.data.format}",
        digest=storage.digest_file(run.weights).sha256,
        step=step,
        metrics=metrics,
        data_digest=shards.digest,
    )


def _shards(run: Run, part: str) -> ShardSet | None:
    url = storage.join(run.shards, part)
    listed = getattr(run.spec.data, part)
    return open_shards(url) if listed and storage.exists(storage.join(url, "index.json")) else None


def _results(run: Run) -> dict[Mode, Mapping[str, Any]]:
    """Of `metrics.json`, by mode."""
    path = run.file("metrics.json")
    known = storage.read_json(path) if storage.exists(path) else {}
    modes: tuple[Mode, ...] = ("single", "multiscale")
    return {mode: known[mode] for mode in modes if mode in known}


def _example(shards: ShardSet) -> np.ndarray | None:
    """The first image that can be read, at most `_EXAMPLE_SIDE` a side; None where the first few cannot."""
    first = range(min(shards.num_samples, 10))
    for sample in EvaluationSamples(shards, first, max_bad_samples=len(first)):
        if sample.fault is None:
            height, width = sample.image.shape[:2]
            scale = min(1.0, _EXAMPLE_SIDE / max(height, width))
            return resize_image(sample.image, (max(1, round(height * scale)), max(1, round(width * scale))))
    return None
