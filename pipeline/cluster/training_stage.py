"""The train stage: Ray Train runs `train_worker`, restarts it after failures, and resizes it.

This file adds four things:
- a stop that saves;
- errors that end the job without a restart;
- a limit on every wait;
- a new fit after a save for a preempted node, or after a new checkpoint, which resets the count of failures.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from ray.exceptions import OutOfMemoryError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from refinedet.pipeline.cluster.capacity import missing_capacity
from refinedet.pipeline.cluster.mailbox import Mailbox, MailboxLink
from refinedet.pipeline.cluster.session import session_nodes
from refinedet.pipeline.cluster.worker_task import Fatal, NodeSample, WorkerTask
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import Cluster
from refinedet.pipeline.runs import settings, storage
from refinedet.pipeline.runs.errors import JobError, StoppedError, UserError
from refinedet.pipeline.training.records import Event, StepRecord, TrainResult
from refinedet.pipeline.training.worker_checks import PreflightReport

NODE_LABEL = "ray.io/node-id"
_POLL_S = 0.3
_PATIENCE_S = 30.0
"""after this long without workers the user gets a warning"""
OnMessage = Callable[[StepRecord | Event | NodeSample], None]


def run_training(run: Run, mailbox: Mailbox, on_message: OnMessage, stop: threading.Event) -> TrainResult:
    """Train in Ray workers to the end.

    on_message  called in this thread with every message of the workers and every change in their number
    stop        once it is set, the workers save and end
    Raises StoppedError after a stop, UserError for a mistake in the spec, JobError where `cluster.max_failures`
    restarts did not bring a new checkpoint or no workers started within `cluster.resource_timeout_s`.
    """
    return _Training(run, mailbox, on_message, stop).train()


def run_preflight(run: Run, mailbox: Mailbox, on_message: OnMessage, stop: threading.Event) -> PreflightReport:
    """Place the workers of a job, check them, and end. Raises as `run_training` does."""
    return _Training(run, mailbox, on_message, stop, preflight_only=True).train()


class _Training:
    """Fits of a TorchTrainer, repeated until one finishes."""

    def __init__(
        self, run: Run, mailbox: Mailbox, on_message: OnMessage, stop: threading.Event, preflight_only: bool = False
    ) -> None:
        self.run, self.cluster, self.mailbox = run, run.spec.cluster, mailbox
        self.on_message, self.stop, self.preflight_only = on_message, stop, preflight_only
        self.began_at = time.time()
        self.step = self.saved = 0
        self.leaving: set[str] = set()
        """ids of nodes that will be preempted"""
        self.ranks: set[int] = set()
        """that have started since the last failure"""
        self.waiting_since = time.monotonic()
        self.warned_waiting = False
        self.stop_deadline: float | None = None

    def train(self) -> Any:
        """Fit until training has finished; return what rank 0 returned."""
        while True:
            saved, outcome = self.saved, self._fit()
            if isinstance(outcome, TrainingFailedError | RayError):  # of workers, or of Ray Train's own actors
                if self.saved == saved or self.preflight_only:
                    raise JobError(f"training failed: {explain(outcome)}") from outcome
                self._report("restarted", f"saved since the last failures, which count no more: {explain(outcome)}")
            elif isinstance(outcome, BaseException):
                raise outcome
            elif getattr(outcome, "status", None) != "stopped":
                return outcome
            elif self.stop.is_set():
                raise StoppedError(f"saved at step {outcome.step}; run the same command again to resume")
            # Saved because a node will be preempted: fit again, on the others.

    def _fit(self) -> Any:
        """Run one fit; returns the result of rank 0, or the error."""
        self._forget_workers()
        outcome: list[Any] = []
        trainer = self._trainer()

        def fit() -> None:
            try:
                outcome.append(trainer.fit().return_value)
            except BaseException as error:  # raised in the driver's thread
                outcome.append(error)

        # Not in the main thread: there, Ray Train takes over SIGINT, and aborts instead of letting workers save.
        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            self._take_messages()
            self._check_stop()
            self._check_placement()
        self._take_messages()
        return outcome[0]

    def _take_messages(self) -> None:
        for rank, message in self.mailbox.take(stop=self.stop.is_set()):
            if not isinstance(message, StepRecord | Event | NodeSample | Fatal):
                continue  # late, of the stage before, which shares the mailbox
            if isinstance(message, Fatal):
                raise UserError(message.message) if message.by_user else JobError(message.message)
            if isinstance(message, Event):
                message = self._note(rank, message)
            elif isinstance(message, StepRecord):
                self.step = message.step
            self.on_message(message)

    def _note(self, rank: int, event: Event) -> Event:
        """Update the state of the workers from an event; returns it with the current step."""
        if event.kind == "started":
            if rank in self.ranks:  # without a failure before: Ray Train changes the number of workers
                self._forget_workers()
                self._report("resized", f"the number of workers changes, from the checkpoint of step {self.saved}")
            self.ranks.add(rank)
        elif event.kind == "saved":
            self.saved = max(self.saved, event.facts.get("step", event.step))
        elif event.kind == "preempted":
            self.leaving |= set(event.facts["nodes"])
        elif event.kind == "restarted":
            self._forget_workers()
        if event.kind in ("preempted", "restarted"):
            return dataclasses.replace(event, step=self.step)
        if event.kind == "resumed" and self.step > event.step:
            again = self.step - event.step
            return dataclasses.replace(event, message=f"{event.message}; steps to be done again: {again}")
        return event

    def _forget_workers(self) -> None:
        self.ranks.clear()
        self.waiting_since, self.warned_waiting = time.monotonic(), False

    def _check_stop(self) -> None:
        """Raise StoppedError where a stop found no workers, or they did not save within `cluster.stop_grace_s`."""
        if not self.stop.is_set():
            return
        self.stop_deadline = self.stop_deadline or time.monotonic() + self.cluster.stop_grace_s
        if not self.ranks:
            raise StoppedError("before the workers were placed; run the same command again to resume")
        if time.monotonic() > self.stop_deadline:
            raise StoppedError(
                f"the workers did not save within {self.cluster.stop_grace_s:g} s; the next start resumes from the "
                "checkpoint before"
            )

    def _check_placement(self) -> None:
        """Raise JobError where no workers started within `cluster.resource_timeout_s`; report a long wait once."""
        if self.ranks:
            return
        now, limit = time.monotonic(), self.cluster.resource_timeout_s
        missing = missing_capacity(self.cluster, session_nodes())
        if not self.warned_waiting and (missing or now - self.waiting_since > _PATIENCE_S):
            self.warned_waiting = True
            why = missing or "they are still starting, or other jobs hold the resources"
            self._report("waiting", f"waiting up to {limit:g} s for {self.cluster.min_workers} workers: {why}")
        if now - self.waiting_since > limit:
            raise JobError(
                f"no place for {self.cluster.min_workers} workers came within {limit:g} s "
                f"({missing or 'other jobs hold them'}); add nodes, then run the same command again"
            )

    def _report(self, kind: Any, message: str) -> None:
        self.on_message(Event(kind, self.step, message))

    def _trainer(self) -> TorchTrainer:
        cluster, local = self.cluster, storage.is_local(self.run.path)
        task = WorkerTask(
            spec=self.run.spec_for_workers(),
            mailbox=self.mailbox.actor,
            fault=settings.read(settings.FAULT_VARIABLE) or "",
            preflight_only=self.preflight_only,
            estimate_memory=self.preflight_only or bool(cluster.gpus_per_worker),
            began_at=self.began_at,
            first=not self.saved,
        )
        return TorchTrainer(
            train_worker,
            train_loop_config={"task": task},
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if cluster.gpus_per_worker else "gloo"),
            scaling_config=scaling_config(cluster, self.leaving),
            run_config=RunConfig(
                name="ray-train",
                storage_path=self.run.file("logs") if local else None,
                failure_config=FailureConfig(max_failures=cluster.max_failures, max_preemption_failures=-1),
                callbacks=[_RestartReports(self.mailbox.actor, cluster.max_failures)],
            ),
        )


def scaling_config(cluster: Cluster, leaving: set[str] = frozenset()) -> ScalingConfig:  # type: ignore[assignment]
    """Ray Train's view of the workers; `leaving`: ids of nodes that must not get one."""
    resources: dict[str, float] = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    labels = {**cluster.labels, **({NODE_LABEL: f"!in({','.join(sorted(leaving))})"} if leaving else {})}
    sizes = (cluster.min_workers, cluster.max_workers)
    return ScalingConfig(
        num_workers=sizes if sizes[0] < sizes[1] else sizes[1],
        elastic_resize_monitor_interval_s=cluster.resize_interval_s,
        use_gpu=bool(cluster.gpus_per_worker),
        resources_per_worker=resources,
        placement_strategy=cluster.placement,
        label_selector=labels or None,
    )


def train_worker(config: dict[str, WorkerTask]) -> TrainResult | PreflightReport:
    """The function that Ray Train calls in every worker; `config["task"]` is its task."""
    # Imported here: Ray Train's controller and the driver load this file too, and need neither timm nor DeepSpeed.
    from refinedet.pipeline.cluster.train_worker import run_worker

    return run_worker(config["task"])


class _RestartReports(UserCallback):
    """Report to the driver why workers restart. Ray Train restarts them, by `FailureConfig`, and calls this first."""

    def __init__(self, mailbox: Any, allowed: int) -> None:
        self._mailbox, self._allowed, self._failures = mailbox, allowed, 0

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        errors = list(worker_exceptions.values())
        reason = explain(errors[0])
        if any(getattr(error, "preempted", False) for error in errors):
            message = f"restart after the loss of a node, which is no failure: {reason}"
        else:
            self._failures += 1
            message = f"restart {self._failures} of {self._allowed} allowed, after: {reason}"
        if self._failures <= self._allowed:
            MailboxLink(self._mailbox, -1).push(Event("restarted", 0, message))


def explain(error: BaseException) -> str:
    """The innermost error of a failed fit, in one line."""
    inner = error
    while True:
        failures = getattr(inner, "worker_failures", None)
        following = (
            next(iter(failures.values()), None) if failures else (inner.__cause__ or getattr(inner, "cause", None))
        )
        if following is None:
            break
        inner = following
    lines = [line for line in str(inner).strip().splitlines() if line.strip()]
    if isinstance(inner, OutOfMemoryError) and lines:  # Ray adds pages, and ends with advice on its own settings
        return f"{lines[0].strip()}. All programs on the node count; fewer workers or loader processes need less"
    return lines[-1].strip() if lines else type(inner).__name__
