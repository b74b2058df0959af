"""Measuring a run: what the stages of a launch and the commands `evaluate` and `multiscale` have in common."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

from refinedet.pipeline.cluster.detection_stage import DetectionPool, run_detection
from refinedet.pipeline.cluster.job_tracking import log_result_later
from refinedet.pipeline.cluster.session import ray_session
from refinedet.pipeline.config.recipes import describe_cost, describe_source, resolve_passes
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.evaluation.detection_job import DetectionJob, Mode, make_detection_job
from refinedet.pipeline.evaluation.detection_results import Detected
from refinedet.pipeline.evaluation.merge_comparison import format_comparison
from refinedet.pipeline.evaluation.protocols import Metrics
from refinedet.pipeline.evaluation.unreadable import name_images
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.logs import log_folder, log_to_file
from refinedet.pipeline.runs.progress import ProgressDisplay


def detect_and_measure(
    run: Run, job: DetectionJob, pool: DetectionPool, *, display: ProgressDisplay, stop: threading.Event
) -> tuple[Detected, str]:
    """Run a stage under `display.stage(...)`, print its cost first; returns its results, and one line about them."""
    if job.mode == "multiscale":
        assert run.spec.multiscale is not None
        passes = resolve_passes(run.spec.multiscale, run.spec.model)
        cost = describe_cost(passes, input_size=run.spec.model.input_size, num_images=len(job.image_ids))
        display.note(f"  {cost}\n  {describe_source(run.spec.multiscale)}")
    found = run_detection(
        run,
        job,
        pool,
        on_progress=lambda done, total: display.update(done, total, unit="images"),
        report=display.warn,
        stop=stop,
    )
    if found.damaged:
        display.warn(f"done again, as damaged or of other settings: {_named(found.damaged)}")
    if found.unreadable:
        display.warn(
            f"{len(found.unreadable)} images cannot be read and have no detections: {name_images(found.unreadable)}"
        )
    if job.diagnose and found.metrics is not None and found.diagnosis is None:
        display.note("  no diagnosis: it has no rule for groups or for objects that were not looked for everywhere")
    return found, f"{_outcome(found.metrics)}  {found.num_detections} detections{_for_server(job, found.files)}"


def evaluate_run(
    run: Run,
    mode: Mode,
    *,
    weights: str | None = None,
    shards: str | None = None,
    output: str | None = None,
    address: str | None = None,
) -> Metrics | None:
    """Detect and measure with a run's spec, on a cluster or here, with its progress on the terminal.

    run                      of `choose_run`
    weights, shards, output  as given to it
    """
    log_to_file(os.path.join(log_folder(run.path), "evaluate.log"), who="driver")
    job, _ = make_detection_job(
        run,
        mode,
        weights=storage.absolute(weights) if weights else None,
        shards=storage.absolute(shards) if shards else None,
        output=storage.absolute(output) if output else None,
    )
    with ProgressDisplay() as display:
        display.stage("evaluate" if mode == "single" else mode, unit="images")
        # Evaluation needs one worker to be placed, however many the training had.
        with ray_session(run.spec.cluster.model_copy(update={"workers": 1}), address), DetectionPool() as pool:
            found, text = detect_and_measure(run, job, pool, display=display, stop=threading.Event())
        display.done(text)
        if not output and found.metrics is not None and not log_result_later(run, mode):
            display.warn("MLflow did not take the results; the run's directory has them")
        if found.by_merge_rule:
            display.note(f"\n{format_comparison(found.by_merge_rule)}\n")
    return found.metrics


def _outcome(metrics: Metrics | None) -> str:
    if metrics is None:
        return "the data set has no annotations to measure by;"
    shown = [(name, metrics.values[name]) for name in ("AP", "AP50", "mAP") if name in metrics.values]
    return "  ".join(f"{name} {value:.3f}" for name, value in shown)


def _for_server(job: DetectionJob, files: Sequence[str]) -> str:
    """Return the path of what an evaluation server takes: the zip, or the directory of VOC's text files."""
    made = [file for file in files if file.startswith("submission/")]
    if not made:
        return ""
    place = made[0] if len(made) == 1 else made[0].partition("/results/")[0]
    return f"  for the server: {storage.join(job.output, place)}"


def _named(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + more
