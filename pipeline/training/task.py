"""Inputs of training: a task, and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from refinedet.pipeline.config.batches import BatchPlan
from refinedet.pipeline.data.samples import Cursor
from refinedet.pipeline.training.engine import LossFunction
from refinedet.pipeline.training.records import Event, StepRecord
from refinedet.pipeline.training.watchdog import StallVerdict, exit_process
from torch import nn

if TYPE_CHECKING:
    from refinedet.pipeline.data.stream import TrainingStream


@dataclass(frozen=True)
class Task:
    """Detector, loss and data; the same on every rank but for the stream."""

    detector: nn.Module
    """on the CPU, initialised alike on every rank (rank 0's weights win)"""
    loss: LossFunction
    make_stream: Callable[[Cursor, BatchPlan], TrainingStream]
    """(where to start, how batches divide) -> this rank's micro-batches"""
    run_dir: str
    """directory or URI that holds checkpoints/, goodput/, stalls/ and weights.safetensors"""
    seed: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    """JSON values that go into every manifest and into the weights: the spec, the shards' digest"""
    began_at: float | None = None
    """when the job began to wait for workers, seconds since 1970; goodput counts from there"""
    fork_from: str | None = None
    """another run's directory or URI, whose newest checkpoint is gone on from where this run has none"""
    gflops_an_image: float | None = None
    """of forward and backward, for the rate that is logged; None: not counted"""
    load_initial: Callable[[], object] = lambda: None
    """sets the detector's initial weights; called where there is no checkpoint"""


@dataclass(frozen=True)
class Callbacks:
    """Callbacks of training. Records and events are the same on every rank; ranks other than 0 drop them.

    validate        (detector in eval mode, epochs done) -> metrics, on every rank; rank 0's count, `AP` is the score
    stop_requested  read once a step; True on any rank saves and ends training on all
    validation_timeout_s  limit of `validate`; a rank that takes `stall_timeout_s` more is stalled, as in a step
    on_stall        called from a thread, on every rank that can, when a step takes longer than `stall_timeout_s`
    """

    on_step: Callable[[StepRecord], None] = lambda record: None
    on_event: Callable[[Event], None] = lambda event: None
    validate: Callable[[nn.Module, int], Mapping[str, float]] | None = None
    validation_timeout_s: float = 3600.0
    stop_requested: Callable[[], bool] = lambda: False
    on_stall: Callable[[StallVerdict], None] = exit_process
