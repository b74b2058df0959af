"""Durations of the parts of a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields

import torch
from refinedet.pipeline.training.records import StepTimes

PHASES = tuple(field.name for field in fields(StepTimes) if field.name != "total")


class StepClock:
    """Measures the phases of one step after the other. A phase within a phase counts for itself alone.

    On CUDA, kernels run behind the host: forward, backward and reduce are measured by events, and read once the step's
    own check has waited for the device. What the optimizer's kernels take shows in the next step's forward.
    """

    def __init__(self, device: torch.device) -> None:
        self.phase = "start"
        """what is being done now; the watchdog reads it from another thread"""
        self._cuda = device.type == "cuda"
        self._step_began = time.perf_counter()
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        outer, self.phase = self.phase, phase
        on_device = self._cuda and phase in ("forward", "backward", "reduce")
        if on_device:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((phase, outer, begin, end))
        else:
            began = time.perf_counter()
            yield
            self._add(phase, outer, time.perf_counter() - began)
        self.phase = outer if outer in self._seconds else "loop"

    def finish_step(self) -> StepTimes:
        """Times of the step that ends here. The device has reached the last event."""
        now = time.perf_counter()
        for phase, outer, begin, end in self._events:
            self._add(phase, outer, begin.elapsed_time(end) / 1000)
        times = StepTimes(**self._seconds, total=now - self._step_began)
        self._step_began = now
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events.clear()
        return times

    def _add(self, phase: str, outer: str, seconds: float) -> None:
        self._seconds[phase] += seconds
        if outer in self._seconds:
            self._seconds[outer] -= seconds
