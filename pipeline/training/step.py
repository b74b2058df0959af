"""One training step, and the state that it changes; the loop counts the step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from refinedet.pipeline.config.schedule import Schedule
from refinedet.pipeline.training.clock import StepClock
from refinedet.pipeline.training.ema import AveragedWeights
from refinedet.pipeline.training.engine import Engine
from refinedet.pipeline.training.feed import Feed
from refinedet.pipeline.training.finite import MicroBatch
from refinedet.pipeline.training.state import seed_everything


@dataclass
class TrainState:
    """Everything that training changes; a checkpoint holds it. `step` is also the place in the data."""

    engine: Engine
    average: AveragedWeights
    feed: Feed
    schedule: Schedule
    seed: int
    step: int = 0
    """steps taken, so that the next one has this number; from 0"""
    skipped: int = 0
    """steps skipped for a loss or gradient that was not finite"""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """of the last validation"""
    validated_step: int = -1
    """step of the last validation in this process; -1: none. Not in a checkpoint"""


@dataclass(frozen=True)
class StepOutcome:
    """One step as this rank saw it."""

    learning_rate: float
    micro_batches: list[MicroBatch]
    applied: bool
    """False where the gradient was not finite: weights and momentum are as before; the same on all ranks"""

    @property
    def values(self) -> torch.Tensor:
        """[P] loss, its parts, and shares of anchors of this rank's images; over the ranks they add up to the global
        batch's. Each micro-batch's are scaled to be the whole step's, so that their mean is taken."""
        return torch.stack([batch.values for batch in self.micro_batches]).mean(0)


def train_step(state: TrainState, clock: StepClock) -> StepOutcome:
    """One step of SGD on one global batch, of which this rank has `plan.accumulation` micro-batches (section IV-E).

    `engine.backward` reduces the gradient over the ranks while it runs. `engine.step` is DeepSpeed's: it clips the
    gradient, updates the weights and clears the gradient.
    """
    engine, step = state.engine, state.step
    seed_everything(state.seed, engine.world.rank, step)  # each step anew, so that a resumed run draws the same
    learning_rate = state.schedule.learning_rate(step)
    buffers_before = engine.buffers.copy() if engine.spec.non_finite == "skip" else None

    with clock.measure("data"):
        epoch, batch = divmod(step, state.schedule.steps_per_epoch)
        batches = [state.feed.next(epoch, batch) for _ in range(engine.plan.accumulation)]

    if len(batches) > 1:  # equation 1 divides by the positives of all of them, which costs one more forward pass
        with clock.measure("forward"):
            engine.count_positives([(images, targets) for images, targets, _ in batches])

    micro_batches: list[MicroBatch] = []
    for images, targets, keys in batches:
        with clock.measure("forward"):
            total, losses = engine.forward(images, targets)
        with clock.measure("backward"):
            engine.backward(total)
        micro_batches.append(MicroBatch(keys, images, targets, losses))

    with clock.measure("optimizer"):
        applied = engine.step(learning_rate)
        if applied:
            state.average.update(step)
        elif buffers_before is not None:
            engine.buffers.restore(buffers_before)  # running statistics that the skipped step has changed
        engine.buffers.average(engine.world)  # every rank's running statistics are then the same
    return StepOutcome(learning_rate, micro_batches, applied)
