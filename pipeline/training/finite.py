"""Losses and gradients that are not finite: found by all ranks alike, and reported alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from refinedet.pipeline.training.engine import Engine
from refinedet.pipeline.training.world import World
from torch import Tensor


@dataclass(frozen=True)
class MicroBatch:
    """A micro-batch, kept until its step is checked."""

    keys: tuple[str, ...]
    images: Tensor
    targets: Sequence[Any]
    values: Tensor
    """[P] losses, in the order of the engine's names, and shares of anchors"""

    def losses(self, names: Sequence[str]) -> dict[str, float]:
        return dict(zip(names, self.values[: len(names)].tolist(), strict=True))


class NonFiniteError(FloatingPointError):
    """A step whose loss or gradient is not finite; the same message on every rank."""


def explain_non_finite(engine: Engine, world: World, step: int, micro_batches: Sequence[MicroBatch]) -> str:
    """Name rank, loss parts and samples, or parameters, that are not finite. Collective."""
    mine = [
        f"rank {world.rank}: {', '.join(f'{name} {value}' for name, value in batch.losses(engine.names).items())}; "
        f"samples {', '.join(filter(None, batch.keys))}"
        for batch in micro_batches
        if not batch.values.isfinite().all()
    ]
    said = [line for lines in world.all_gather_object(mine) for line in lines]
    if said:
        return f"step {step}: the loss is not finite on {' | '.join(said)}"
    again = engine.non_finite_gradients([(batch.images, batch.targets) for batch in micro_batches])
    names = sorted({name for names in world.all_gather_object(again) for name in names})
    keys = [f"rank {rank}: {', '.join(keys)}" for rank, keys in enumerate(_all_keys(world, micro_batches))]
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"step {step}: the loss is finite, its gradient is not, in {shown or 'its norm'}; samples {' | '.join(keys)}"


def _all_keys(world: World, micro_batches: Sequence[MicroBatch]) -> list[list[str]]:
    return world.all_gather_object([key for batch in micro_batches for key in batch.keys if key])
