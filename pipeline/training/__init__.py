"""Training: the loop, the DeepSpeed engine, checkpoints. It never asks Ray or MLflow; it takes a `World`."""

from pipeline.training.batches import BatchPlan, plan_batches
from pipeline.training.loop import train
from pipeline.training.records import Event, StepRecord, StepTimes, TrainResult
from pipeline.training.schedule import Schedule, make_schedule
from pipeline.training.world import World, open_world

__all__ = [
    "BatchPlan",
    "Event",
    "Schedule",
    "StepRecord",
    "StepTimes",
    "TrainResult",
    "World",
    "make_schedule",
    "open_world",
    "plan_batches",
    "train",
]
