"""Upkeep around the steps of training: agreement of the ranks, faults, validation, saving, records."""

from __future__ import annotations

import gc
import resource
from contextlib import ExitStack

import torch
from refinedet.pipeline.inference.devices import peak_flops
from refinedet.pipeline.training.checkpoint import Checkpoint, best_checkpoint
from refinedet.pipeline.training.clock import StepClock
from refinedet.pipeline.training.exchange import Agreed, agree
from refinedet.pipeline.training.finite import NonFiniteError, explain_non_finite
from refinedet.pipeline.training.goodput import Ledger
from refinedet.pipeline.training.profile import StepProfiler
from refinedet.pipeline.training.records import Event, StepRecord, TrainResult
from refinedet.pipeline.training.resume import manifest_facts
from refinedet.pipeline.training.saving import CheckpointWriter, SaveError, write_final_weights
from refinedet.pipeline.training.state import capture_state
from refinedet.pipeline.training.step import StepOutcome, TrainState
from refinedet.pipeline.training.stragglers import StragglerWatch
from refinedet.pipeline.training.task import Callbacks, Task
from refinedet.pipeline.training.watchdog import Watchdog
from refinedet.pipeline.training.world import World

_COLLECT_EVERY = 500
"""Steps between two runs of Python's garbage collector, which is kept out of the others."""


class Upkeep:
    """Calls once per step, in this order: `agree`, `check`, `validate_if_due`, `save_if_due`, `record`. Collective."""

    def __init__(
        self, state: TrainState, world: World, task: Task, callbacks: Callbacks, checkpoint: Checkpoint | None
    ) -> None:
        self.state, self.world, self.task, self.callbacks = state, world, task, callbacks
        self.spec = state.engine.spec
        self.clock = StepClock(world.device)
        state.engine.objective.measure_waits(lambda: self.clock.measure("reduce"))
        self._stack = ExitStack()
        self._writer = CheckpointWriter(task.run_dir, world, self.spec)
        self._stack.callback(self._writer.close)
        self._ledger = Ledger(task.run_dir, state.step, world.is_main, task.began_at)
        self._stack.callback(self._ledger.close)
        self._watchdog = Watchdog(task.run_dir, world, self.clock, self.spec.stall_timeout_s, callbacks.on_stall)
        self._stack.callback(self._watchdog.close)
        self._profiler = StepProfiler(self.spec.profile_steps, task.run_dir, world)
        self._stack.callback(self._profiler.close)
        self._stragglers = StragglerWatch(world)
        self._peak_flops = peak_flops(world.device)
        self._saved = False
        """a save was begun in this step"""
        if checkpoint:
            self._writer.resume(checkpoint)
            facts = {"checkpoint": checkpoint.path}
            callbacks.on_event(Event("resumed", state.step, f"resumed from step {state.step}", facts))
        gc.collect()
        gc.freeze()
        gc.disable()
        self._stack.callback(gc.enable)
        self._ledger.begin()

    def agree(self, outcome: StepOutcome) -> Agreed:
        with self.clock.measure("optimizer"):
            return agree(
                self.world,
                outcome.values,
                stop=self.callbacks.stop_requested(),
                failed=self.state.feed.fault is not None,
                saving=self._writer.state,
                given_up=self._writer.given_up,
                committed_step=self._writer.committed_step,
                order=self.state.engine.gradients.order,
            )

    def check(self, outcome: StepOutcome, agreed: Agreed) -> None:
        """Raise for a failed stream or gradients in another order; count a step that was skipped, or raise for it."""
        state, engine, step = self.state, self.state.engine, self.state.step + 1
        if agreed.failed:
            self._writer.settle()
            state.feed.raise_together(self.world, step)
        if not agreed.same_order:
            self._writer.settle()
            raise RuntimeError(
                f"step {step}: gradients became ready in another order on one rank than on another, so they were added "
                "up wrongly; every rank's graph must hold every parameter, in the same order"
            )
        if outcome.applied:
            return
        fault = None
        if not (engine.scale.enabled and agreed.finite):  # scaled gradients overflow now and then
            fault = explain_non_finite(engine, self.world, step, outcome.micro_batches)
            state.skipped += 1
            if self.spec.non_finite == "skip" and state.skipped <= self.spec.max_skipped_steps:
                self.callbacks.on_event(Event("skipped", step, fault, {"skipped_steps": state.skipped}))
                fault = None
        elif engine.scale.exhausted:
            fault = (
                f"step {step}: fp16 training has diverged: gradients overflow at any loss scale; lower "
                "training.learning_rate, or use training.precision=bf16"
            )
        if fault:
            self._writer.settle()
            raise NonFiniteError(fault)

    def validate_if_due(self) -> None:
        validate, state = self.callbacks.validate, self.state
        if not validate or not self._ends_epochs(self.spec.validate_every_epochs):
            return
        with self.clock.measure("validation"), state.average.applied() as averaged:
            self._watchdog.allow(self.callbacks.validation_timeout_s)
            epochs_done = state.step // state.schedule.steps_per_epoch
            measured = dict(validate(averaged, epochs_done))
            state.metrics = self.world.broadcast_object(measured)
            state.validated_step = state.step
            self._watchdog.finished(state.step)
        event = Event(
            "validated", state.step, f"validated after step {state.step}", {**state.metrics, "epoch": epochs_done}
        )
        self.callbacks.on_event(event)

    def save_if_due(self, agreed: Agreed) -> None:
        """Continue the save that is being written, and begin one where it is due."""
        step, every = self.state.step, self.spec.checkpoint_every_steps
        with self.clock.measure("checkpoint"):
            self._writer.advance(agreed.saving, agreed.committed_step)
            self._saved = (
                agreed.stop
                or step == self.state.schedule.total_steps
                or self._ends_epochs(self.spec.checkpoint_every_epochs)
                or (every is not None and step % every == 0)
            )
            if self._saved:
                self._save()
            if agreed.given_up:
                self._wait_until_saved()
        self._tell_news()

    def record(self, outcome: StepOutcome, agreed: Agreed) -> None:
        """Close the step: its times, its record, and who is slow."""
        state, engine = self.state, self.state.engine
        self._watchdog.finished(state.step)
        self._profiler.finish_step(state.step)
        if state.step % _COLLECT_EVERY == 0:
            gc.collect()
        times = self.clock.finish_step()
        self._ledger.add(state.step, times, saved=self._saved)
        for slow in self._stragglers.add(times):
            where = f"{slow}, on {self._watchdog.hosts[slow.rank]}"
            self.callbacks.on_event(Event("straggler", state.step, where, vars(slow)))
        if not self.world.is_main:
            return
        epoch, index = divmod(state.step - 1, state.schedule.steps_per_epoch)
        parts = len(engine.names)
        images_per_s = engine.plan.global_batch / (times.total - times.validation)
        self.callbacks.on_step(
            StepRecord(
                step=state.step,
                total_steps=state.schedule.total_steps,
                epoch=epoch,
                batch=index,
                learning_rate=outcome.learning_rate,
                losses=dict(zip(engine.names, agreed.values[:parts], strict=True)),
                shares=dict(zip(engine.share_names, agreed.values[parts:], strict=True)),
                gradient_norm=engine.gradient_norm,
                loss_scale=engine.scale.value,
                applied=outcome.applied,
                skipped_steps=state.skipped,
                images=engine.plan.global_batch,
                images_per_s=images_per_s,
                memory_bytes=_memory_bytes(self.world.device),
                times=times,
                **self._rate(images_per_s),
            )
        )

    def _rate(self, images_per_s: float) -> dict[str, float]:
        """TFLOP/s of the model and their share of the devices' peak, as far as either is known."""
        if self.task.gflops_an_image is None:
            return {}
        flops, peak = images_per_s * self.task.gflops_an_image * 1e9, self._peak_flops
        return {"model_tflops": flops / 1e12} | ({"mfu": flops / (peak * self.world.size)} if peak else {})

    def finish(self, stopped: bool) -> TrainResult:
        """Wait for the last save, and write the weights; they are written somewhere also where it fails."""
        state, world, writer = self.state, self.world, self._writer
        self._watchdog.pause()
        writer.settle()
        if writer.committed_step != state.step:
            self._wait_until_saved()
        self._tell_news()
        weights = None
        if not stopped or writer.committed_step != state.step:
            weights = write_final_weights(state.average, world, self.task.run_dir, state.step, self.task.facts)
        if writer.committed_step != state.step:
            raise SaveError(f"{writer.failure}; the weights of step {state.step} are in {weights}")
        status = "stopped" if stopped else "finished"
        self._ledger.ended = status
        return TrainResult(
            status=status,
            step=state.step,
            epoch=state.step // state.schedule.steps_per_epoch,
            checkpoint=writer.committed,
            weights=weights,
            best=world.broadcast_object(best_checkpoint(self.task.run_dir) if world.is_main else None),
            metrics=dict(state.metrics),
        )

    def close(self) -> None:
        self._stack.close()

    def _save(self) -> None:
        tensors = capture_state(self.state.engine, self.state.average)
        self._writer.start(self.state.step, tensors, manifest_facts(self.state, self.task.facts))

    def _wait_until_saved(self) -> None:
        """Hold training until a save succeeds; end it, with the weights somewhere, where none does."""
        self._watchdog.pause()
        self._writer.settle()
        self._tell_news()
        if self._writer.failure:
            self._writer.wait_until_saved(self._save, self.callbacks.on_event, self.callbacks.stop_requested)
        if self._writer.failure:
            step = self.state.step
            weights = write_final_weights(self.state.average, self.world, self.task.run_dir, step, self.task.facts)
            raise SaveError(f"{self._writer.failure}; the weights of step {step} are in {weights}")
        self._watchdog.finished(self.state.step)

    def _tell_news(self) -> None:
        for event in self._writer.news(self.state.step):
            self.callbacks.on_event(event)

    def _ends_epochs(self, every: int | None) -> bool:
        """Return whether the step was the last of an epoch whose number is a multiple of an interval."""
        epochs, rest = divmod(self.state.step, self.state.schedule.steps_per_epoch)
        return every is not None and rest == 0 and epochs % every == 0


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
