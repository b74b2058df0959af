"""Going on where a run stopped, and what a checkpoint's manifest says for that."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from refinedet.pipeline.config.batches import BatchPlan
from refinedet.pipeline.config.schedule import Schedule
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.checkpoint import Checkpoint, find_checkpoint, set_aside
from refinedet.pipeline.training.engine import Engine
from refinedet.pipeline.training.records import Event
from refinedet.pipeline.training.world import World

if TYPE_CHECKING:
    from refinedet.pipeline.data.samples import Cursor


def choose_checkpoint(run_dir: str, world: World, on_event: Callable[[Event], None]) -> Checkpoint | None:
    """Rank 0 looks, sets damaged ones aside, and all ranks take what it found. Collective."""
    found, rejected = world.broadcast_object(find_checkpoint(run_dir) if world.is_main else (None, []))
    for bad in rejected if world.is_main else ():
        set_aside(bad)
    for bad in rejected:
        on_event(Event("passed_over", bad.step, str(bad), {"checkpoint": bad.path, "faults": list(bad.faults)}))
    return found


def start_cursor(checkpoint: Checkpoint | None) -> Cursor:
    from refinedet.pipeline.data.samples import Cursor

    return Cursor(checkpoint.manifest["epoch"], checkpoint.manifest["batch"]) if checkpoint else Cursor()


def check_same_data(checkpoint: Checkpoint, schedule: Schedule, plan: BatchPlan, shards: str | None) -> None:
    """A cursor and a schedule mean something else with other shards or another global batch."""
    known = checkpoint.manifest["facts"].get("shards", shards) if shards else None
    of_then = checkpoint.manifest | {"shards": known}
    of_now = {"steps_per_epoch": schedule.steps_per_epoch, "global_batch": plan.global_batch, "shards": shards}
    for name, now in of_now.items():
        then = of_then[name]
        if then != now:
            raise UserError(
                f"the run's checkpoint {checkpoint.path} was written with {name} {then}, and now it is {now}; go on "
                "with the data and the global batch of before, or start a run of another name"
            )


def manifest_facts(
    step: int,
    schedule: Schedule,
    plan: BatchPlan,
    engine: Engine,
    skipped_steps: int,
    metrics: Mapping[str, float],
    facts: Mapping[str, Any],
    validated: bool,
) -> dict[str, Any]:
    """What the manifest of a checkpoint says beside its files; it has a score where these very weights were validated.

    metrics  of the last validation, at whatever step it was
    """
    epoch, batch = divmod(step, schedule.steps_per_epoch)
    return {
        "epoch": epoch,
        "batch": batch,
        "steps_per_epoch": schedule.steps_per_epoch,
        "global_batch": plan.global_batch,
        "world_size": plan.world_size,
        "zero_stage": engine.zero_stage,
        "precision": engine.precision,
        "loss_scale": [engine.scale.value, engine.scale.good_steps],
        "skipped_steps": skipped_steps,
        "metrics": dict(metrics),
        "score": metrics.get("AP", next(iter(metrics.values()), None)) if validated else None,
        "saved_at": time.time(),
        "facts": dict(facts),
    }
