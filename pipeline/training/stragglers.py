"""Which rank the others wait for, and in what."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from refinedet.pipeline.training.records import StepTimes

OWN_WORK = ("data", "forward", "backward", "checkpoint")
"""Phases in which a rank does not wait for others. At ZeRO 2 backward averages gradients too, and is left out."""
_RATIO = 1.3
_LEAST_S = 0.01


@dataclass(frozen=True)
class Straggler:
    rank: int
    part: str
    """data, forward, backward or checkpoint"""
    seconds: float
    """median a step of this rank's own work"""
    typical_s: float
    """that of the other ranks, at most"""

    def __str__(self) -> str:
        times = f"{self.seconds:.3f} s of work a step, others {self.typical_s:.3f} s"
        return f"rank {self.rank} is slow in {self.part}: {times}"


def find_stragglers(steps: Sequence[Sequence[StepTimes]], zero_stage: int = 0) -> list[Straggler]:
    """Ranks whose own work takes longer than that of the rest by a third, and by more than noise.

    steps   times of every rank, by rank, of some steps one after the other; medians are taken over these
    returns slowest first
    """
    if not steps or len(steps[0]) < 2:
        return []
    phases = [phase for phase in OWN_WORK if not (phase == "backward" and zero_stage == 2)]
    ranks = range(len(steps[0]))
    parts = {phase: [median(getattr(step[rank], phase) for step in steps) for rank in ranks] for phase in phases}
    work = [median(sum(getattr(step[rank], phase) for phase in phases) for step in steps) for rank in ranks]
    typical = sorted(work)[(len(work) - 1) // 2]
    found = []
    for rank in ranks:
        if work[rank] > max(_RATIO * typical, typical + _LEAST_S):
            excess = {phase: parts[phase][rank] - min(parts[phase]) for phase in phases}
            found.append(Straggler(rank, max(excess, key=lambda phase: excess[phase]), work[rank], typical))
    return sorted(found, key=lambda straggler: -straggler.seconds)


class StragglerWatch:
    """Looks at the last steps now and then, and says a verdict once as long as it stays the same."""

    def __init__(self, zero_stage: int, window: int = 20) -> None:
        self._zero_stage = zero_stage
        self._steps: deque[Sequence[StepTimes]] = deque(maxlen=window)
        self._seen = 0
        self._told: set[tuple[int, str]] = set()

    def add(self, times: Sequence[StepTimes]) -> list[Straggler]:
        """Times of one step on all ranks -> new verdicts."""
        self._steps.append(times)
        self._seen += 1
        if self._seen % (self._steps.maxlen or 1):
            return []
        found = find_stragglers(self._steps, self._zero_stage)
        new = [straggler for straggler in found if (straggler.rank, straggler.part) not in self._told]
        self._told = {(straggler.rank, straggler.part) for straggler in found}
        return new
