"""One training worker from start to end, whether Ray Train, torchrun or a shell started it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from refinedet.model import RefineDet, sum_losses
from refinedet.model.cost import count_cost
from refinedet.pipeline.config.batches import BatchPlan, training_sizes
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.data.index import INDEX, ShardSet, open_shards
from refinedet.pipeline.data.samples import Cursor
from refinedet.pipeline.data.stream import TrainingStream
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.engine import LossFunction
from refinedet.pipeline.training.initial_weights import load_initial_weights
from refinedet.pipeline.training.loop import train
from refinedet.pipeline.training.records import Event, StepRecord, TrainResult
from refinedet.pipeline.training.task import Callbacks, Task
from refinedet.pipeline.training.watchdog import StallVerdict, exit_process
from refinedet.pipeline.training.worker_checks import PreflightReport, check_workers
from refinedet.pipeline.training.world import World
from torch import nn

Validate = Callable[[nn.Module, int], Mapping[str, float]]
"""(detector in eval mode, epochs done) -> metrics; called on every rank, rank 0's metrics count"""


class Link(Protocol):
    """Connection of a worker to whoever started the job."""

    @property
    def stop_requested(self) -> bool:
        """Read once a step; True on any rank makes all ranks save and end."""
        ...

    def push(self, message: StepRecord | Event, *, wait: bool = False) -> None:
        """Send a message without waiting. Rank 0 sends steps and events, any rank a stall.

        wait  return only once the message has arrived, or after a short limit
        """
        ...


@dataclass(frozen=True)
class Attempt:
    """One start of a job's workers."""

    number: int = 0
    """0 at the first start: a fault of the preflight is then a mistake of the user"""
    began_at: float | None = None
    """when the job began to wait for workers, seconds since 1970; goodput counts from there"""
    memory_bytes: float | None = None
    """estimate of what a worker needs on its device; None: not checked"""


def check_job(run: Run, world: World, link: Link, attempt: Attempt = Attempt()) -> PreflightReport:
    """Check workers, storage and shards, and send the report as an event. Collective."""
    return _check(run, world, link, attempt, open_training_shards(run, world))


def open_training_shards(run: Run, world: World) -> ShardSet | None:
    """The training shards, whose index rank 0 reads for all; None before they are written. Collective."""
    url = storage.join(run.shards, "train")
    return world.from_main(lambda: open_shards(url) if storage.exists(storage.join(url, INDEX)) else None)


def _check(run: Run, world: World, link: Link, attempt: Attempt, shards: ShardSet | None) -> PreflightReport:
    report = check_workers(world, run.path, shards, memory_bytes=attempt.memory_bytes)
    if world.is_main:
        link.push(Event("preflight", 0, str(report), report.facts()))
    return report


def train_job(
    run: Run,
    world: World,
    link: Link,
    *,
    attempt: Attempt = Attempt(),
    loss: LossFunction | None = None,
    validate: Validate | None = None,
) -> TrainResult:
    """Train the job of `run` from its newest good checkpoint, or from its initial weights, to the end. Collective.

    loss      default: the loss of `spec.model`; a drill passes one that fails
    validate  needed where `training.validate_every_epochs` is set

    Raises, on all ranks alike: UserError, NonFiniteError, RuntimeError, SaveError where the last checkpoint could not
    be written.
    """
    spec = run.spec
    shards = open_training_shards(run, world)
    _raise_faults(_check(run, world, link, attempt, shards), first=attempt.number == 0)
    if shards is None:
        raise UserError(f"{run.shards} holds no training shards: write them with `refinedet shard`")
    check_classes(run, shards)
    torch.manual_seed(spec.seed)
    names = [category.name for category in shards.categories]
    detector = RefineDet(spec.model, categories=names, exif=spec.data.exif)
    if spec.training.backbone_lr_multiplier == 0:
        for parameter in detector.pretrained_parameters():
            parameter.requires_grad_(False)
    initial = spec.training.init_weights
    task = Task(
        detector,
        loss or functools.partial(sum_losses, config=spec.model),
        make_stream=functools.partial(_open_stream, run, shards, world),
        run_dir=run.path,
        seed=spec.seed,
        facts={"spec": spec.model_dump(mode="json"), "shards": shards.digest},
        began_at=attempt.began_at,
        fork_from=storage.absolute(spec.training.fork_from) if spec.training.fork_from else None,
        gflops_an_image=_count_gflops(run) if world.is_main else None,
        load_initial=functools.partial(load_initial_weights, detector, initial) if initial else lambda: None,
    )
    report = link.push if world.is_main else _discard
    callbacks = Callbacks(
        on_step=report,
        on_event=report,
        validate=validate,
        validation_timeout_s=spec.evaluation.validation_timeout_s,
        stop_requested=lambda: link.stop_requested,
        on_stall=functools.partial(_report_stall, link),
    )
    return train(spec.training, world, task, callbacks)


def check_classes(run: Run, shards: ShardSet) -> None:
    """Raise UserError where the shards have another number of classes than the model."""
    if shards.num_classes != run.spec.model.num_classes:
        raise UserError(
            f"model.num_classes is {run.spec.model.num_classes}, but the data set has {shards.num_classes} "
            f"categories; set model.num_classes={shards.num_classes}."
        )


def _count_gflops(run: Run) -> float:
    """GFLOPs of an image of training, a mean over the input sizes; recomputed passes are no work of the model."""
    spec, sizes = run.spec, training_sizes(run.spec)
    trained = spec.training.backbone_lr_multiplier != 0
    costs = [count_cost(replace(spec.model, input_size=size, num_levels=spec.model.levels)) for size in sizes]
    return sum(cost.training_gflops(backbone_trained=trained) for cost in costs) / len(costs)


def _open_stream(run: Run, shards: ShardSet, world: World, start: Cursor, plan: BatchPlan) -> TrainingStream:
    return TrainingStream(
        shards,
        run.spec.data,
        input_size=training_sizes(run.spec),
        seed=run.spec.seed,
        batch=plan,
        rank=world.rank,
        start=start,
    )


def _raise_faults(report: PreflightReport, *, first: bool) -> None:
    """UserError at the first start; later a RuntimeError, since what was in order before may be so again."""
    try:
        report.raise_faults()
    except UserError as error:
        if first:
            raise
        raise RuntimeError(str(error)) from error


def _report_stall(link: Link, verdict: StallVerdict) -> None:
    """Send the verdict and end this process; called from the watchdog's thread."""
    facts = {"ranks": list(verdict.ranks), "hosts": list(verdict.hosts)}
    link.push(Event("stalled", verdict.step, str(verdict), facts), wait=True)
    exit_process(verdict)


def _discard(message: StepRecord | Event) -> None:
    """Ranks other than 0 send no records."""
