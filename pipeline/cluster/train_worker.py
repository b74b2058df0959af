"""What one Ray Train worker does: check that all is there, then hand detector and stream to the loop."""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
import ray.train
from refinedet.pipeline.cluster.monitor import MonitorClient
from refinedet.pipeline.config.files import parse_spec
from refinedet.pipeline.drills.faults import Fault, with_faults
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.logs import log_folder, log_to_file, restore_loggers
from refinedet.pipeline.runs.run import Run

if TYPE_CHECKING:
    import torch
    from refinedet.pipeline.data.index import ShardSet
    from refinedet.pipeline.training.preflight import PreflightReport
    from refinedet.pipeline.training.world import World


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
    import torch
    from refinedet.model import RefineDet, detection_loss
    from refinedet.pipeline.config.batches import BatchPlan
    from refinedet.pipeline.data.samples import Cursor
    from refinedet.pipeline.data.stream import TrainingStream
    from refinedet.pipeline.training.checkpoint import find_checkpoint
    from refinedet.pipeline.training.initial_weights import load_initial_weights
    from refinedet.pipeline.training.loop import train
    from refinedet.pipeline.training.records import Event
    from refinedet.pipeline.training.watchdog import StallVerdict, exit_process
    from refinedet.pipeline.training.world import open_world

    restore_loggers()
    spec = run.spec
    shards = _open_shards(run)
    faults = [Fault(**fault) for fault in config["faults"]]

    # Without a GPU of its own a worker would take those that Ray has lent to others.
    with open_world(None if spec.cluster.gpus_per_worker else "cpu") as world:
        tell = monitor.push if world.is_main else lambda kind, content: None
        preflight = _check(run, world, shards, config["estimate_memory"])
        tell("event", dataclasses.asdict(Event("preflight", 0, str(preflight), dataclasses.asdict(preflight))))
        if config["preflight_only"]:
            return {"status": "checked", "report": dataclasses.asdict(preflight)}
        _raise_faults(preflight, again=config["attempt"] > 0)
        assert shards is not None
        torch.manual_seed(spec.seed)
        detector = RefineDet(spec.model)
        if spec.training.init_weights and world.broadcast_object(world.is_main and not find_checkpoint(run.path)[0]):
            load_initial_weights(detector, spec.training.init_weights)

        def make_stream(start: Cursor, plan: BatchPlan) -> TrainingStream:
            return TrainingStream(
                shards,
                input_size=spec.model.input_size,
                augmentation=spec.data.augmentation,
                seed=spec.seed,
                global_batch=plan.global_batch,
                micro_batch=plan.micro_batch,
                rank=world.rank,
                world_size=world.size,
                workers=spec.data.loader_workers,
                start=start,
                shuffle_window=spec.data.shuffle_window,
                canonical_streams=spec.data.canonical_streams,
                cache_dir=spec.data.cache_dir,
                cache_bytes=spec.data.cache_bytes,
                max_bad_samples=spec.data.max_bad_samples,
                include_difficult=spec.data.include_difficult,
            )

        def on_stall(verdict: StallVerdict) -> None:
            facts = {"ranks": list(verdict.ranks), "hosts": list(verdict.hosts)}
            event = Event("stalled", verdict.step, str(verdict), facts)
            monitor.push("event", dataclasses.asdict(event), wait=True)
            exit_process(verdict)

        result = train(
            spec.training,
            seed=spec.seed,
            world=world,
            detector=detector,
            loss=with_faults(functools.partial(detection_loss, config=spec.model), faults, world.rank, run.path),
            make_stream=make_stream,
            run_dir=run.path,
            observer=lambda record: tell("step", dataclasses.asdict(record)),
            on_event=lambda event: tell("event", dataclasses.asdict(event)),
            validate=_validation(run, world) if spec.training.validate_every_epochs else None,
            stop_requested=lambda: monitor.stop_requested,
            on_stall=on_stall,
            began_at=config["began_at"],
            facts={"spec": spec.model_dump(mode="json"), "shards": shards.digest},
        )
        return dataclasses.asdict(result)


def _raise_faults(preflight: PreflightReport, *, again: bool) -> None:
    """A mistake of the user at the first attempt; later, what was in order before may be so again."""
    try:
        preflight.raise_faults()
    except UserError as error:
        if again:
            raise RuntimeError(str(error)) from error
        raise


def _validation(run: Run, world: World) -> Callable[[torch.nn.Module, int], dict[str, float]]:
    from refinedet.pipeline.data.index import open_shards
    from refinedet.pipeline.evaluation.measures import usual_rule
    from refinedet.pipeline.evaluation.truth import GroundTruth
    from refinedet.pipeline.evaluation.validation import validate

    part = run.spec.training.validate_on
    shards = open_shards(storage.join(run.shards, part))
    splits = run.spec.data.train if part == "train" else run.spec.data.val
    image_set = shards.sets[0] if shards.sets else splits[0].set
    rule = run.spec.evaluation.rule or usual_rule(shards.format, image_set)
    truth = GroundTruth.of(run.ground_truth(part))

    def measure(detector: torch.nn.Module, epochs_done: int) -> dict[str, float]:
        return validate(
            detector,  # type: ignore[arg-type] - the detector that was handed to `train`
            shards,
            truth,
            rank=world.rank,
            world_size=world.size,
            all_gather=world.all_gather_object,
            evaluation=run.spec.evaluation,
            measure=rule,
            max_bad_samples=run.spec.data.max_bad_samples,
        ).values

    return measure


def _open_shards(run: Run) -> ShardSet | None:
    """The training shards; None where they are not written yet, as before a first launch."""
    from refinedet.pipeline.data.index import open_shards

    url = storage.join(run.shards, "train")
    return open_shards(url) if storage.exists(storage.join(url, "index.json")) else None


def _check(run: Run, world: World, shards: ShardSet | None, estimate_memory: bool) -> PreflightReport:
    from refinedet.pipeline.training.preflight import check_workers

    memory_bytes = None
    if estimate_memory:
        memory_bytes = world.broadcast_object(_memory_estimate(run, world) if world.is_main else None)
    return check_workers(world, run.path, shards, memory_bytes=memory_bytes)


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
