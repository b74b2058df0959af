"""`refinedet launch`: the stages of a job, one after the other, each done once."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack

from refinedet.pipeline.cluster.addresses import LOCAL, check_reachable, cluster_address
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.config.start import check_start
from refinedet.pipeline.runs import settings
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.logs import log_folder, log_to_file
from refinedet.pipeline.runs.progress import ProgressDisplay
from refinedet.pipeline.runs.stop import stop_signals
from refinedet.pipeline.runs.timeline import Timeline
from refinedet.pipeline.tracking.stores import check_store

STAGE_NAMES = ("prepare", "train", "evaluate", "multiscale", "report")


def launch(
    spec: JobSpec,
    *,
    address: str | None = None,
    stages: Sequence[str] = STAGE_NAMES,
    display: ProgressDisplay,
) -> None:
    """Run the stages of a job that are not done yet, here or on the cluster at `address`.

    Raises UserError for a mistake in the spec or its data, StoppedError after a stop that was asked for (SIGINT,
    SIGTERM), JobError for a failure that retries did not overcome.
    """
    unknown = [stage for stage in stages if stage not in STAGE_NAMES]
    if unknown:
        raise UserError(f"--stages must name some of {', '.join(STAGE_NAMES)}, received {unknown[0]!r}.")
    run = Run(spec)
    check_spec(spec)
    check_start(spec)
    cluster = cluster_address(address)
    check_reachable(cluster)
    if cluster == LOCAL and "prepare" in stages and spec.data.format != "shapes":  # elsewhere nodes may see others
        from refinedet.pipeline.data.presence import check_data

        check_data(spec)
    with ExitStack() as stack:
        stop = stack.enter_context(stop_signals(display.note))
        stack.enter_context(run.open(on_lost=lambda said: stop.set()))
        check_store(spec.tracking, run.runs)
        stack.enter_context(Timeline(run.path).launched(settings.read("REFINEDET_SUBMITTED_AT")))
        log_to_file(os.path.join(log_folder(run.path), "launch.log"), who="driver")
        # Ray, torch and MLflow take seconds to load: after what a mistake needs, and torch and MLflow after Ray's own
        # start, which gives its parts 15 s.
        from refinedet.pipeline.cluster.session import ray_session

        stack.enter_context(ray_session(spec.cluster, address))
        _run_stages(run, stages, display, stop)


def _run_stages(run: Run, stages: Sequence[str], display: ProgressDisplay, stop: threading.Event) -> None:
    from refinedet.pipeline.cluster.job import Job
    from refinedet.pipeline.cluster.node_checks import check_nodes
    from refinedet.pipeline.cluster.stages import STAGES

    assert tuple(stage.name for stage in STAGES) == STAGE_NAMES, "STAGE_NAMES must name the stages of stages.py"
    with Job(run, display, stop) as job:
        try:
            check_nodes(run)
            for stage in STAGES:
                if stage.name in stages:
                    job.run_stage(stage)
        except BaseException as error:
            job.fail(error)
            raise
        job.finish()
