"""Records of training: one per step, events, the result."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class StepTimes:
    """Seconds one rank spent in the parts of one step."""

    data: float = 0.0
    """waiting for the next micro-batches, and moving them to the device"""
    forward: float = 0.0
    backward: float = 0.0
    """with the reduction of gradients, which overlaps it"""
    reduce: float = 0.0
    """waiting for slower ranks before the loss is divided"""
    optimizer: float = 0.0
    """checks, update, gathering of updated weights"""
    checkpoint: float = 0.0
    """what saving held up; the writing itself runs beside training"""
    validation: float = 0.0
    total: float = 0.0


@dataclass(frozen=True)
class StepRecord:
    """One step, as one rank saw it."""

    step: int
    """steps taken from the beginning of training, this one included"""
    total_steps: int
    epoch: int
    """from 0"""
    batch: int
    """global batch within the epoch, from 0"""
    learning_rate: float
    losses: dict[str, float]
    """loss parts and `total`, of the global batch (equation 1)"""
    shares: dict[str, float]
    """shares of the global batch's anchors: `survivors_1` (finest level), ... that pass the ARM's negative filter, and
    `rows` that the ADM computed"""
    gradient_norm: float
    """of the whole gradient, before clipping; inf where the step was skipped"""
    loss_scale: float
    """1 unless the precision is fp16"""
    applied: bool
    """False where the step was skipped"""
    skipped_steps: int
    """steps skipped so far for a loss or gradient that was not finite (in fp16 beyond what loss scaling expects)"""
    images: int
    """of all ranks"""
    images_per_s: float
    """of all ranks, validation apart"""
    memory_bytes: int
    """device memory in use at its highest, or resident memory on a CPU; of this rank"""
    times: StepTimes
    model_tflops: float | None = None
    """TFLOP/s of all ranks, forward and backward with every anchor; recomputed passes do not count; None: unknown"""
    mfu: float | None = None
    """the same as a share of what the devices' vendor states in bf16, 0..1; None on a CPU and an unknown GPU"""

    def line(self) -> dict[str, Any]:
        """Return the record as a line of metrics.jsonl."""
        kept = ("step", "total_steps", "epoch", "learning_rate", "losses", "shares", "gradient_norm", "images_per_s")
        line = {name: getattr(self, name) for name in (*kept, "memory_bytes", "skipped_steps")}
        line |= {name: value for name in ("model_tflops", "mfu") if (value := getattr(self, name)) is not None}
        return {**line, "time": time.time(), "times": asdict(self.times)}


@dataclass(frozen=True)
class Event:
    """Something worth telling beside the steps. `facts` are JSON values."""

    kind: Literal[
        "started",
        "preflight",
        "resumed",
        "saved",
        "save_failed",
        "passed_over",
        "skipped",
        "validated",
        "straggler",
        "stalled",
        "waiting",
        "restarted",
        "preempted",
        "resized",
        "left_out",
    ]
    step: int
    message: str
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainResult:
    """End of training; the same on every rank."""

    status: Literal["finished", "stopped"]
    step: int
    epoch: int
    checkpoint: str | None
    """the last checkpoint, committed"""
    weights: str | None
    """weights.safetensors, once finished"""
    best: str | None = None
    """the checkpoint that validated best"""
    metrics: dict[str, float] = field(default_factory=dict)
    """of the last validation"""
