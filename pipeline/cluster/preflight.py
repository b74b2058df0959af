"""What is checked before anything is started: every node at the head of a launch, every worker with `--preflight`."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from refinedet.pipeline.cluster.progress import ProgressDisplay
from refinedet.pipeline.config.checks import check_spec
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.environment import package_versions
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.logs import log_folder, log_to_file, restore_loggers
from rich.markup import escape

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 60.0


def preflight(spec: JobSpec, *, address: str | None, display: ProgressDisplay) -> None:
    """Check a job's workers here, or on the cluster at `address`, and print a line for everything checked.

    Nothing of it is kept: the same spec, or a mended one, may be launched afterwards.
    Raises UserError, once all is printed, where something is at fault.
    """
    from refinedet.pipeline.cluster.launch import check_weights, stop_signals  # it imports this module
    from refinedet.pipeline.cluster.session import ray_session

    run = Run(spec)
    check_spec(spec)
    check_weights(spec)
    log_to_file(os.path.join(log_folder(run.path), "preflight.log"), who="driver")
    with stop_signals(display) as stop, ray_session(spec.cluster, address):
        from refinedet.pipeline.cluster.monitor import Monitor
        from refinedet.pipeline.cluster.training_stage import run_training

        restore_loggers()
        display.stage("preflight")
        with Monitor(run.path) as monitor:
            result = run_training(
                run, monitor=monitor, on_message=_said(display), stop_requested=stop, preflight_only=True
            )
    print_findings(result["report"], display)


def print_findings(report: Mapping[str, Any], display: ProgressDisplay) -> None:
    """A line for each finding, and one for each of its faults; UserError where there is one.

    report  `PreflightReport` as JSON values
    """
    faults = 0
    for finding in report["findings"]:
        mark = "[red]✗[/]" if finding["faults"] else "[green]✓[/]"
        text = "" if finding["faults"] else finding["text"]
        display.note(f"{mark} {finding['name']:<11} {escape(text)}".rstrip())
        for fault in finding["faults"]:
            display.note(f"    {escape(fault)}")
        faults += len(finding["faults"])
    if faults:
        raise UserError(f"the preflight found {faults} fault{'s' * (faults > 1)}; nothing was started.")
    display.done(f"checked in {report['seconds']:.1f} s once the workers were placed")


def _said(display: ProgressDisplay) -> Any:
    """The driver's own words, such as that it waits for nodes; what the workers found comes as their result."""

    def on_message(rank: int, kind: str, content: Mapping[str, Any]) -> None:
        if rank < 0 and kind == "event" and content["kind"] != "started":
            display.warn(content["message"])

    return on_message


def check_nodes(run: Run) -> None:
    """Before the first stage: all nodes share the run's folder, the clock, and the versions of what a job needs.

    The workers check themselves before they train; by then, shards may have been written for hours. A cluster of one
    node has nothing to compare. Raises UserError that names every node at fault.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if len(nodes) < 2:
        return
    from refinedet.pipeline.training.preflight import judge_clocks, judge_versions  # not before: it waits for torch

    token = uuid.uuid4().hex[:8]
    began = time.time()
    probe = ray.remote(_probe)
    probes = [
        probe.options(num_cpus=0, max_retries=0, label_selector={"ray.io/node-id": node}).remote(run.path, token, rank)
        for rank, node in enumerate(nodes)
    ]
    ready, missing = ray.wait(probes, num_returns=len(probes), timeout=_PROBE_TIMEOUT_S)
    answers, faults = [], []
    for each in ready:
        try:
            answers.append(ray.get(each))
        except RayTaskError as error:
            faults.append(f"a node cannot look at {run.path} ({type(error.cause).__name__}: {error.cause})")
        except RayError as error:
            logger.warning("a node went away before it answered: %s", error)
    answers.sort(key=lambda answer: answer["rank"])
    if missing:
        faults.append(f"{len(missing)} of {len(nodes)} nodes did not answer in {_PROBE_TIMEOUT_S:g} s")
    for answer in answers:
        seen = answer["fault"] is None and storage.exists(_probe_file(run.path, token, answer["rank"]))
        if answer["fault"]:
            faults.append(f"{answer['host']}: the run's folder {run.path} cannot be written ({answer['fault']})")
        elif not seen:
            faults.append(
                f"{answer['host']}: what it writes to {run.path} is not seen here; set runs= to a folder or URI that "
                "all nodes share"
            )
        with suppress(OSError):
            storage.remove(_probe_file(run.path, token, answer["rank"]))
    ended = time.time()  # a node's clock was read between the two
    ahead = [max(answer["clock"] - ended, 0.0) - max(began - answer["clock"], 0.0) for answer in answers]
    if answers:
        faults += judge_versions([(answer["host"], answer["versions"]) for answer in answers]).faults
        faults += judge_clocks([0.0, *ahead]).faults
    if faults:
        raise UserError("The preflight of the nodes found: " + "; ".join(faults) + ".")


def _probe(run_path: str, token: str, rank: int) -> dict[str, Any]:
    """One node: write to the run's folder, and tell who is there."""
    fault = None
    try:
        storage.write_bytes(_probe_file(run_path, token, rank), token.encode())
    except OSError as error:
        fault = str(error.strerror or error)
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "fault": fault,
        "clock": time.time(),
        "versions": package_versions(),
    }


def _probe_file(run_path: str, token: str, rank: int) -> str:
    return storage.join(run_path, f".preflight-node-{rank}-{token}")
