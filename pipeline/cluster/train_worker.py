"""One Ray Train worker: the job of `pipeline.training.job` with a link to the driver."""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from refinedet.pipeline.cluster.monitor import MonitorClient
from refinedet.pipeline.config.files import parse_spec
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.drills.faults import Fault, with_faults
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.logs import log_folder, log_to_file, restore_loggers
from refinedet.pipeline.training.records import Event, StepRecord

if TYPE_CHECKING:
    from refinedet.pipeline.training.world import World


class MonitorLink:
    """The job's link over the driver's monitor."""

    def __init__(self, monitor: MonitorClient) -> None:
        self._monitor = monitor

    @property
    def stop_requested(self) -> bool:
        return self._monitor.stop_requested

    def push(self, message: StepRecord | Event, *, wait: bool = False) -> None:
        kind = "step" if isinstance(message, StepRecord) else "event"
        self._monitor.push(kind, dataclasses.asdict(message), wait=wait)


def train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The function that Ray Train calls in every worker; returns the loop's result as JSON values.

    config  spec, monitor (its name), faults, estimate_memory, preflight_only,
            began_at (seconds since the epoch), attempt (the first is 0)
    """
    run = Run(parse_spec(config["spec"], source="the job's spec"))
    rank = ray.train.get_context().get_world_rank()
    log_to_file(os.path.join(log_folder(run.path), f"train-rank{rank}.log"), who=f"rank {rank}")
    monitor = MonitorClient(config["monitor"], rank)
    monitor.push(
        "placed",
        {
            "node": ray.get_runtime_context().get_node_id(),
            "host": socket.gethostname(),
            "address": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
        },
    )
    from refinedet.pipeline.training.finite import NonFiniteError

    try:
        return _train(run, monitor, config)
    except (UserError, NonFiniteError) as error:  # trying again would not mend it
        monitor.push("fatal", (isinstance(error, UserError), str(error)), wait=True)
        raise  # so that Ray Train ends the other ranks, which may be waiting for this one


def _train(run: Run, monitor: MonitorClient, config: dict[str, Any]) -> dict[str, Any]:
    from refinedet.model import sum_losses
    from refinedet.pipeline.evaluation.validation import prepare_validation
    from refinedet.pipeline.training.job import Attempt, check_job, train_job
    from refinedet.pipeline.training.world import open_world

    restore_loggers()
    spec = run.spec
    link = MonitorLink(monitor)
    # Without a GPU of its own a worker would take those that Ray has lent to others.
    with open_world(None if spec.cluster.gpus_per_worker else "cpu") as world:
        memory_bytes = None
        if config["estimate_memory"]:
            memory_bytes = world.broadcast_object(_memory_estimate(run, world) if world.is_main else None)
        attempt = Attempt(config["attempt"], config["began_at"], memory_bytes)
        if config["preflight_only"]:
            return {"status": "checked", "report": check_job(run, world, link, attempt).facts()}
        faults = [Fault(**fault) for fault in config["faults"]]
        loss = with_faults(functools.partial(sum_losses, config=spec.model), faults, world.rank, run.path)
        validate = None
        if spec.training.validate_every_epochs:
            validate = prepare_validation(run, world.rank, world.size, world.all_gather_object)
        return dataclasses.asdict(train_job(run, world, link, attempt=attempt, loss=loss, validate=validate))


def _memory_estimate(run: Run, world: World) -> float:
    """Bytes that a worker needs on its device, as `refinedet plan` calculates them."""
    from refinedet.model.cost import count_cost
    from refinedet.pipeline.config.batches import plan_batches
    from refinedet.pipeline.planning.plan import DEVICES, estimate
    from refinedet.pipeline.training.engine import resolve_precision

    spec = run.spec
    batch = plan_batches(spec.training, world.size)
    device = DEVICES["H100" if spec.cluster.gpus_per_worker else "CPU"]
    training = spec.training.model_copy(update={"precision": resolve_precision(spec.training, world.device)})
    return estimate(spec.model, count_cost(spec.model), training, batch, device).memory_bytes
