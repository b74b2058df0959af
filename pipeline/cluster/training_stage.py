"""The train stage: Ray Train holds the workers, the loop in `refinedet.pipeline.training` does the rest.

One attempt is one worker group. A failure, a node about to be taken away, or room for more workers ends it; the driver
then finds places for the next one, which goes on from the last checkpoint. Ray Train could retry by itself, but it
neither saves before it resizes, nor leaves out a node that hangs, nor minds what divides the global batch.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Literal

import ray.train
from refinedet.pipeline.cluster.lean_trainer import LeanTrainer
from refinedet.pipeline.cluster.monitor import Monitor
from refinedet.pipeline.cluster.placement import Placement, worker_resources
from refinedet.pipeline.cluster.train_worker import train_worker
from refinedet.pipeline.config.batches import possible_world_sizes
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.drills.faults import read_faults
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import JobError, StoppedError, UserError
from refinedet.pipeline.training.records import Event

_POLL_S = 0.3
Reason = Literal["stop", "preempted", "resized"]
"""why workers were asked to save and end"""


def run_training(
    run: Run,
    *,
    monitor: Monitor,
    on_message: Callable[[int, str, Any], None],
    stop_requested: threading.Event,
    preflight_only: bool = False,
) -> dict[str, Any]:
    """Train in Ray workers until the end; returns the loop's result.

    on_message      called here, in the driver, with (rank, "step" | "event", content) as workers send them; rank -1 is
                    the driver itself
    stop_requested  set it, and the workers save and end
    preflight_only  place the workers, check them, and end
    Raises StoppedError after a stop, UserError for a mistake in the spec, JobError once the failures allowed
    by `cluster.max_failures` are used up.
    """
    return _TrainingJob(run, monitor, on_message, stop_requested, preflight_only).run_attempts()


@dataclasses.dataclass
class _Attempt:
    """One worker group, and what the driver knows of it."""

    workers: int
    began: float = dataclasses.field(default_factory=time.monotonic)
    nodes: dict[int, str] = dataclasses.field(default_factory=dict)
    """node id of every rank that has started"""
    step: int = 0
    """the last one that was told of"""
    stalled: bool = False
    asked: Reason | None = None
    asked_at: float = 0.0
    looked_at: float = dataclasses.field(default_factory=time.monotonic)
    """when room for more workers was last looked for"""


class _TrainingJob:
    """Attempt after attempt, until one comes to the end."""

    def __init__(
        self,
        run: Run,
        monitor: Monitor,
        on_message: Callable[[int, str, Any], None],
        stop_requested: threading.Event,
        preflight_only: bool,
    ) -> None:
        self.run, self.spec, self.monitor = run, run.spec, monitor
        self.on_message = on_message
        self.stop_requested = stop_requested
        self.preflight_only = preflight_only
        cluster = run.spec.cluster
        self.sizes = possible_world_sizes(run.spec.training, cluster.min_workers, cluster.max_workers)
        self.placement = Placement(run.spec.cluster)
        self.fatal: list[tuple[bool, str]] = []
        self.attempts = self.failures = 0
        self.began_at = time.time()
        self.grew_in_vain: frozenset[str] = frozenset()
        """the nodes on which a job that had ended to grow found no more room than before"""

    def run_attempts(self) -> dict[str, Any]:
        attempt: _Attempt | None = None
        while True:
            workers = self._place()
            if attempt and attempt.asked == "resized" and workers <= attempt.workers:
                self.grew_in_vain = self.placement.nodes()
            attempt = _Attempt(workers)
            outcome = self._run(attempt)
            self.attempts += 1
            if self.fatal:
                by_user, message = self.fatal[0]
                raise UserError(message) if by_user else JobError(message)
            if "result" in outcome and outcome["result"]["status"] != "stopped":
                return outcome["result"]
            if attempt.asked == "stop":
                raise StoppedError(self._describe_stop(outcome))
            self._prepare_next(attempt, outcome)

    def _place(self) -> int:
        workers = self.placement.find(self.sizes, self._say_waiting, self.stop_requested.is_set)
        if workers is None:
            raise StoppedError("before the workers were placed; the same command goes on from the last checkpoint")
        return workers

    def _run(self, attempt: _Attempt) -> dict[str, Any]:
        """One attempt to its end: {"result"} or {"error"}."""
        self.monitor.set_stop(False)
        trainer = self._trainer(attempt.workers)
        outcome: dict[str, Any] = {}

        def fit() -> None:
            try:
                outcome["result"] = trainer.fit().return_value
            except BaseException as error:  # handed to the driver's thread
                outcome["error"] = error

        # Not in the main thread: there, Ray Train takes over SIGINT, and aborts instead of letting workers save.
        thread = threading.Thread(target=fit, name="ray-train", daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(_POLL_S)
            self._deliver(attempt)
            self._ask(attempt)
        self._deliver(attempt)
        return outcome

    def _ask(self, attempt: _Attempt) -> None:
        """Ask the workers to save and end, where there is a reason to."""
        reason: Reason | None = None
        if self.stop_requested.is_set():
            reason = "stop"
        elif attempt.asked is None and self.monitor.draining & set(attempt.nodes.values()):
            reason = "preempted"
        elif attempt.asked is None and self._can_grow(attempt):
            reason = "resized"
        if reason and attempt.asked in (None, "preempted", "resized") and reason != attempt.asked:
            self.monitor.set_stop(True)
            attempt.asked, attempt.asked_at = reason, time.monotonic()
        grace_s = self.spec.cluster.stop_grace_s
        if attempt.asked == "stop" and time.monotonic() - attempt.asked_at > grace_s:
            raise StoppedError(
                f"the workers did not save within {grace_s:g} s; the next start goes on from the checkpoint before"
            )

    def _can_grow(self, attempt: _Attempt) -> bool:
        """Now and then: whether there is room for a larger number of workers beside those that run."""
        larger = [size for size in self.sizes if size > attempt.workers]
        if not larger or not attempt.step or self.preflight_only:
            return False
        if time.monotonic() - attempt.looked_at < self.spec.cluster.resize_interval_s:
            return False
        attempt.looked_at = time.monotonic()
        if self.grew_in_vain and self.placement.nodes() == self.grew_in_vain:
            return False  # STRICT_PACK and STRICT_SPREAD may not take what is free beside those that run
        return any(self.placement.fits(size - attempt.workers, 0.5) for size in larger)

    def _prepare_next(self, attempt: _Attempt, outcome: dict[str, Any]) -> None:
        """Say why another attempt is needed; JobError where no more are allowed."""
        saved = outcome.get("result", {}).get("step")
        if attempt.asked == "preempted":  # also where the node went before all was saved
            what = f"saved at step {saved}" if saved else "the node went before all was saved"
            self._say("preempted", attempt.step, f"a node is taken away: {what}, going on elsewhere")
            return
        if attempt.asked == "resized" and saved:
            self._say("resized", saved, f"there is room for more than {attempt.workers} workers: saved at step {saved}")
            return
        self.failures += 1
        reason = _explain(outcome["error"]) if "error" in outcome else "the workers ended without being asked to"
        if self.failures > self.spec.cluster.max_failures:
            raise JobError(f"training failed: {reason}") from outcome.get("error")
        message = f"restart {self.failures} of {self.spec.cluster.max_failures} allowed, after: {reason}"
        self._say("restarted", attempt.step, message)

    def _describe_stop(self, outcome: dict[str, Any]) -> str:
        if "error" in outcome:
            return f"the workers failed before they had saved ({_explain(outcome['error'])}); the same command goes on"
        return f"saved at step {outcome['result']['step']}; the same command goes on from there"

    # --- what comes from the workers, and goes to the job's recorder

    def _deliver(self, attempt: _Attempt) -> None:
        for rank, kind, content in self.monitor.drain():
            if kind == "fatal":
                self.fatal.append(content)
            elif kind == "placed":
                attempt.nodes[rank] = content["node"]
                message = f"rank {rank} runs on {content['host']}, process {content['pid']}"
                self._say("started", 0, message, {"rank": rank, **content})
            elif kind == "event" and content["kind"] == "stalled":
                if not attempt.stalled:  # every rank that can says so
                    attempt.stalled = True
                    self.on_message(rank, kind, content)
                    self._leave_out(attempt, content)
            else:
                if kind == "step":
                    attempt.step = content["step"]
                self.on_message(rank, kind, content)

    def _leave_out(self, attempt: _Attempt, event: dict[str, Any]) -> None:
        """Keep the next attempt off the nodes that were named in a stall, where the others suffice."""
        named = {attempt.nodes[rank] for rank in event["facts"]["ranks"] if rank in attempt.nodes}
        if self.spec.cluster.leave_out_stalled and named and self.placement.nodes() - named:
            self.placement.left_out |= named
            hosts = ", ".join(sorted(set(event["facts"]["hosts"])))
            self._say("left_out", event["step"], f"{hosts} is left out of the restart, if the other nodes suffice")

    def _say_waiting(self) -> None:
        cluster = self.spec.cluster
        message = f"no place for {self.sizes[-1]} workers now; waiting up to {cluster.resource_timeout_s:g} s for nodes"
        self._say("waiting", 0, message)

    def _say(self, kind: Any, step: int, message: str, facts: dict[str, Any] | None = None) -> None:
        self.on_message(-1, "event", dataclasses.asdict(Event(kind, step, message, facts or {})))

    def _trainer(self, workers: int) -> LeanTrainer:
        cluster = self.spec.cluster
        return LeanTrainer(
            train_worker,
            train_loop_config={
                "spec": self.run.spec_for_workers(),
                "monitor": self.monitor.name,
                "faults": [dataclasses.asdict(fault) for fault in read_faults()],
                # Counting takes seconds: once a job, and on a CPU, whose memory is not a worker's own, when asked for.
                "estimate_memory": self.preflight_only or (bool(cluster.gpus_per_worker) and self.attempts == 0),
                "preflight_only": self.preflight_only,
                "began_at": self.began_at,
                "attempt": self.attempts,
            },
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=bool(cluster.gpus_per_worker),
                resources_per_worker=worker_resources(cluster),
                placement_strategy=cluster.placement,
                label_selector=self.placement.labels() or None,
            ),
            run_config=ray.train.RunConfig(
                name="ray-train",
                storage_path=None if not storage.is_local(self.run.path) else self.run.file("logs"),
                failure_config=ray.train.FailureConfig(max_failures=0, controller_failure_limit=0),
            ),
        )


def _explain(error: BaseException) -> str:
    """The workers' own error out of Ray Train's wrapping, in one line."""
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
    return lines[-1].strip() if lines else type(inner).__name__
