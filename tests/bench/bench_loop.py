"""The training loop against a bare PyTorch loop, and what saving checkpoints costs.

    python -m tests.bench.bench_loop [--steps 40] [--saves 6] [--size 128] [--batch 8] [--zero-stage 1] [--json OUT]
    torchrun --nproc-per-node 2 -m tests.bench.bench_loop ...   against torch's DistributedDataParallel

Both loops train the same detector on the same batch, already in memory, in one process; after every step of ours comes
a bare one, so that whatever else the machine does slows both. On a busy machine trust the processor's seconds more than
the clock's. Checkpoints are measured in a second run that saves at the head of every other block of a few steps: what
one costs is what its block, bare steps included, takes beyond the mean of the two blocks around it, in which nothing
is written.
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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from refinedet.model import RefineDet, RefineDetConfig, Targets, detection_loss, sum_losses
from refinedet.pipeline.config.batches import BatchPlan
from refinedet.pipeline.config.spec import Training
from refinedet.pipeline.data.samples import Batch, Cursor
from refinedet.pipeline.training.loop import train
from refinedet.pipeline.training.records import StepRecord
from refinedet.pipeline.training.task import Callbacks, Task
from refinedet.pipeline.training.world import World, open_world
from torch.nn.parallel import DistributedDataParallel

WARMUP = 5
BLOCK = 4
"""steps; a save is written within them, or its cost shows in the next block"""
STEPS_AN_EPOCH = 118_287 // 32
"""of COCO's train2017 at the paper's batch: how often a checkpoint is saved by default"""


class OneBatch:
    """The same batch for ever; `between` is called on every rank between two steps."""

    batches_per_epoch = 1_000_000

    def __init__(self, start: Cursor, plan: BatchPlan, size: int) -> None:
        self.start = start
        self.between: Callable[[], None] = lambda: None
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
            self.between()
            yield replace(self.batch, index=number)
            number += 1

    def close(self) -> None:
        pass


def bare_step(detector: RefineDet, batch: Batch, spec: Training, world: World) -> Callable[[], None]:
    """A step as anybody would write it; on several ranks with DDP."""
    device = world.device
    detector = copy.deepcopy(detector).to(device)
    if spec.channels_last:
        detector = detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parallel = DistributedDataParallel(detector) if world.size > 1 else detector
    optimizer = torch.optim.SGD(detector.parameters(), lr=1e-5, momentum=spec.momentum, weight_decay=spec.weight_decay)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=spec.precision == "bf16")

    def step() -> None:
        images = batch.images.to(device, non_blocking=True)
        targets = [target.to(device) for target in batch.targets]
        with autocast():
            predictions = parallel(images, targets)
        detection_loss(predictions, targets, detector.config).total.backward()
        if spec.gradient_clip:
            torch.nn.utils.clip_grad_norm_(detector.parameters(), spec.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


@dataclass
class Measured:
    """Seconds of each step of our loop, and of the bare step that follows it: by the clock, and of the processor."""

    ours: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    ours_cpu: list[float] = field(default_factory=list)
    bare_cpu: list[float] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)

    def overhead(self, cpu: bool) -> float:
        """Median of the neighbours' ratios, less one."""
        pairs = zip(self.ours_cpu, self.bare_cpu, strict=True) if cpu else zip(self.ours, self.bare, strict=True)
        return statistics.median(ours / bare for ours, bare in pairs) - 1


def measure(world: World, config: RefineDetConfig, spec: Training, steps: int) -> Measured:
    torch.manual_seed(0)
    detector = RefineDet(config)
    share = spec.global_batch // world.size
    stream = OneBatch(Cursor(), BatchPlan(spec.global_batch, share, 1, world.size), config.input_size)
    bare = bare_step(detector, stream.batch, spec, world)
    measured, seen = Measured(), 0
    left, left_cpu = time.perf_counter(), time.process_time()

    def between() -> None:
        nonlocal seen, left, left_cpu
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        came, came_cpu = time.perf_counter(), time.process_time()
        bare()
        went, went_cpu = time.perf_counter(), time.process_time()
        seen += 1
        if seen > WARMUP:
            measured.ours.append(came - left)
            measured.ours_cpu.append(came_cpu - left_cpu)
            measured.bare.append(went - came)
            measured.bare_cpu.append(went_cpu - came_cpu)
        left, left_cpu = time.perf_counter(), time.process_time()

    stream.between = between
    with tempfile.TemporaryDirectory() as folder:
        task = Task(
            detector,
            functools.partial(sum_losses, config=config),
            make_stream=lambda start, plan: stream,  # type: ignore[arg-type, return-value]
            run_dir=world.broadcast_object(folder),
        )
        callbacks = Callbacks(on_step=measured.records.append, stop_requested=lambda: seen >= steps + WARMUP)
        train(spec, world, task, callbacks)
    del measured.records[: WARMUP - 1], measured.records[len(measured.ours) :]
    return measured


def cost_of_saves(measured: Measured) -> list[float]:
    """Seconds by the clock that each save cost: of its block beyond the mean of its neighbours."""
    first = measured.records[0].step
    cycles = [ours + bare for ours, bare in zip(measured.ours, measured.bare, strict=True)]

    def block(step: int) -> float:
        return sum(cycles[step - first : step - first + BLOCK])

    saves = range(2 * BLOCK, measured.records[-1].step + 1, 2 * BLOCK)
    inner = [step for step in saves if step - BLOCK >= first and step + 2 * BLOCK - 1 <= measured.records[-1].step]
    return [block(step) - (block(step - BLOCK) + block(step + BLOCK)) / 2 for step in inner]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--saves", type=int, default=6, help="at least 2; the first and the last have no neighbour")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--tcb-channels", type=int, default=128)
    parser.add_argument("--no-prediction-block", action="store_true", help="as the jobs for a CPU have it")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--zero-stage", type=int, default=1)
    parser.add_argument("--gradient-clip", type=float, help="for both loops, as jobs on photos have it; default: none")
    parser.add_argument("--json", metavar="OUT")
    options = parser.parse_args()
    config = RefineDetConfig(
        num_classes=8,
        input_size=options.size,
        backbone=options.backbone,
        tcb_channels=options.tcb_channels,
        prediction_block=not options.no_prediction_block,
    )
    spec = Training(
        global_batch=options.batch,
        reference_batch=options.batch,
        learning_rate=1e-5,
        warmup_learning_rate=1e-5,
        precision=options.precision,
        zero_stage=options.zero_stage,
        gradient_clip=options.gradient_clip,
    )
    with open_world() as world:
        plain = measure(world, config, spec, options.steps)
        every = spec.model_copy(update={"checkpoint_every_steps": 2 * BLOCK})
        saving = measure(world, config, every, 2 * BLOCK * (options.saves + 1))
        device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor()
    if not world.is_main:
        return
    costs = cost_of_saves(saving)
    held_up = [record.times.checkpoint for record in saving.records if record.step % (2 * BLOCK) == 0]
    step_s = statistics.median(plain.ours)
    result: dict[str, Any] = {
        "ours_s": _spread(plain.ours),
        "bare_s": _spread(plain.bare),
        "ours_cpu_s": _spread(plain.ours_cpu),
        "bare_cpu_s": _spread(plain.bare_cpu),
        "overhead": plain.overhead(cpu=False),
        "overhead_cpu": plain.overhead(cpu=True),
        "phases_s": {
            name: statistics.median(getattr(record.times, name) for record in plain.records)
            for name in ("data", "forward", "backward", "reduce", "optimizer", "checkpoint")
        },
        "saves": len(costs),
        "held_up_s_a_save": statistics.median(held_up),
        "save_s": _spread(costs),
        "lost_at_an_epoch": statistics.median(costs) / (STEPS_AN_EPOCH * step_s),
        "steps_for_5_percent": statistics.median(costs) / (0.05 * step_s),
        "parameters": sum(parameter.numel() for parameter in RefineDet(config).parameters()),
        "setting": vars(options),
        "where": {
            "device": device or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "ranks": world.size,
            "commit": _commit(),
        },
    }
    for line in _table(result):
        print(line)  # noqa: T201
    if options.json:
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)


def _spread(values: list[float]) -> dict[str, float]:
    quarter = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": statistics.median(values), "lower_quartile": quarter[0], "upper_quartile": quarter[2]}


def _table(result: dict[str, Any]) -> Iterator[str]:
    setting, where = result["setting"], result["where"]
    yield (
        f"{setting['backbone']}, {setting['size']} px, batch {setting['batch']}, "
        f"{result['parameters'] / 1e6:.1f} M parameters, ZeRO {setting['zero_stage']}, {setting['precision']}"
    )
    yield f"{'seconds per step':28}{'median':>10}{'quartiles':>20}"
    for name, label in (
        ("ours_s", "this loop, clock"),
        ("bare_s", "bare PyTorch (DDP), clock"),
        ("ours_cpu_s", "this loop, processor"),
        ("bare_cpu_s", "bare PyTorch (DDP), processor"),
    ):
        row = result[name]
        yield f"{label:28}{row['median']:>10.4f}{row['lower_quartile']:>12.4f} {row['upper_quartile']:.4f}"
    yield (
        f"overhead, median of neighbours' ratios: {100 * result['overhead']:+.1f} % by the clock, "
        f"{100 * result['overhead_cpu']:+.1f} % of the processor"
    )
    yield "of a step: " + ", ".join(f"{name} {value:.4f} s" for name, value in result["phases_s"].items())
    cost = result["save_s"]
    yield (
        f"a checkpoint holds up the loop for {result['held_up_s_a_save']:.3f} s and costs {cost['median']:.2f} s by "
        f"the clock, quartiles {cost['lower_quartile']:.2f} {cost['upper_quartile']:.2f} ({result['saves']} saves)"
    )
    yield (
        f"time lost to checkpoints: {100 * result['lost_at_an_epoch']:.3f} % at one per epoch of {STEPS_AN_EPOCH} such "
        f"steps; 5 % at one in {result['steps_for_5_percent']:.0f} steps"
    )
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
