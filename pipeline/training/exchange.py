"""One small collective a step, in which every rank learns what every other one has to say."""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass, fields

import torch
from refinedet.pipeline.training.checkpoint import SaveState
from refinedet.pipeline.training.records import StepTimes
from refinedet.pipeline.training.world import World
from torch import Tensor

_NUM_TIMES = len(fields(StepTimes))


@dataclass(frozen=True)
class Exchanged:
    """What the ranks said, by rank."""

    losses: list[list[float]]
    """of each rank: total and parts, means over its micro-batches"""
    gradient_norm: float
    """of the averaged gradient, over all ranks"""
    stop: bool
    """one rank at least was asked to stop"""
    failed: bool
    """one rank at least could not do its part"""
    save_states: list[SaveState]
    committed_step: int
    """newest committed checkpoint that rank 0 knows of; -1: none"""
    times: tuple[StepTimes, ...]
    """of the step before"""

    @property
    def mean_losses(self) -> list[float]:
        return [sum(values) / len(values) for values in zip(*self.losses, strict=True)]

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.mean_losses)) and math.isfinite(self.gradient_norm)

    @property
    def losses_finite(self) -> bool:
        return all(map(math.isfinite, self.mean_losses))


def exchange(
    world: World,
    losses: Tensor,
    squared_norm: Tensor,
    *,
    stop: bool,
    failed: bool,
    save_state: SaveState,
    committed_step: int,
    times: StepTimes,
) -> Exchanged:
    """All ranks call it once a step; it waits for the device.

    losses        [P] of this rank
    squared_norm  scalar, this rank's share
    """
    told = [float(stop), float(failed), float(save_state), float(committed_step), *astuple(times)]
    numbers = torch.tensor(told, dtype=torch.float64, device=losses.device)
    values = torch.cat([losses.double(), squared_norm.double().reshape(1), numbers])
    rows = world.all_gather(values).tolist()
    parts = losses.numel()
    rest = [row[parts + 1 :] for row in rows]
    return Exchanged(
        losses=[row[:parts] for row in rows],
        gradient_norm=math.sqrt(total) if (total := sum(row[parts] for row in rows)) >= 0 else math.nan,
        stop=any(row[0] for row in rest),
        failed=any(row[1] for row in rest),
        save_states=[SaveState(int(row[2])) for row in rest],
        committed_step=int(rest[0][3]),
        times=tuple(StepTimes(*row[4 : 4 + _NUM_TIMES]) for row in rest),
    )
