"""Training: the loop, the DeepSpeed engine, checkpoints. It never asks Ray or MLflow; it takes a `World`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refinedet.pipeline.lazy import import_when_asked

if TYPE_CHECKING:
    from refinedet.pipeline.training.batches import BatchPlan, plan_batches, possible_world_sizes
    from refinedet.pipeline.training.checkpoint import Checkpoint, Rejected, find_checkpoint
    from refinedet.pipeline.training.engine import resolve_precision
    from refinedet.pipeline.training.finite import NonFiniteError
    from refinedet.pipeline.training.goodput import Goodput, read_goodput
    from refinedet.pipeline.training.loop import train
    from refinedet.pipeline.training.preflight import Finding, PreflightReport, check_workers
    from refinedet.pipeline.training.records import Event, StepRecord, StepTimes, TrainResult
    from refinedet.pipeline.training.schedule import Schedule, make_schedule
    from refinedet.pipeline.training.stop import StopSignals
    from refinedet.pipeline.training.stragglers import Straggler, find_stragglers
    from refinedet.pipeline.training.watchdog import StallReport, StallVerdict, exit_process, judge_stall
    from refinedet.pipeline.training.world import World, open_world

__all__ = [
    "BatchPlan",
    "Checkpoint",
    "Event",
    "Finding",
    "Goodput",
    "NonFiniteError",
    "PreflightReport",
    "Rejected",
    "Schedule",
    "StallReport",
    "StallVerdict",
    "StepRecord",
    "StepTimes",
    "StopSignals",
    "Straggler",
    "TrainResult",
    "World",
    "check_workers",
    "exit_process",
    "find_checkpoint",
    "find_stragglers",
    "judge_stall",
    "make_schedule",
    "open_world",
    "plan_batches",
    "possible_world_sizes",
    "read_goodput",
    "resolve_precision",
    "train",
]

__getattr__ = import_when_asked(
    __name__,
    {
        "batches": ("BatchPlan", "plan_batches", "possible_world_sizes"),
        "checkpoint": ("Checkpoint", "Rejected", "find_checkpoint"),
        "engine": ("resolve_precision",),
        "finite": ("NonFiniteError",),
        "goodput": ("Goodput", "read_goodput"),
        "loop": ("train",),
        "preflight": ("Finding", "PreflightReport", "check_workers"),
        "records": ("Event", "StepRecord", "StepTimes", "TrainResult"),
        "schedule": ("Schedule", "make_schedule"),
        "stop": ("StopSignals",),
        "stragglers": ("Straggler", "find_stragglers"),
        "watchdog": ("StallReport", "StallVerdict", "exit_process", "judge_stall"),
        "world": ("World", "open_world"),
    },
)
