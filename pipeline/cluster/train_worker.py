"""The function that Ray Train calls in every worker, and what the driver sends to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refinedet.pipeline.training.preflight import PreflightReport
    from refinedet.pipeline.training.records import TrainResult


@dataclass(frozen=True)
class WorkerTask:
    """What the driver sends to every worker.

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
    """An error that another attempt would meet again."""

    by_user: bool
    message: str


def train_worker(config: dict[str, WorkerTask]) -> TrainResult | PreflightReport:
    """Run the task of one worker, `config["task"]`."""
    # Here, since Ray Train's controller loads this module too: it needs neither torchvision nor DeepSpeed.
    from refinedet.pipeline.cluster.worker_training import run_worker

    return run_worker(config["task"])
