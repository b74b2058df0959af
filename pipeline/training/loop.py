"""The training loop, once, from top to bottom. It runs under Ray Train, under torchrun, and alone."""

from __future__ import annotations

import json
import logging
import resource
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import nn

from pipeline import storage
from pipeline.errors import UserError
from pipeline.spec import Training
from pipeline.training.batches import BatchPlan, plan_batches
from pipeline.training.checkpoint import Checkpoint, CheckpointWriter, best_checkpoint, find_checkpoint
from pipeline.training.clock import StepClock
from pipeline.training.ema import AveragedWeights
from pipeline.training.engine import Engine
from pipeline.training.exchange import exchange
from pipeline.training.finite import MicroBatch, NonFiniteError, explain_non_finite
from pipeline.training.records import Event, StepRecord, StepTimes, TrainResult
from pipeline.training.schedule import Schedule, make_schedule
from pipeline.training.state import StateReader, capture_state, seed_everything
from pipeline.training.world import World

if TYPE_CHECKING:
    from pipeline.data import Cursor, TrainingStream

logger = logging.getLogger(__name__)

WEIGHTS = "weights.safetensors"


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
    validate        (detector in eval mode, epochs done) -> metrics, on every rank; rank 0's count, `AP` the score
    stop_requested  asked every step; True on any rank saves and ends training on all
    facts           JSON values that go into every checkpoint's manifest: the resolved spec, the shards' digest
    """
    plan = plan_batches(spec, world.size)
    seed_everything(seed, world.rank)
    torch.use_deterministic_algorithms(spec.deterministic)
    checkpoint = _choose_checkpoint(run_dir, world, on_event)
    saved = StateReader(checkpoint) if checkpoint else None
    if saved:
        saved.load_detector(detector, world.rank, world.size)
    else:
        world.broadcast_([buffer for buffer in detector.buffers() if buffer.is_floating_point()], source=0)

    with ExitStack() as stack:
        engine = Engine(detector, loss, spec, plan, world)
        stack.callback(engine.close)
        average = AveragedWeights(detector, spec.ema_decay, world)
        writer = CheckpointWriter(run_dir, world, spec.keep_last, spec.keep_best)
        stack.callback(writer.close)
        step = skipped = 0
        metrics: dict[str, float] = {}
        if saved:
            known = saved.checkpoint.manifest
            step, skipped, metrics = known["step"], known["skipped_steps"], known["metrics"]
            saved.load_momentum(engine)
            average.load(saved.ema)
            engine.scale.value, engine.scale.good_steps = known["loss_scale"]
            if not saved.load_rng(world.rank, world.size, world.device):
                seed_everything(seed, world.rank, step)
            writer.resume(saved.checkpoint)
            on_event(Event("resumed", step, f"resumed from step {step}", {"checkpoint": saved.checkpoint.path}))

        stream = make_stream(_cursor(saved.checkpoint.manifest if saved else {}), plan)
        stack.enter_context(closing(stream))
        batches = iter(stream)
        schedule = make_schedule(spec, stream.batches_per_epoch)
        if saved:
            _check_same_data(saved.checkpoint, schedule, plan)
        clock = StepClock(world.device)
        times = StepTimes()
        stopped = False

        def save(tensors_step: int) -> None:
            writer.start(
                tensors_step,
                capture_state(engine, average.own),
                _manifest_facts(tensors_step, schedule, plan, spec, skipped, metrics, engine, facts or {}),
            )

        while step < schedule.total_steps and not stopped:
            epoch, index = divmod(step, schedule.steps_per_epoch)
            learning_rate = schedule.learning_rate(step)

            seen: list[tuple[tuple[str, ...], torch.Tensor]] = []
            for part in range(plan.accumulation):
                with clock.measure("data"):
                    batch = next(batches)
                    assert (batch.epoch, batch.index) == (epoch, index), f"expected {epoch, index}, received {batch}"
                    images = batch.images.to(world.device, non_blocking=True)
                    targets = [target.to(world.device) for target in batch.targets]
                with clock.measure("forward"):
                    total, losses = engine.forward(images, targets)
                with clock.measure("backward"):
                    engine.backward(total, last=part == plan.accumulation - 1)
                with clock.measure("reduce"):
                    engine.reduce()
                seen.append((batch.keys, losses))

            with clock.measure("optimizer"):
                told = exchange(
                    world,
                    torch.stack([losses for _, losses in seen]).mean(0),
                    engine.squared_norm(),
                    stop=stop_requested(),
                    save_state=writer.state,
                    committed_step=writer.committed_step,
                    times=times,
                )
                applied = told.finite
                if applied:
                    engine.update(learning_rate)
                    average.update(step)
                else:
                    # fp16 gradients overflow now and then; loss scaling expects that, a loss that is not finite is not
                    expected = told.losses_finite and engine.scale.enabled
                    if not expected:
                        skipped += 1
                        reason = explain_non_finite(engine, world, step + 1, _remember(seen, engine.objective.names))
                        if spec.non_finite == "stop" or skipped > spec.max_skipped_steps:
                            raise NonFiniteError(reason)
                        on_event(Event("skipped", step + 1, reason, {"skipped_steps": skipped}))
                    engine.discard()
            step += 1

            with clock.measure("checkpoint"):
                writer.advance(told.save_states)
                writer.note(told.committed_step)
                for event in writer.news(step):
                    on_event(event)
                stopped = told.stop
                ends_epoch = step % schedule.steps_per_epoch == 0
                if validate and ends_epoch and _due(spec.validate_every_epochs, step, schedule):
                    metrics = _validate(validate, average, world, step // schedule.steps_per_epoch)
                    on_event(Event("validated", step, f"validated after step {step}", dict(metrics)))
                if step < schedule.total_steps and (
                    stopped
                    or (ends_epoch and _due(spec.checkpoint_every_epochs, step, schedule))
                    or (spec.checkpoint_every_steps and step % spec.checkpoint_every_steps == 0)
                ):
                    save(step)
            previous, times = told.times, clock.finish_step()
            observer(
                StepRecord(
                    step=step,
                    total_steps=schedule.total_steps,
                    epoch=epoch,
                    batch=index,
                    learning_rate=learning_rate,
                    losses=dict(zip(engine.objective.names, told.mean_losses, strict=True)),
                    gradient_norm=told.gradient_norm,
                    loss_scale=engine.scale.value,
                    applied=applied,
                    skipped_steps=skipped,
                    images=plan.global_batch,
                    images_per_s=plan.global_batch / times.total,
                    memory_bytes=_memory_bytes(world.device),
                    times=times,
                    previous=previous if step > 1 else (),
                )
            )

        if not stopped and writer.committed_step != step:
            save(step)
        writer.settle()
        if writer.committed_step != step:
            raise OSError(writer.failure or f"the checkpoint of step {step} was not written")
        for event in writer.news(step):
            on_event(event)
        weights = None if stopped else _export(average, world, run_dir, step, facts or {})
        return TrainResult(
            status="stopped" if stopped else "finished",
            step=step,
            epoch=step // schedule.steps_per_epoch,
            checkpoint=writer.committed,
            weights=weights,
            best=world.broadcast_object(best_checkpoint(run_dir) if world.is_main else None),
            metrics=dict(metrics),
        )


def _choose_checkpoint(run_dir: str, world: World, on_event: Callable[[Event], None]) -> Checkpoint | None:
    """Rank 0 looks, and all ranks take what it found."""
    found, rejected = world.broadcast_object(find_checkpoint(run_dir) if world.is_main else (None, []))
    for bad in rejected:
        on_event(Event("passed_over", bad.step, str(bad), {"checkpoint": bad.path, "faults": list(bad.faults)}))
    return found


def _cursor(manifest: Mapping[str, Any]) -> Cursor:
    from pipeline.data import Cursor

    return Cursor(manifest.get("epoch", 0), manifest.get("batch", 0))


def _check_same_data(checkpoint: Checkpoint, schedule: Schedule, plan: BatchPlan) -> None:
    """A cursor and a schedule mean something else with another data set or global batch."""
    for name, now in (("steps_per_epoch", schedule.steps_per_epoch), ("global_batch", plan.global_batch)):
        then = checkpoint.manifest[name]
        if then != now:
            raise UserError(
                f"the run's checkpoint {checkpoint.path} was written with {name} {then}, and now it is {now}; go on "
                "with the data and the global batch of before, or start a run of another name"
            )


def _manifest_facts(
    step: int,
    schedule: Schedule,
    plan: BatchPlan,
    spec: Training,
    skipped: int,
    metrics: Mapping[str, float],
    engine: Engine,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    epoch, batch = divmod(step, schedule.steps_per_epoch)
    return {
        "epoch": epoch,
        "batch": batch,
        "steps_per_epoch": schedule.steps_per_epoch,
        "global_batch": plan.global_batch,
        "world_size": plan.world_size,
        "zero_stage": spec.zero_stage,
        "precision": engine.precision,
        "loss_scale": [engine.scale.value, engine.scale.good_steps],
        "skipped_steps": skipped,
        "metrics": dict(metrics),
        "score": _score(metrics),
        "saved_at": time.time(),
        "facts": dict(facts),
    }


def _score(metrics: Mapping[str, float]) -> float | None:
    return metrics["AP"] if "AP" in metrics else next(iter(metrics.values()), None)


def _due(every_epochs: int | None, step: int, schedule: Schedule) -> bool:
    """At the end of an epoch: whether something that comes every so many epochs comes now."""
    return bool(every_epochs) and (step // schedule.steps_per_epoch) % every_epochs == 0


def _validate(
    validate: Callable[[nn.Module, int], Mapping[str, float]], average: AveragedWeights, world: World, epochs: int
) -> dict[str, float]:
    with average.applied() as detector:
        return world.broadcast_object(dict(validate(detector, epochs)))


def _remember(seen: Sequence[tuple[tuple[str, ...], torch.Tensor]], names: Sequence[str]) -> list[MicroBatch]:
    return [MicroBatch(keys, dict(zip(names, losses.tolist(), strict=True))) for keys, losses in seen]


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _export(average: AveragedWeights, world: World, run_dir: str, step: int, facts: Mapping[str, Any]) -> str:
    """Write weights.safetensors: the average where one is kept, buffers averaged over the ranks. Collective."""
    path = storage.join(run_dir, WEIGHTS)
    with average.applied() as detector:
        if world.is_main:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in detector.state_dict().items()}
            metadata = {"step": str(step), "ema": str(average.decay is not None).lower()}
            metadata |= {name: json.dumps(value) for name, value in facts.items()}
            storage.write_bytes(path, safetensors.torch.save(tensors, metadata))
    world.barrier()
    return path
