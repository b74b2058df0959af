"""`refinedet launch --preflight`: place the workers of a job, check them, and end."""

from __future__ import annotations

import os

from refinedet.pipeline.cluster.mailbox import Mailbox
from refinedet.pipeline.cluster.session import ray_session
from refinedet.pipeline.cluster.training_stage import run_preflight
from refinedet.pipeline.cluster.worker_task import NodeSample
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.config.start import check_start
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.logs import log_folder, log_to_file, restore_loggers
from refinedet.pipeline.runs.progress import ProgressDisplay
from refinedet.pipeline.runs.stop import stop_signals
from refinedet.pipeline.training.records import Event, StepRecord
from refinedet.pipeline.training.worker_checks import PreflightReport
from rich.markup import escape


def preflight(spec: JobSpec, *, address: str | None, display: ProgressDisplay) -> None:
    """Check a job's workers here, or on the cluster at `address`, and print a line for everything checked.

    Nothing is kept: the same spec, or a corrected one, may be launched afterwards.
    Raises UserError, once all is printed, where there are faults.
    """
    run = Run(spec)
    check_spec(spec)
    check_start(spec)
    log_to_file(os.path.join(log_folder(run.path), "preflight.log"), who="driver")

    def on_message(message: StepRecord | Event | NodeSample) -> None:
        if isinstance(message, Event) and message.kind in ("waiting", "restarted"):
            display.warn(message.message)

    with stop_signals(display.note) as stop, ray_session(spec.cluster, address), Mailbox() as mailbox:
        restore_loggers()
        display.stage("preflight")
        report = run_preflight(run, mailbox, on_message, stop)
    print_findings(report, display)


def print_findings(report: PreflightReport, display: ProgressDisplay) -> None:
    """Print a line for each finding, and one for each of its faults; UserError where there is a fault."""
    for finding in report.findings:
        mark = "[red]✗[/]" if finding.faults else "[green]✓[/]"
        text = "" if finding.faults else finding.text
        display.note(f"{mark} {finding.name:<11} {escape(text)}".rstrip())
        for fault in finding.faults:
            display.note(f"    {escape(fault)}")
    count = len(report.faults)
    if count:
        raise UserError(f"the preflight found {count} fault{'s' * (count > 1)}; nothing was started.")
    display.done(f"checked in {report.seconds:.1f} s once the workers were placed")
