"""Messages between the driver and a training worker: the task, an error that no restart fixes, a node's load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WorkerTask:
    """Task of every worker.

    spec             of the job, as JSON values with absolute paths
    mailbox          actor handle
    fault            drills only: "MODULE:FUNCTION ARGUMENTS"; FUNCTION(arguments, run, rank) returns the loss to use
    preflight_only   check the workers, and end
    estimate_memory  compare the estimate of the memory with the device's
    began_at         when the job began to wait for workers, seconds since 1970
    first            False once workers of this job have trained
    """

    spec: dict[str, Any]
    mailbox: Any
    fault: str
    preflight_only: bool
    estimate_memory: bool
    began_at: float
    first: bool


@dataclass(frozen=True)
class Fatal:
    """An error that every attempt would raise."""

    by_user: bool
    message: str


@dataclass(frozen=True)
class NodeSample:
    """The load of a node at one time, under MLflow's names; `node` is Ray's id."""

    node: str
    values: Mapping[str, float]
