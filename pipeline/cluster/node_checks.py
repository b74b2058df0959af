"""Checks of every node at the head of a launch: the run's directory, the clock, the versions of what a job needs."""

from __future__ import annotations

import logging
import socket
import time
import uuid
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.environment import package_versions
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.worker_checks import judge_clocks, judge_versions

logger = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 60.0


def check_nodes(run: Run) -> None:
    """Before the first stage: all nodes share the run's directory, the clock, and the versions of a job's packages.

    The workers check themselves before they train; by then, shards may have been written for hours. A cluster of one
    node has nothing to compare. Raises UserError that names every node at fault.
    """
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    if len(nodes) < 2:
        return
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
            faults.append(f"a node cannot read {run.path} ({type(error.cause).__name__}: {error.cause})")
        except RayError as error:
            logger.warning("a node went away before it answered: %s", error)
    answers.sort(key=lambda answer: answer["rank"])
    if missing:
        faults.append(f"{len(missing)} of {len(nodes)} nodes did not answer in {_PROBE_TIMEOUT_S:g} s")
    for answer in answers:
        seen = answer["fault"] is None and storage.exists(_probe_file(run.path, token, answer["rank"]))
        if answer["fault"]:
            faults.append(f"{answer['host']}: the run's directory {run.path} cannot be written ({answer['fault']})")
        elif not seen:
            faults.append(
                f"{answer['host']}: what it writes to {run.path} is not seen here; set runs= to a directory or URI "
                "that all nodes share"
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
    """Write to the run's directory from one node, and describe that node."""
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
