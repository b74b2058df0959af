"""The training loop, once, from top to bottom. It runs under Ray Train, under torchrun, and alone."""

from __future__ import annotations

import json
import os
import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from refinedet.pipeline.config.batches import BatchPlan, plan_batches
from refinedet.pipeline.config.schedule import Schedule, make_schedule
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.checkpoint import CheckpointWriter, best_checkpoint
from refinedet.pipeline.training.clock import StepClock
from refinedet.pipeline.training.ema import AveragedWeights
from refinedet.pipeline.training.engine import Engine
from refinedet.pipeline.training.exchange import exchange
from refinedet.pipeline.training.finite import MicroBatch, NonFiniteError, explain_non_finite
from refinedet.pipeline.training.goodput import Ledger
from refinedet.pipeline.training.records import Event, StepRecord, StepTimes, TrainResult
from refinedet.pipeline.training.resume import check_same_data, choose_checkpoint, manifest_facts, start_cursor
from refinedet.pipeline.training.state import StateReader, capture_state, seed_everything
from refinedet.pipeline.training.stragglers import StragglerWatch
from refinedet.pipeline.training.watchdog import StallVerdict, Watchdog, exit_process
from refinedet.pipeline.training.world import World
from torch import nn

if TYPE_CHECKING:
    from refinedet.pipeline.data.samples import Batch, Cursor
    from refinedet.pipeline.data.stream import TrainingStream

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
    on_stall: Callable[[StallVerdict], None] = exit_process,
    facts: Mapping[str, Any] | None = None,
    began_at: float | None = None,
) -> TrainResult:
    """Train `detector` from the newest good checkpoint under `run_dir`, or from its own weights, to the end.

    Every rank calls it with the same arguments, and its own world, stream and callbacks.

    detector        on the CPU, initialised alike on every rank (rank 0's weights win)
    loss            (predictions, targets) -> Losses, as `model.detection_loss` with its config bound
    make_stream     (where to start, how batches divide) -> this rank's micro-batches
    run_dir         folder or URI; checkpoints/, goodput/, stalls/ and weights.safetensors come to lie in it
    observer        called on every rank after every step
    on_event        called on every rank: resumed, saved, passed over, skipped, validated, ...
    validate        (detector in eval mode, epochs done) -> metrics, on every rank; rank 0's count, `AP` the score
    stop_requested  asked every step; True on any rank saves and ends training on all
    on_stall        called from a thread, on every rank that can, when a step takes longer than `stall_timeout_s`
    facts           JSON values that go into every manifest and into the weights: the spec, the shards' digest
    began_at        when the job began to ask for workers, in seconds since the epoch; goodput counts from there

    Raises, on all ranks alike: NonFiniteError; what the stream raised on one of them; OSError where the last
    checkpoint could not be written.
    """
    plan = plan_batches(spec, world.size)
    _configure_torch(spec.deterministic)
    seed_everything(seed, world.rank)
    checkpoint = choose_checkpoint(run_dir, world, on_event)
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
        step, skipped, metrics, validated = 0, 0, {}, -1
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

        stream = stack.enter_context(closing(make_stream(start_cursor(checkpoint), plan)))
        schedule = make_schedule(spec, stream.batches_per_epoch)
        if saved:
            check_same_data(saved.checkpoint, schedule, plan, (facts or {}).get("shards"))

        clock = StepClock(world.device)
        stragglers = StragglerWatch(spec.zero_stage)
        ledger = Ledger(run_dir, step, world.is_main, began_at)
        stack.callback(ledger.close)
        watchdog = Watchdog(run_dir, world, clock, spec.stall_timeout_s, on_stall)
        stack.callback(watchdog.close)

        def save() -> None:
            facts_now = manifest_facts(step, schedule, plan, engine, skipped, metrics, facts or {}, validated == step)
            writer.start(step, capture_state(engine, average.own), facts_now)

        batches, batch = iter(stream), None
        times, first_step, stopped = StepTimes(), step, False
        ledger.begin()
        while step < schedule.total_steps and not stopped:
            epoch, index = divmod(step, schedule.steps_per_epoch)
            learning_rate = schedule.learning_rate(step)

            seen: list[tuple[tuple[str, ...], torch.Tensor]] = []
            fault: Exception | None = None
            if spec.non_finite == "skip":
                engine.remember()
            for part in range(plan.accumulation):
                with clock.measure("data"):
                    batch, fault = _next_batch(batches, batch, (epoch, index), fault)
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
                    failed=fault is not None,
                    save_state=writer.state,
                    committed_step=writer.committed_step,
                    times=times,
                )
                if told.failed:
                    writer.settle()
                    _raise_together(world, fault, step + 1)
                if told.finite:
                    engine.update(learning_rate)
                    average.update(step)
                else:
                    if not (engine.scale.enabled and told.losses_finite):  # fp16 gradients overflow now and then
                        skipped += 1
                        reason = explain_non_finite(engine, world, step + 1, _remember(seen, engine.objective.names))
                        if spec.non_finite == "stop" or skipped > spec.max_skipped_steps:
                            writer.settle()
                            raise NonFiniteError(reason)
                        on_event(Event("skipped", step + 1, reason, {"skipped_steps": skipped}))
                    engine.discard()
                    if engine.scale.exhausted:
                        writer.settle()
                        raise NonFiniteError(
                            f"step {step + 1}: fp16 training has diverged: gradients overflow at any loss scale; lower "
                            "training.learning_rate, or use training.precision=bf16"
                        )
            step += 1
            watchdog.finished(step)

            stopped = told.stop
            ends_epoch = step % schedule.steps_per_epoch == 0
            if validate and ends_epoch and _due(spec.validate_every_epochs, step, schedule):
                with clock.measure("validation"), average.applied() as averaged:
                    watchdog.pause()
                    metrics = world.broadcast_object(dict(validate(averaged, step // schedule.steps_per_epoch)))
                    validated = step
                    watchdog.finished(step)
                on_event(Event("validated", step, f"validated after step {step}", dict(metrics)))
            with clock.measure("checkpoint"):
                writer.advance(told.save_states, told.committed_step)
                due = (
                    stopped
                    or step == schedule.total_steps
                    or (ends_epoch and _due(spec.checkpoint_every_epochs, step, schedule))
                    or (spec.checkpoint_every_steps and step % spec.checkpoint_every_steps == 0)
                )
                if due:
                    save()
            for event in writer.news(step):
                on_event(event)

            times = clock.finish_step()
            ledger.add(step, times, saved=bool(due))
            previous = told.times if step > first_step + 1 else ()
            for straggler in stragglers.add(previous) if previous else ():
                on_event(Event("straggler", step, f"{straggler}, on {watchdog.hosts[straggler.rank]}", vars(straggler)))
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
                    applied=told.finite,
                    skipped_steps=skipped,
                    images=plan.global_batch,
                    images_per_s=plan.global_batch / (times.total - times.validation),
                    memory_bytes=_memory_bytes(world.device),
                    times=times,
                    previous=previous,
                )
            )

        watchdog.pause()
        writer.settle()
        if writer.committed_step != step:
            raise OSError(writer.failure or f"the checkpoint of step {step} was not written")
        for event in writer.news(step):
            on_event(event)
        weights = None if stopped else _export(average, world, run_dir, step, facts or {})
        ledger.ended = "stopped" if stopped else "finished"
        return TrainResult(
            status="stopped" if stopped else "finished",
            step=step,
            epoch=step // schedule.steps_per_epoch,
            checkpoint=writer.committed,
            weights=weights,
            best=world.broadcast_object(best_checkpoint(run_dir) if world.is_main else None),
            metrics=dict(metrics),
        )


def _configure_torch(deterministic: bool) -> None:
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    torch.backends.cudnn.benchmark = not deterministic  # images are all of one size


def _next_batch(
    batches: Iterator[Batch], last: Batch | None, expected: tuple[int, int], fault: Exception | None
) -> tuple[Batch, Exception | None]:
    """The next micro-batch, and the first fault of this step.

    A rank whose stream fails goes through the step with the batch before, so that all ranks learn of it and stop
    together; without one there is nothing but to fail alone.
    """
    if fault is None or last is None:
        try:
            batch = next(batches)
            assert (batch.epoch, batch.index) == expected, f"expected {expected}, received {batch.epoch, batch.index}"
            return batch, None
        except Exception as error:
            if last is None:
                raise
            fault = error
    return last, fault


def _raise_together(world: World, fault: Exception | None, step: int) -> None:
    """All ranks raise the same: a user's mistake as such, anything else as what happened on which rank."""
    kinds = world.all_gather_object(None if fault is None else (isinstance(fault, UserError), repr(fault), str(fault)))
    said = [(rank, *kind) for rank, kind in enumerate(kinds) if kind]
    if all(user for _, user, _, _ in said):
        raise UserError("; ".join(dict.fromkeys(text for *_, text in said))) from fault
    raise RuntimeError(
        f"step {step}: no batch on " + "; ".join(f"rank {rank}: {name}" for rank, _, name, _ in said)
    ) from fault


def _due(every_epochs: int | None, step: int, schedule: Schedule) -> bool:
    """At the end of an epoch: whether something that comes every so many epochs comes now."""
    return bool(every_epochs) and (step // schedule.steps_per_epoch) % every_epochs == 0


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
