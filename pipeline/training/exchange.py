"""One small collective a step, in which the ranks agree; its size does not grow with their number."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from refinedet.pipeline.training.saving import SaveState
from refinedet.pipeline.training.world import World
from torch import Tensor


@dataclass(frozen=True)
class Agreed:
    """The same on all ranks."""

    values: list[float]
    """of the global batch: loss, its parts, shares of anchors"""
    stop: bool
    """one rank at least was asked to stop"""
    failed: bool
    """one rank at least has no batch"""
    saving: SaveState
    """WRITTEN once all ranks have written, FAILED once all have and one could not, else WRITING or IDLE"""
    given_up: bool
    """rank 0 has seen too many saves fail in a row"""
    committed_step: int
    """newest committed checkpoint by rank 0; -1: none"""
    same_order: bool
    """gradients became ready in the same order on all ranks"""

    @property
    def finite(self) -> bool:
        return all(map(math.isfinite, self.values))


def agree(
    world: World,
    values: Tensor,
    *,
    stop: bool,
    failed: bool,
    saving: SaveState,
    given_up: bool,
    committed_step: int,
    order: int,
) -> Agreed:
    """All ranks call it once a step; it waits for the device.

    values  [P], this rank's shares, which add up over the ranks
    order   checksum, 16 bits: equal on all ranks where (sum of orders)^2 is `size` times the sum of squares
    """
    states = [float(saving == state) for state in SaveState]
    of_main = [float(given_up), float(committed_step + 1)] if world.is_main else [0.0, 0.0]
    told = [float(stop), float(failed), *of_main, float(order), float(order) ** 2]
    numbers = torch.tensor([*told, *states], dtype=torch.float64, device=values.device)
    sums = world.sum(torch.cat([values.double(), numbers])).tolist()
    parts = values.numel()
    stops, failures, lost_hope, committed, orders, squares, *counts = sums[parts:]
    idle, _, written, lost = counts
    if written + lost == world.size:
        state = SaveState.FAILED if lost else SaveState.WRITTEN
    else:
        state = SaveState.IDLE if idle == world.size else SaveState.WRITING
    return Agreed(
        values=sums[:parts],
        stop=stops > 0,
        failed=failures > 0,
        saving=state,
        given_up=lost_hope > 0,
        committed_step=int(committed) - 1,
        same_order=orders**2 == world.size * squares,
    )
