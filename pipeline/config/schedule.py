"""The learning rate: a linear warm-up, then steps down by ten (section IV-E), in global steps."""

from __future__ import annotations

from dataclasses import dataclass

from refinedet.pipeline.config.spec import Training


@dataclass(frozen=True)
class Schedule:
    """Learning rate of every step. Rates were scaled by the linear rule: global_batch / reference_batch."""

    peak: float
    warmup_from: float
    warmup_steps: int
    decay_steps: tuple[int, ...]
    total_steps: int
    steps_per_epoch: int

    def learning_rate(self, step: int) -> float:
        """Rate of the step number `step`, from 0."""
        if step < self.warmup_steps:
            return self.warmup_from + (self.peak - self.warmup_from) * step / self.warmup_steps
        return self.peak * 0.1 ** sum(step >= decay for decay in self.decay_steps)


def make_schedule(spec: Training, steps_per_epoch: int) -> Schedule:
    scale = spec.global_batch / spec.reference_batch
    return Schedule(
        peak=spec.learning_rate * scale,
        warmup_from=spec.warmup_learning_rate * scale,
        warmup_steps=round(spec.warmup_epochs * steps_per_epoch),
        decay_steps=tuple(round(epoch * steps_per_epoch) for epoch in spec.decay_epochs),
        total_steps=spec.epochs * steps_per_epoch,
        steps_per_epoch=steps_per_epoch,
    )
