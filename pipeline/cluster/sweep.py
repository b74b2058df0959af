"""`refinedet sweep`: the runs of a sweep, each a launch in a process of its own, on one cluster.

A run that failed does not stop the others. The same command does what is not done yet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from refinedet.pipeline.cluster.local_node import local_node
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.config.spec_files import dump_spec
from refinedet.pipeline.config.start import check_start
from refinedet.pipeline.config.sweep_spec import Sweep, SweepRun
from refinedet.pipeline.report.sweep_results import headline_score
from refinedet.pipeline.runs import settings, storage
from refinedet.pipeline.runs.durations import describe_duration
from refinedet.pipeline.runs.errors import JobError, StoppedError
from refinedet.pipeline.runs.logs import log_folder
from refinedet.pipeline.runs.progress import ProgressDisplay
from refinedet.pipeline.runs.stop import stop_signals

logger = logging.getLogger(__name__)

_POLL_S = 0.5


def run_sweep(sweep: Sweep, *, address: str | None, display: ProgressDisplay) -> None:
    """Do the runs that are not done, `at_once` at a time, in the order of the sweep.

    Raises UserError for a mistake in a spec, before anything starts; StoppedError after a stop that was asked for;
    JobError at the end, where runs failed.
    """
    for run in sweep.runs:
        check_spec(run.spec)
        check_start(run.spec)
    left = [run for run in sweep.runs if not is_done(run)]
    display.note(f"{len(sweep.runs)} runs in {sweep.directory}, {len(sweep.runs) - len(left)} done before")
    if not left:
        return
    failed: list[str] = []
    with stop_signals(display.note) as stop, _cluster(address) as where, ThreadPoolExecutor(sweep.spec.at_once) as pool:

        def do(run: SweepRun) -> None:
            if not stop.is_set() and not _launch(run, where, stop, display) and not stop.is_set():
                failed.append(run.spec.name)

        for _ in pool.map(do, left):
            pass
        if stop.is_set():
            raise StoppedError("each run saved; run the same command again to resume")
    if failed:
        raise JobError(f"{len(failed)} of {len(left)} runs failed ({', '.join(failed)}); the same command tries again.")


def is_done(run: SweepRun) -> bool:
    """Return whether a run has ended well with the same spec."""
    opened = Run(run.spec)
    if not storage.exists(opened.file("tracking.json")) or not storage.exists(opened.file("spec.yaml")):
        return False
    same = storage.read_bytes(opened.file("spec.yaml")).decode() == dump_spec(run.spec)
    return same and storage.read_json(opened.file("tracking.json")).get("status") == "FINISHED"


@contextlib.contextmanager
def _cluster(address: str | None) -> Iterator[str]:
    """Address of the cluster: the one given, or that of a local node, which all runs share."""
    address = address or settings.read("RAY_ADDRESS")
    if address:
        yield address
        return
    settings.provide("ray")
    with local_node() as started:
        yield started


def _launch(run: SweepRun, address: str, stop: threading.Event, display: ProgressDisplay) -> bool:
    """Launch one run in a process, and wait for it; returns whether it ended well."""
    opened = Run(run.spec)
    log = os.path.join(log_folder(opened.path), "terminal.log")
    os.makedirs(os.path.dirname(log), exist_ok=True)
    began = time.monotonic()
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as spec, open(log, "w") as output:
        spec.write(dump_spec(run.spec))
        spec.flush()
        command = [sys.executable, "-m", "refinedet.pipeline.cli", "launch", spec.name, "--address", address]
        # A session of its own: a signal to this process group reaches the run once, from here.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        stopping = False
        while process.poll() is None:
            if stop.is_set() and not stopping:
                process.terminate()
                stopping = True
            time.sleep(_POLL_S)
    took = describe_duration(time.monotonic() - began)
    if process.returncode == 0:
        display.note(f"  {run.spec.name}: {headline_score(opened.path)}, {took}")
    elif not stop.is_set():
        display.warn(f"{run.spec.name} failed after {took}; {log} says why")
    return process.returncode == 0
