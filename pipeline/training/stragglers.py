"""Detection of a rank that the others wait for, and of the part in which it is slow."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import median

import torch
from refinedet.pipeline.training.records import StepTimes
from refinedet.pipeline.training.world import World
from torch import Tensor

OWN_WORK = ("data", "forward", "checkpoint")
"""Phases in which a rank does not wait for others; backward reduces gradients as it goes."""
_RATIO = 1.5
_LEAST_S = 0.02
_WINDOWS = 2
"""Windows in a row in which the same rank is slow; one alone may be chance."""


@dataclass(frozen=True)
class Straggler:
    rank: int
    part: str
    """of OWN_WORK: where the excess is"""
    seconds: float
    """median a step of this rank's own work"""
    typical_s: float
    """median over the ranks"""

    def __str__(self) -> str:
        times = f"{self.seconds:.3f} s of work a step, others {self.typical_s:.3f} s"
        return f"rank {self.rank} is slow in {self.part}: {times}"


def find_stragglers(work: Tensor) -> list[Straggler]:
    """Ranks whose own work takes longer than that of the rest by half, and by more than noise.

    work     [ranks, phases of OWN_WORK]  seconds per step
    returns  slowest first
    """
    if len(work) < 2:
        return []
    totals = work.sum(1)
    typical = float(totals.sort().values[(len(work) - 1) // 2])
    excess = work - work.amin(0)
    found = []
    for rank in (totals > max(_RATIO * typical, typical + _LEAST_S)).nonzero().flatten().tolist():
        part = OWN_WORK[int(excess[rank].argmax())]
        found.append(Straggler(rank, part, float(totals[rank]), typical))
    return sorted(found, key=lambda straggler: -straggler.seconds)


class StragglerWatch:
    """Compares the ranks once every `window` steps; returns a verdict once as long as it stays the same."""

    def __init__(self, world: World, window: int = 20) -> None:
        self._world = world
        self._window = window
        self._steps: list[StepTimes] = []
        self._suspects: Counter[tuple[int, str]] = Counter()

    def add(self, times: StepTimes) -> list[Straggler]:
        """Times of this rank's step -> new verdicts, on all ranks. Collective."""
        self._steps.append(times)
        if len(self._steps) < self._window or self._world.size == 1:
            del self._steps[: -self._window]
            return []
        medians = [median(getattr(step, phase) for step in self._steps) for phase in OWN_WORK]
        self._steps.clear()
        row = torch.tensor(medians, dtype=torch.float64, device=self._world.device)
        found = find_stragglers(self._world.all_gather(row).cpu())
        seen = {(straggler.rank, straggler.part) for straggler in found}
        self._suspects = Counter({suspect: self._suspects[suspect] + 1 for suspect in seen})
        return [straggler for straggler in found if self._suspects[straggler.rank, straggler.part] == _WINDOWS]
