"""`refinedet evaluate RUN` and `refinedet multiscale RUN`: measure a run again, or other weights on other shards."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from typing import Literal

from pipeline import storage
from pipeline.cluster.logs import log_folder, log_to_file
from pipeline.cluster.progress import ProgressDisplay
from pipeline.cluster.run import Run
from pipeline.cluster.session import ray_session
from pipeline.errors import UserError
from pipeline.evaluation import CocoMetrics
from pipeline.spec_files import load_spec


def evaluate_run(
    folder: str,
    mode: Literal["single", "multiscale"],
    *,
    overrides: Sequence[str] = (),
    weights: str | None = None,
    shards: str | None = None,
    output: str | None = None,
    address: str | None = None,
    display: ProgressDisplay,
) -> CocoMetrics | None:
    """Detect and measure with a run's spec, on a cluster or here.

    folder   of the run
    weights  other weights, file or URI; default: the run's
    shards   other shards; default: the run's validation shards
    output   where the results go; default: the run's folder, unless weights, shards or overrides make it another thing
    Raises UserError where the run, weights or shards are not there.
    """
    path = storage.join(folder, "spec.yaml")
    if not storage.is_local(path) or not storage.exists(path):
        raise UserError(f"{folder!r} is no run's folder (it has no spec.yaml); give one, as in runs/quickstart.")
    parent, name = os.path.split(os.path.abspath(folder))
    spec = load_spec(path, [f"runs={parent}", f"name={name}", *overrides])
    if mode == "multiscale" and spec.multiscale is None:
        raise UserError("The run's spec has no `multiscale`; give a recipe, as in multiscale.recipe=coco512.")
    if (weights or shards or overrides) and not output:
        raise UserError("Other weights, shards or settings need --output FOLDER, so that the run's own results stay.")
    run = Run(spec)
    from pipeline.cluster.detection_stage import make_detection_job, run_detection

    log_to_file(os.path.join(log_folder(run.path), "evaluate.log"), who="driver")
    job, _ = make_detection_job(
        run,
        mode,
        weights=storage.absolute(weights) if weights else None,
        shards=storage.absolute(shards) if shards else None,
        output=storage.absolute(output) if output else None,
    )
    display.stage("evaluate" if mode == "single" else mode, unit="images")
    with ray_session(spec.cluster, address):
        metrics, count = run_detection(
            run,
            job,
            on_progress=lambda done, total: display.update(done, total, unit="images"),
            stop_requested=threading.Event(),
        )
    display.done(f"{count} detections at {job.detections}")
    return metrics
