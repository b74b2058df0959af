"""The train stage: Ray Train holds the workers, the loop in `pipeline.training` does the rest."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import storage
from pipeline.cluster.faults import Fault, read_fault, with_fault
from pipeline.cluster.logs import log_folder, log_to_file, restore_loggers
from pipeline.cluster.monitor import Monitor, MonitorClient
from pipeline.cluster.run import Run
from pipeline.cluster.session import maximum_workers, minimum_workers
from pipeline.errors import JobError, StoppedError, UserError
from pipeline.spec import Cluster, Workers
from pipeline.spec_files import parse_spec

if TYPE_CHECKING:
    import torch

    from pipeline.training import World

logger = logging.getLogger(__name__)

_POLL_S = 0.3


def run_training(
    run: Run,
    *,
    on_message: Callable[[int, str, Any], None],
    stop_requested: threading.Event,
    preflight_only: bool = False,
) -> dict[str, Any]:
    """Train in Ray workers until the end; returns the loop's result.

    on_message      called here, in the driver, with (rank, "step" | "event", content) as workers send them
    stop_requested  set it, and the workers save and end
    preflight_only  place the workers, check them, and end
    Raises StoppedError after a stop, UserError for a mistake in the spec, JobError once the failures allowed
    by `cluster.max_failures` are used up.
    """
    monitor = Monitor(run.path)
    outcome: dict[str, Any] = {}
    fatal: list[tuple[bool, str]] = []
    trainer = _trainer(run, monitor.name, read_fault(), preflight_only)

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit().return_value
        except BaseException as error:  # handed to the driver's thread below
            outcome["error"] = error

    # Not in the main thread: there, Ray Train takes over SIGINT and aborts the workers instead of letting them save.
    thread = threading.Thread(target=fit, name="ray-train", daemon=True)
    thread.start()
    asked_at: float | None = None
    while thread.is_alive():
        thread.join(_POLL_S)
        _deliver(monitor, on_message, fatal)
        if stop_requested.is_set() and asked_at is None:
            monitor.request_stop()
            asked_at = time.monotonic()
        if asked_at is not None and time.monotonic() - asked_at > run.spec.cluster.stop_grace_s:
            raise StoppedError(
                f"the workers did not save within {run.spec.cluster.stop_grace_s:g} s; the next start goes on from the "
                "checkpoint before"
            )
    _deliver(monitor, on_message, fatal)
    monitor.close()
    if fatal:
        by_user, message = fatal[0]
        raise UserError(message) if by_user else JobError(message)
    if "error" in outcome:
        raise JobError(_explain(outcome["error"])) from outcome["error"]
    result = outcome["result"]
    if result["status"] == "stopped":
        raise StoppedError(f"saved at step {result['step']}; the same command goes on from there")
    return result


def _deliver(monitor: Monitor, on_message: Callable[[int, str, Any], None], fatal: list[tuple[bool, str]]) -> None:
    for rank, kind, content in monitor.drain():
        if kind == "fatal":
            fatal.append(content)
        else:
            on_message(rank, kind, content)


def _trainer(run: Run, monitor_name: str, fault: Fault | None, preflight_only: bool) -> TorchTrainer:
    cluster = run.spec.cluster
    return TorchTrainer(
        _train_worker,
        train_loop_config={
            "spec": run.spec.model_dump(mode="json"),
            "monitor": monitor_name,
            "fault": dataclasses.asdict(fault) if fault else None,
            "preflight_only": preflight_only,
        },
        scaling_config=_scaling_config(cluster),
        torch_config=TorchConfig(backend="nccl" if cluster.gpus_per_worker else "gloo"),
        run_config=ray.train.RunConfig(
            name="ray-train",
            storage_path=None if not storage.is_local(run.path) else run.file("logs"),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
        ),
    )


def _scaling_config(cluster: Cluster) -> ray.train.ScalingConfig:
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return ray.train.ScalingConfig(
        num_workers=(
            (minimum_workers(cluster), maximum_workers(cluster))
            if isinstance(cluster.workers, Workers)
            else cluster.workers
        ),
        use_gpu=bool(cluster.gpus_per_worker),
        resources_per_worker=resources,
        placement_strategy=cluster.placement,
        label_selector=cluster.labels or None,
    )


def _explain(error: BaseException) -> str:
    """The workers' own error out of Ray Train's wrapping."""
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
    return f"training failed: {lines[-1] if lines else type(inner).__name__}"


def _train_worker(config: dict[str, Any]) -> dict[str, Any]:
    """One Ray Train worker: build the detector and the stream, and hand them to the loop."""
    run = Run(parse_spec(config["spec"], source="the job's spec"))
    rank = ray.train.get_context().get_world_rank()
    log_to_file(os.path.join(log_folder(run.path), f"train-rank{rank}.log"), who=f"rank {rank}")
    monitor = MonitorClient(config["monitor"], rank)
    from pipeline.training import NonFiniteError

    try:
        return _train(run, monitor, Fault(**config["fault"]) if config["fault"] else None, config["preflight_only"])
    except (UserError, NonFiniteError) as error:  # trying again would not mend it
        monitor.push("fatal", (isinstance(error, UserError), str(error)), wait=True)
        return {"status": "failed"}


def _train(run: Run, monitor: MonitorClient, fault: Fault | None, preflight_only: bool) -> dict[str, Any]:
    import torch

    from model import RefineDet, detection_loss
    from pipeline.data import Cursor, TrainingStream, open_shards
    from pipeline.training import BatchPlan, Event, StallVerdict, exit_process, find_checkpoint, open_world, train
    from pipeline.training.initial_weights import load_initial_weights
    from pipeline.training.preflight import check_workers

    restore_loggers()
    spec = run.spec
    shards = open_shards(storage.join(run.shards, "train"))

    with open_world() as world:
        tell = monitor.push if world.is_main else lambda kind, content: None
        preflight = check_workers(world, run.path, shards, memory_bytes=_memory_estimate(run, world.size))
        tell("event", dataclasses.asdict(Event("preflight", 0, str(preflight), dataclasses.asdict(preflight))))
        if preflight_only:
            return {"status": "checked"}
        torch.manual_seed(spec.seed)
        detector = RefineDet(spec.model)
        first_attempt = find_checkpoint(run.path)[0] is None
        if spec.training.init_weights and first_attempt:
            load_initial_weights(detector, spec.training.init_weights)

        def make_stream(start: Cursor, plan: BatchPlan) -> TrainingStream:
            return TrainingStream(
                shards,
                input_size=spec.model.input_size,
                augmentation=spec.data.augmentation,
                seed=spec.seed,
                global_batch=plan.global_batch,
                micro_batch=plan.micro_batch,
                rank=world.rank,
                world_size=world.size,
                workers=spec.data.loader_workers,
                start=start,
                shuffle_window=spec.data.shuffle_window,
                canonical_streams=spec.data.canonical_streams,
                cache_dir=spec.data.cache_dir,
                cache_bytes=spec.data.cache_bytes,
                max_bad_samples=spec.data.max_bad_samples,
                include_difficult=spec.data.include_difficult,
            )

        def on_stall(verdict: StallVerdict) -> None:
            monitor.push(
                "event", {"kind": "stalled", "step": verdict.step, "message": str(verdict), "facts": {}}, wait=True
            )
            exit_process(verdict)

        result = train(
            spec.training,
            seed=spec.seed,
            world=world,
            detector=detector,
            loss=with_fault(functools.partial(detection_loss, config=spec.model), fault, world.rank, run.path),
            make_stream=make_stream,
            run_dir=run.path,
            observer=lambda record: tell("step", dataclasses.asdict(record)),
            on_event=lambda event: tell("event", dataclasses.asdict(event)),
            validate=_validation(run, world) if spec.training.validate_every_epochs else None,
            stop_requested=lambda: monitor.stop_requested,
            on_stall=on_stall,
            facts={"spec": spec.model_dump(mode="json"), "shards": shards.digest},
        )
        return dataclasses.asdict(result)


def _validation(run: Run, world: World) -> Callable[[torch.nn.Module, int], dict[str, float]]:
    from pipeline.data import open_shards
    from pipeline.evaluation import GroundTruth, validate

    part = run.spec.training.validate_on
    shards = open_shards(storage.join(run.shards, part))
    truth = GroundTruth.of(run.ground_truth(part))

    def measure(detector: torch.nn.Module, epochs_done: int) -> dict[str, float]:
        return validate(
            detector,  # type: ignore[arg-type] - the detector that was handed to `train`
            shards,
            truth,
            rank=world.rank,
            world_size=world.size,
            all_gather=world.all_gather_object,
            evaluation=run.spec.evaluation,
        ).values

    return measure


def _memory_estimate(run: Run, workers: int) -> float | None:
    """Bytes a worker needs on its device; None on a CPU, where memory is not its own."""
    spec = run.spec
    if not spec.cluster.gpus_per_worker:
        return None
    from model.cost import count_cost
    from pipeline.cluster.plan import DEVICES, estimate
    from pipeline.training import plan_batches

    batch = plan_batches(spec.training, workers)
    return estimate(spec.model, count_cost(spec.model), spec.training, batch, DEVICES["H100"]).memory_bytes
