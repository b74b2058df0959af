"""The train stage: Ray Train holds the workers, the loop in `pipeline.training` does the rest."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import storage
from pipeline.cluster.logs import log_folder, log_to_file, restore_loggers
from pipeline.cluster.monitor import Monitor, MonitorClient
from pipeline.cluster.run import Run
from pipeline.cluster.session import maximum_workers, minimum_workers
from pipeline.errors import JobError, StoppedError, UserError
from pipeline.spec import Cluster, Workers
from pipeline.spec_files import parse_spec

logger = logging.getLogger(__name__)

_POLL_S = 0.3


def run_training(
    run: Run,
    *,
    on_message: Callable[[int, str, Any], None],
    stop_requested: threading.Event,
) -> dict[str, Any]:
    """Train in Ray workers until the end; returns the loop's result.

    on_message      called here, in the driver, with (rank, "step" | "event", content) as workers send them
    stop_requested  set it, and the workers save and end
    Raises StoppedError after a stop, UserError for a mistake in the spec, JobError once the failures allowed
    by `cluster.max_failures` are used up.
    """
    monitor = Monitor(run.path)
    outcome: dict[str, Any] = {}
    fatal: list[str] = []
    trainer = _trainer(run, monitor.name)

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
        raise UserError(fatal[0])
    if "error" in outcome:
        raise JobError(_explain(outcome["error"])) from outcome["error"]
    result = outcome["result"]
    if result["status"] == "stopped":
        raise StoppedError(f"saved at step {result['step']}; the same command goes on from there")
    return result


def _deliver(monitor: Monitor, on_message: Callable[[int, str, Any], None], fatal: list[str]) -> None:
    for rank, kind, content in monitor.drain():
        if kind == "fatal":
            fatal.append(content)
        else:
            on_message(rank, kind, content)


def _trainer(run: Run, monitor_name: str) -> TorchTrainer:
    cluster = run.spec.cluster
    return TorchTrainer(
        _train_worker,
        train_loop_config={"spec": run.spec.model_dump(mode="json"), "monitor": monitor_name, "cwd": os.getcwd()},
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
    spec = parse_spec(config["spec"], source="the job's spec")
    run = Run(spec)
    rank = ray.train.get_context().get_world_rank()
    log_to_file(os.path.join(log_folder(run.path), f"train-rank{rank}.log"), who=f"rank {rank}")
    monitor = MonitorClient(config["monitor"], rank)
    try:
        result = _train(run, monitor)
    except UserError as error:  # trying again would not mend it
        monitor.push("fatal", str(error), wait=True)
        return {"status": "failed"}
    return dataclasses.asdict(result)


def _train(run: Run, monitor: MonitorClient) -> Any:
    import torch

    from model import RefineDet, detection_loss
    from pipeline.data import TrainingStream, open_shards
    from pipeline.evaluation import GroundTruth, validate
    from pipeline.training import open_world, train

    restore_loggers()
    spec = run.spec
    shards = open_shards(storage.join(run.shards, "train"))
    on = spec.training.validate_on
    validation_shards = open_shards(storage.join(run.shards, on))
    torch.manual_seed(spec.seed)
    detector = RefineDet(spec.model)

    with open_world() as world:

        def make_stream(cursor, plan):
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
                start=cursor,
            )

        truth = GroundTruth.of(run.ground_truth(on))

        def measure(model: torch.nn.Module, epochs_done: int) -> dict[str, float]:
            metrics = validate(
                model,
                validation_shards,
                truth,
                rank=world.rank,
                world_size=world.size,
                all_gather=world.all_gather_object,
                evaluation=spec.evaluation,
            )
            return metrics.values

        return train(
            spec.training,
            seed=spec.seed,
            world=world,
            detector=detector,
            loss=functools.partial(detection_loss, config=spec.model),
            make_stream=make_stream,
            run_dir=run.path,
            observer=lambda record: monitor.push("step", dataclasses.asdict(record)) if world.is_main else None,
            on_event=lambda event: monitor.push("event", dataclasses.asdict(event)) if world.is_main else None,
            validate=measure if spec.training.validate_every_epochs else None,
            stop_requested=lambda: monitor.stop_requested,
            facts={"spec": spec.model_dump(mode="json"), "shards": shards.digest},
        )
