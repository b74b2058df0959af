"""The facts in a checkpoint's manifest, and whether a run may resume from them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from refinedet.pipeline.config.schedule import Schedule
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.checkpoint import Checkpoint
from refinedet.pipeline.training.step import TrainState


def check_same_data(checkpoint: Checkpoint, schedule: Schedule, global_batch: int, shards: str | None) -> None:
    """A cursor and a schedule mean something else with other shards or another global batch: UserError."""
    known = checkpoint.manifest["facts"].get("shards", shards) if shards else None
    of_then = checkpoint.manifest | {"shards": known}
    of_now = {"steps_per_epoch": schedule.steps_per_epoch, "global_batch": global_batch, "shards": shards}
    for name, now in of_now.items():
        then = of_then[name]
        if then != now:
            raise UserError(
                f"the run's checkpoint {checkpoint.path} was written with {name} {then}, and now it is {now}; resume "
                "with the data and the global batch of before, or start a run of another name"
            )


def check_steps_left(checkpoint: Checkpoint, schedule: Schedule, run_dir: str) -> None:
    """A fork of a run that has done all the steps of this one: UserError."""
    if checkpoint.step >= schedule.total_steps and not checkpoint.path.startswith(run_dir.rstrip("/") + "/"):
        raise UserError(
            f"training.fork_from: {checkpoint.path} has done {checkpoint.step} steps, and training.epochs="
            f"{schedule.total_steps // schedule.steps_per_epoch} are {schedule.total_steps}; raise training.epochs"
        )


def manifest_facts(state: TrainState, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata for the manifest of a checkpoint; with a score where these weights were validated."""
    epoch, batch = divmod(state.step, state.schedule.steps_per_epoch)
    validated = state.validated_step == state.step
    score = state.metrics.get("AP", next(iter(state.metrics.values()), None)) if validated else None
    return {
        "epoch": epoch,
        "batch": batch,
        "steps_per_epoch": state.schedule.steps_per_epoch,
        "global_batch": state.engine.plan.global_batch,
        "world_size": state.engine.plan.world_size,
        "zero_stage": state.engine.spec.zero_stage,
        "precision": state.engine.precision,
        "loss_scale": [state.engine.scale.value, state.engine.scale.good_steps],
        "skipped_steps": state.skipped,
        "metrics": dict(state.metrics),
        "score": score,
        "saved_at": time.time(),
        "facts": dict(facts),
    }
