"""The training loop against a bare PyTorch loop, and what saving checkpoints costs.

    python -m tests.bench.bench_loop [--steps 40] [--size 128] [--batch 8] [--zero-stage 0] [--json OUT]

Both loops train the same detector on the same batch, already in memory, in one process; after every step of ours comes
a bare one, so that whatever else the machine does slows both. Checkpoints are measured the same way, in a second run
that saves every few steps: time lost is what its steps take beyond those of the bare loop, less the loop's overhead.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from model import RefineDet, RefineDetConfig, Targets, detection_loss
from pipeline.data import Batch, Cursor
from pipeline.spec import Training
from pipeline.training import BatchPlan, StepRecord, World, open_world, train

WARMUP = 5


class OneBatch:
    """The same batch for ever."""

    batches_per_epoch = 1_000_000

    def __init__(self, start: Cursor, plan: BatchPlan, size: int) -> None:
        self.start = start
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(0, 256, (plan.micro_batch, 3, size, size), generator=generator, dtype=torch.uint8)
        corners = torch.rand(plan.micro_batch, 4, 2, generator=generator) * size / 2
        targets = tuple(Targets(torch.cat([xy, xy + size / 3], 1), torch.tensor([1, 2, 3, 4])) for xy in corners)
        keys = tuple(str(number) for number in range(plan.micro_batch))
        images = images.contiguous(memory_format=torch.channels_last)
        self.batch = Batch(images, targets, keys, tuple(range(plan.micro_batch)), start.epoch, start.batch)

    def __iter__(self) -> Iterator[Batch]:
        number = self.start.batch
        while True:
            yield replace(self.batch, index=number)
            number += 1

    def close(self) -> None:
        pass


def bare_step(detector: RefineDet, batch: Batch, spec: Training, device: torch.device) -> Callable[[], None]:
    """A step as anybody would write it."""
    detector = copy.deepcopy(detector).to(device)
    if spec.channels_last:
        detector = detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-5, momentum=spec.momentum, weight_decay=spec.weight_decay)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=spec.precision == "bf16")

    def step() -> None:
        images = batch.images.to(device, non_blocking=True)
        targets = [target.to(device) for target in batch.targets]
        with autocast():
            predictions = detector(images, targets)
        detection_loss(predictions, targets, detector.config).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def measure(
    world: World, config: RefineDetConfig, spec: Training, steps: int
) -> tuple[list[float], list[float], list[StepRecord]]:
    """Seconds of each step of our loop, and of the bare step that follows it."""
    torch.manual_seed(0)
    detector = RefineDet(config)
    stream = OneBatch(Cursor(), BatchPlan(spec.global_batch, spec.global_batch, 1, 1), config.input_size)
    bare = bare_step(detector, stream.batch, spec, world.device)
    ours, theirs, records = [], [], []
    left = time.perf_counter()

    def observe(record: StepRecord) -> None:
        nonlocal left
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        came = time.perf_counter()
        ours.append(came - left)
        records.append(record)
        bare()
        left = time.perf_counter()
        theirs.append(left - came)

    with tempfile.TemporaryDirectory() as folder:
        train(
            spec,
            seed=0,
            world=world,
            detector=detector,
            loss=functools.partial(detection_loss, config=config),
            make_stream=lambda start, plan: stream,  # type: ignore[arg-type, return-value]
            run_dir=folder,
            observer=observe,
            stop_requested=lambda: len(ours) >= steps + WARMUP - 1,
        )
    return ours[WARMUP:-1], theirs[WARMUP:-1], records[WARMUP:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=10)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--tcb-channels", type=int, default=128)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--zero-stage", type=int, default=0)
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args()
    config = RefineDetConfig(
        num_classes=8, input_size=options.size, backbone=options.backbone, tcb_channels=options.tcb_channels
    )
    spec = Training(
        global_batch=options.batch,
        reference_batch=options.batch,
        learning_rate=1e-5,
        warmup_learning_rate=1e-5,
        precision=options.precision,
        zero_stage=options.zero_stage,
    )
    with open_world() as world:
        ours, theirs, records = measure(world, config, spec, options.steps)
        saving = spec.model_copy(update={"checkpoint_every_steps": options.save_every})
        with_saves, beside, _ = measure(world, config, saving, options.steps)
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor()
    # Pairs of neighbours, so that what slows the machine for a while counts on both sides.
    overhead = statistics.median(a / b for a, b in zip(ours, theirs, strict=True)) - 1
    saves = len(with_saves) // options.save_every
    lost_s = sum(with_saves) - sum(beside) * statistics.median(a / b for a, b in zip(ours, theirs, strict=True))
    parameters = sum(parameter.numel() for parameter in RefineDet(config).parameters())
    result: dict[str, Any] = {
        "ours_s": _spread(ours),
        "bare_s": _spread(theirs),
        "overhead": overhead,
        "engine_phases_s": {
            name: statistics.median(getattr(record.times, name) for record in records)
            for name in ("data", "forward", "backward", "reduce", "optimizer", "checkpoint")
        },
        "saves": saves,
        "lost_s_a_save": lost_s / saves,
        "lost_when_saving_every_60_s": lost_s / saves / 60,
        "parameters": parameters,
        "setting": vars(options),
        "where": {
            "device": device or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "commit": _commit(),
        },
    }
    for line in _table(result):
        print(line)  # noqa: T201
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


def _spread(values: list[float]) -> dict[str, float]:
    quarter = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "lower_quartile": quarter[0], "upper_quartile": quarter[2]}


def _table(result: dict[str, Any]) -> Iterator[str]:
    setting, where = result["setting"], result["where"]
    yield f"{setting['backbone']}, {setting['size']} px, batch {setting['batch']}, {result['parameters'] / 1e6:.1f} M parameters, ZeRO {setting['zero_stage']}, {setting['precision']}"  # noqa: E501
    yield f"{'':24}{'median':>10}{'quartiles':>20}"
    for name, label in (("ours_s", "this loop, s a step"), ("bare_s", "bare PyTorch, s a step")):
        row = result[name]
        yield f"{label:24}{row['median']:>10.4f}{row['lower_quartile']:>11.4f} {row['upper_quartile']:.4f}"
    yield f"overhead (median of neighbours' ratios): {100 * result['overhead']:+.1f} %"
    yield "of a step: " + ", ".join(f"{name} {value:.4f} s" for name, value in result["engine_phases_s"].items())
    yield f"a checkpoint costs {result['lost_s_a_save']:.2f} s: {100 * result['lost_when_saving_every_60_s']:.2f} % when one is saved every 60 s"  # noqa: E501
    yield ", ".join(f"{name} {value}" for name, value in where.items())


def _commit() -> str:
    try:
        return subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    main()
