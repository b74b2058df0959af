"""The training loop, once, from top to bottom. It runs under Ray Train, under torchrun, and alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from pipeline.spec import Training
from pipeline.training.batches import BatchPlan
from pipeline.training.records import Event, StepRecord, TrainResult
from pipeline.training.world import World

if TYPE_CHECKING:
    from pipeline.data import Cursor, TrainingStream


def train(
    spec: Training,
    *,
    seed: int,
    world: World,
    detector: nn.Module,
    loss: Callable[[Any, Sequence[Any]], Any],
    make_stream: Callable[[Cursor, BatchPlan], TrainingStream],
    run_dir: str,
    observer: Callable[[StepRecord], None] = lambda record: None,
    on_event: Callable[[Event], None] = lambda event: None,
    validate: Callable[[nn.Module, int], Mapping[str, float]] | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
    facts: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train `detector` from the newest good checkpoint under `run_dir`, or from its own weights, to the end.

    Every rank calls it with the same arguments, and its own world, stream and callbacks.

    detector        on the CPU, initialised alike on every rank (rank 0's weights win)
    loss            (predictions, targets) -> Losses, as `model.detection_loss` with its config bound
    make_stream     (where to start, how batches divide) -> this rank's micro-batches
    run_dir         folder or URI; checkpoints/ and weights.safetensors come to lie in it
    observer        called on every rank after every step
    on_event        called on every rank: resumed, saved, passed over, skipped, validated, ...
    validate        (detector in eval mode, epochs done) -> metrics, on every rank; rank 0's count, `AP` chooses the best
    stop_requested  asked every step; True on any rank saves and ends training on all
    facts           JSON values that go into every checkpoint's manifest: the resolved spec, the shards' digest
    """
    raise NotImplementedError
