"""One Ray Train worker: `train_job` with a link to the driver. Only workers import this file."""

from __future__ import annotations

import importlib
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import ray.train
from refinedet.model.cost import count_cost
from refinedet.pipeline.cluster.mailbox import MailboxLink
from refinedet.pipeline.cluster.worker_task import Fatal, NodeSample, WorkerTask
from refinedet.pipeline.config.batches import plan_batches
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec_files import parse_spec
from refinedet.pipeline.evaluation.validation import prepare_validation
from refinedet.pipeline.planning.device_speeds import DEVICES
from refinedet.pipeline.planning.estimates import estimate_memory, largest_training_model
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.logs import log_folder, log_to_file, restore_loggers
from refinedet.pipeline.tracking.node_metrics import NodeSampler
from refinedet.pipeline.training.engine import resolve_precision
from refinedet.pipeline.training.finite import NonFiniteError
from refinedet.pipeline.training.records import Event, TrainResult
from refinedet.pipeline.training.saving import SaveError
from refinedet.pipeline.training.training_job import Attempt, check_job, train_job
from refinedet.pipeline.training.worker_checks import PreflightReport
from refinedet.pipeline.training.world import World, open_world

_PREEMPTION_INTERVAL_S = 2.0


def run_worker(task: WorkerTask) -> TrainResult | PreflightReport:
    """Train, or only check; returns what rank 0's driver gets."""
    run = Run(parse_spec(task.spec, source="the job's spec"))
    rank = ray.train.get_context().get_world_rank()
    restore_loggers()
    log_to_file(os.path.join(log_folder(run.path), f"train-rank{rank}.log"), who=f"rank {rank}")
    link = MailboxLink(task.mailbox, rank)
    link.push(_started(rank))
    if not task.preflight_only:
        threading.Thread(target=_watch_preemption, args=(link, rank), name="preemption", daemon=True).start()
        if ray.train.get_context().get_local_rank() == 0:
            _sample_node(link)
    try:
        # Without a GPU of its own a worker would take one that Ray has lent to others.
        with open_world(None if run.spec.cluster.gpus_per_worker else "cpu") as world:
            return _work(run, world, link, task)
    except (UserError, NonFiniteError, SaveError) as error:
        link.push(Fatal(isinstance(error, UserError), str(error)), wait=True)
        raise  # so that Ray Train ends the other ranks, which may be waiting for this one


def _work(run: Run, world: World, link: MailboxLink, task: WorkerTask) -> TrainResult | PreflightReport:
    memory_bytes = None
    if task.estimate_memory:
        memory_bytes = world.from_main(lambda: _memory_estimate(run, world))
    attempt = Attempt(0 if task.first else 1, task.began_at, memory_bytes)
    if task.preflight_only:
        return check_job(run, world, link, attempt)
    validate = prepare_validation(run, world)
    loss = _faulty_loss(task.fault, run, world.rank)
    return train_job(run, world, link, attempt=attempt, loss=loss, validate=validate)


def _started(rank: int) -> Event:
    node, host = ray.get_runtime_context().get_node_id(), socket.gethostname()
    facts = {"rank": rank, "node": node, "host": host, "address": ray.util.get_node_ip_address(), "pid": os.getpid()}
    return Event("started", 0, f"rank {rank} runs on {host}, process {os.getpid()}", facts)


def _sample_node(link: MailboxLink) -> None:
    """Send the load of this node until the process ends; the driver drops that of its own node, which it samples."""
    node, name = ray.get_runtime_context().get_node_id(), f"{socket.gethostname()}-{ray.util.get_node_ip_address()}"
    NodeSampler(lambda values: link.push(NodeSample(node, values)), node=name)


def _watch_preemption(link: MailboxLink, rank: int) -> None:
    """Stop the workers, which save, once Ray announces that one of their nodes will be preempted.

    `get_preemption_info` waits for all workers, so it has a thread of its own, which costs a step nothing.
    """
    while True:
        time.sleep(_PREEMPTION_INTERVAL_S)
        info = ray.train.get_preemption_info()
        if info is not None:
            if rank == 0:
                message = "a node will be preempted: saving, to resume on the others"
                link.push(Event("preempted", 0, message, {"nodes": info.preempted_node_ids}), wait=True)
            link.stop_requested = True
            return


def _faulty_loss(fault: str, run: Run, rank: int) -> Callable[..., Any] | None:
    if not fault:
        return None
    path, _, arguments = fault.partition(" ")
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)(arguments, run, rank)


def _memory_estimate(run: Run, world: World) -> float:
    """Bytes that a worker needs on its device, as `refinedet plan` calculates them."""
    spec = run.spec
    batch = plan_batches(spec.training, world.size)
    device = DEVICES["H100" if spec.cluster.gpus_per_worker else "CPU"]
    training = spec.training.model_copy(update={"precision": resolve_precision(spec.training, world.device)})
    return estimate_memory(count_cost(largest_training_model(spec)), training, batch, device).total_bytes
