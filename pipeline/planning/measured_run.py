"""The measured run of `refinedet plan --calibrate`: the job's own model and batches on this machine, on drawn images.

The run is a plain one of `python -m refinedet.pipeline.training`, so that what is measured is what trains: stream,
DeepSpeed, reduction between the workers, and detection with NMS in the validations.
"""

from __future__ import annotations

import datetime
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from refinedet.model.cost import count_cost
from refinedet.pipeline.config.batches import divide_batch
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.config.spec_files import dump_spec, parse_spec
from refinedet.pipeline.inference.devices import accelerator_key
from refinedet.pipeline.planning.calibration import Calibration, fingerprint
from refinedet.pipeline.planning.device_speeds import DEVICES
from refinedet.pipeline.planning.estimates import largest_training_model, training_gflops
from refinedet.pipeline.runs import settings
from refinedet.pipeline.runs.environment import processor
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.lines import read_lines

_WARM_UP = 5
_BLOCKS = 4
"""of the steps after the warm-up; the slowest and the fastest are the ends of the range"""
_EPOCHS = 2
_FEWEST_STEPS, _MOST_STEPS = 12, 120
_LIMIT_S = 240.0
"""of the steps, at the lower end of the assumed range; fewer are measured where they would take longer"""
_TIMEOUT_S = 3600
_DRAWN_CLASSES = 10


def device_here() -> tuple[str, str]:
    """This machine's key in DEVICES, and its hardware's name. Raises UserError for a GPU that is not in it."""
    if not torch.cuda.is_available():
        return "CPU", processor()
    name = torch.cuda.get_device_name(0)
    key = accelerator_key(torch.device("cuda", 0))
    if key is None:
        raise UserError(f"the plan has no device {name!r}; it has {', '.join(DEVICES)}.")
    return key, name


def calibrate(spec: JobSpec) -> Calibration:
    """Train some steps of a job's model on this machine. Raises UserError where it has not what the job takes."""
    check_spec(spec)
    device, hardware = device_here()
    if spec.cluster.gpus_per_worker and device == "CPU":
        raise UserError(
            f"{spec.name} trains on GPUs, and this machine has none: calibrate on a machine of the cluster, and plan "
            "elsewhere with its file (--calibration)."
        )
    with tempfile.TemporaryDirectory(prefix="refinedet-calibration-") as folder:
        workers, measured = _measured_spec(spec, device, folder)
        lines = _run(measured, workers, folder)
    return Calibration(
        device=device,
        hardware=hardware,
        model=f"RefineDet{spec.model.input_size}++ {spec.model.backbone}",
        fingerprint=fingerprint(spec),
        workers=workers,
        training=_training_rates(measured, workers, lines),
        detection=_detection_rates(measured, workers, lines),
        measured_at=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _measured_spec(spec: JobSpec, device: str, folder: str) -> tuple[int, JobSpec]:
    """The workers that fit here, and the job for them: drawn images, the same micro-batches, two short epochs."""
    cluster = spec.cluster
    if device == "CPU":
        room = int(len(os.sched_getaffinity(0)) // cluster.cpus_per_worker)
    else:
        room = int(torch.cuda.device_count() // (cluster.gpus_per_worker or 1))
    workers = max(1, min(cluster.max_workers, room))
    share = divide_batch(spec.training.global_batch, spec.training.micro_batch, cluster.max_workers)
    batch = workers * share.micro_batch * share.accumulation
    model = replace(spec.model, num_classes=_DRAWN_CLASSES)
    gflops = training_gflops(model, count_cost(largest_training_model(spec)), spec.training)
    known = DEVICES[device]
    cores = 1 if known.is_gpu else cluster.cpus_per_worker
    slowest_s = batch / workers * gflops / (known.tflops * 1e3 * known.utilization[0] * cores)
    steps = max(_FEWEST_STEPS, min(_MOST_STEPS, int(_LIMIT_S / slowest_s)))
    content: dict[str, Any] = spec.model_dump(mode="json")
    data = {"loader_workers": spec.data.loader_workers, "augmentation": content["data"]["augmentation"]}
    content |= {"name": "calibration", "runs": folder, "multiscale": None, "tracking": {"log_every_steps": 1}}
    content["model"]["num_classes"] = _DRAWN_CLASSES
    content["data"] = data | {
        "format": "shapes",
        "image_size": math.ceil(1.25 * spec.model.input_size),
        "train": [{"count": batch * math.ceil(steps / _EPOCHS)}],
        "val": [{"count": 2 * batch}],
    }
    content["training"] |= {
        "global_batch": batch,
        "epochs": _EPOCHS,
        "warmup_epochs": 0,
        "decay_epochs": [],
        "learning_rate": 1e-6,  # random weights, which must not diverge
        "init_weights": None,
        "fork_from": None,
        "validate_every_epochs": 1,
        "validate_on": "val",
        "checkpoint_every_epochs": _EPOCHS,
        "checkpoint_every_steps": None,
        "profile_steps": None,
    }
    content["cluster"] |= {"workers": workers}
    return workers, parse_spec(content, source="calibration")


def _run(spec: JobSpec, workers: int, folder: str) -> list[dict[str, Any]]:
    """Train under torchrun; return the lines of metrics.jsonl."""
    job = Path(folder, "job.yaml")
    job.write_text(dump_spec(spec), encoding="utf-8")
    threads = max(1, int(spec.cluster.cpus_per_worker))
    memory = {
        name: variable.default or "" for name, variable in settings.VARIABLES.items() if name.startswith("MALLOC_")
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}", "-m"]
    command += ["refinedet.pipeline.training", str(job)]
    try:
        done = subprocess.run(
            command,
            env=settings.inherited(OMP_NUM_THREADS=str(threads), **memory),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"the calibration was not over after {_TIMEOUT_S:,} s; calibrate a smaller model.") from None
    metrics = Path(folder, spec.name, "metrics.jsonl")
    if done.returncode or not metrics.exists():
        raise UserError(f"the calibration's training failed: {_fault(done.stderr) or f'status {done.returncode}'}")
    return read_lines(str(metrics))


def _fault(log: str) -> str:
    """The line of a worker's error: the last one before torchrun reports that a worker has failed."""
    before, _, _ = log.partition("torch/distributed/elastic")
    lines = [line for line in before.splitlines()[:-1] if line.strip()]
    return lines[-1] if lines else ""


def _training_rates(spec: JobSpec, workers: int, lines: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """GFLOP/s of one worker in the slowest and the fastest block of steps, without validation and saving."""
    seconds = [
        line["times"]["total"] - line["times"]["validation"] - line["times"]["checkpoint"]
        for line in lines
        if "losses" in line and line["step"] > _WARM_UP
    ]
    size = len(seconds) // _BLOCKS
    blocks = [fmean(seconds[at * size : (at + 1) * size]) for at in range(_BLOCKS)]
    model = largest_training_model(spec)
    work = spec.training.global_batch / workers * training_gflops(model, count_cost(model), spec.training)
    return work / max(blocks), work / min(blocks)


def _detection_rates(spec: JobSpec, workers: int, lines: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """GFLOP/s of one worker in the slower and the faster validation."""
    seconds = [line["times"]["validation"] for line in lines if "losses" in line and line["times"]["validation"]]
    images = sum(split.count or 0 for split in spec.data.val)
    work = images / workers * count_cost(spec.model).total_gflops
    return work / max(seconds), work / min(seconds)
