"""`refinedet plan`: what a job comes to - batch, model, memory, time, price, traffic - before anything is started.

Times are ranges. Both ends come from a stated model (`devices`, `estimates`), or from a run on the same hardware
(`calibration`); the plan prints what they rest on. Beyond one machine all of it is calculation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from refinedet.model.cost import ModelCost, count_cost
from refinedet.pipeline.config.batches import BatchPlan, plan_batches
from refinedet.pipeline.config.recipes import describe_source, estimate_cost, resolve_passes
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.schedule import make_schedule
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.data.index import find_parts
from refinedet.pipeline.data.job_statistics import job_statistics
from refinedet.pipeline.data.readers import format_of
from refinedet.pipeline.planning.calibration import load_calibrations, measured_speed
from refinedet.pipeline.planning.device_speeds import Device, Speed, assumed_speed, find_device
from refinedet.pipeline.planning.estimates import (
    RESTART_S,
    Duration,
    Memory,
    Workload,
    estimate_duration,
    estimate_memory,
    estimate_step,
    largest_training_model,
    training_gflops,
)
from refinedet.pipeline.planning.workload import UNKNOWN_IMAGES, describe_workload, epoch_length, evaluated_images
from refinedet.pipeline.runs.durations import describe_duration
from refinedet.pipeline.runs.environment import processor
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_GIB = 2**30
_BYTES_AN_IMAGE = {"coco": 163e3, "voc": 110e3, "shapes": 6e3}  # encoded, with objects
_IMAGES_A_CORE = 280
"""that one core decodes and augments a second: photos of COCO to 512 pixels, measured (BENCHMARKS.md)"""


@dataclass(frozen=True)
class Assumptions:
    """Facts about the machines that the user may give.

    device             key of DEVICES; None: by the spec
    nodes              instead of those that the workers fill
    gpus_per_node      with `nodes`, instead of the spec's workers; `nodes` alone are full ones
    price_per_gpu_hour dollars; None: only hours are printed
    node_mtbf_hours    between two losses of one node
    calibrations       file of `refinedet plan --calibrate`; None: none
    elsewhere          the calibrations are of another machine, whose CPU may have another name
    """

    device: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    price_per_gpu_hour: float | None = None
    node_mtbf_hours: float = 6300.0
    calibrations: str | None = None
    elsewhere: bool = False


@dataclass(frozen=True)
class _Plan:
    """A job on machines: what all lines of the plan are about."""

    spec: JobSpec
    device: Device
    workers: int
    machines: int
    batch: BatchPlan
    cost: ModelCost
    memory: Memory
    speed: Speed
    work: Workload
    steps_s: tuple[float, float]
    """longest and shortest"""
    durations: tuple[Duration, Duration]
    """longest and shortest"""
    assumed: Assumptions


def make_plan(spec: JobSpec, assumed: Assumptions = Assumptions()) -> _Plan:
    """Resolve and estimate a job.

    Raises UserError for a spec that `launch` refuses, too many workers for the batch, and an unknown device.
    """
    check_spec(spec)
    key = (assumed.device or ("A100" if spec.cluster.gpus_per_worker else "CPU")).upper()
    device = find_device(key)
    workers = spec.cluster.min_workers
    if assumed.gpus_per_node or (assumed.nodes and device.is_gpu):
        workers = (assumed.nodes or 1) * (assumed.gpus_per_node or device.per_node)
    batch = plan_batches(spec.training, workers)
    model = largest_training_model(spec)
    cost = count_cost(model)
    machines = assumed.nodes or math.ceil(workers * (spec.cluster.gpus_per_worker or 1) / device.per_node)
    speed = None
    if assumed.calibrations:
        hardware = None if device.is_gpu or assumed.elsewhere else processor()
        speed = measured_speed(spec, key, hardware, load_calibrations(assumed.calibrations))
    precisions = (spec.training.precision, spec.evaluation.precision)
    speed = speed or assumed_speed(device, *precisions, cores=spec.cluster.cpus_per_worker)
    work = describe_workload(spec)
    gflops = training_gflops(model, cost, spec.training)
    steps = [estimate_step(gflops, rate, cost, batch, device, machines).seconds for rate in speed.training]
    detectors = spec.cluster.evaluation_workers or workers
    durations = [
        estimate_duration(work, step_s, rate * detectors, machines, assumed.node_mtbf_hours)
        for step_s, rate in zip(steps, speed.detection, strict=True)
    ]
    return _Plan(
        spec, device, workers, machines, batch, cost, estimate_memory(cost, spec.training, batch, device), speed, work,
        (steps[0], steps[1]), (durations[0], durations[1]), assumed,
    )  # fmt: skip


def print_plan(spec: JobSpec, assumed: Assumptions = Assumptions(), console: Console | None = None) -> None:
    """Print what a job comes to. Raises as `make_plan` does."""
    plan = make_plan(spec, assumed)
    console = console or Console(highlight=False, soft_wrap=True)
    batch, cost, device = plan.batch, plan.cost, plan.device
    console.print(
        f"[bold]{spec.name}[/]  RefineDet{spec.model.input_size}++, {spec.model.backbone}, {spec.runs}/{spec.name}\n"
    )
    console.print(_cost_table(cost))
    levels = "  ".join(f"stride {s}: {n:,}" for s, n in zip(spec.model.strides, cost.anchors, strict=True))
    console.print(f"\nAnchors      {cost.num_anchors:,}  ({levels})")
    upto = "up to " * (batch.micro_batch * batch.accumulation * batch.world_size > batch.global_batch)
    console.print(
        f"Batch        {batch.global_batch} = {upto}{batch.micro_batch} images x {batch.accumulation} accumulated x "
        f"{batch.world_size} workers, on {device.name}, {plan.machines} node{'s' * (plan.machines > 1)}"
    )
    _print_schedule(console, plan)
    _print_evaluation(console, plan)
    _print_total(console, plan)
    _print_loader(console, plan)
    _print_memory(console, device, plan.memory)
    _print_storage(console, plan)
    _print_data(console, spec)
    _print_basis(console, plan)


def _print_storage(console: Console, plan: _Plan) -> None:
    spec, cost = plan.spec, plan.cost
    checkpoint = 8.0 * cost.total_parameters + (4.0 * cost.total_parameters if spec.training.ema_decay else 0)
    kept = spec.training.keep_last + spec.training.keep_best
    console.print(f"Checkpoint   {_bytes(checkpoint)} each, {kept} kept: {_bytes(checkpoint * kept)}")
    images = sum(split.count or 0 for split in (*spec.data.train, *spec.data.val))
    an_image = _BYTES_AN_IMAGE.get(spec.data.format, 150e3)
    if images:
        console.print(f"Shards       {images:,} images, about {_bytes(images * an_image)}")
    shards = plan.batch.global_batch / plan.steps_s[1] * an_image
    console.print(
        f"Traffic      {_bytes(shards)}/s of shards at most to all workers, in the first epoch from storage, then from "
        f"the nodes' caches ({_bytes(spec.data.cache_bytes)} each); gradients {_bytes(4.0 * cost.total_parameters)} a "
        f"step and worker; checkpoints {_bytes(checkpoint)} every {_saving_interval(spec)}"
    )


def _print_basis(console: Console, plan: _Plan) -> None:
    device, several = plan.device, plan.machines > 1
    between = f", {device.node_gb_s:g} GB/s between nodes (nothing beyond one node was measured)" if several else ""
    console.print(
        f"\n[dim]Rests on: {escape(plan.speed.basis)}; all-reduce at {device.network_gb_s:g} GB/s a worker behind the "
        f"backward pass{between}; data waits for nothing; every anchor computed, though the negative filter leaves far "
        f"fewer; a node is lost every {plan.assumed.node_mtbf_hours:g} h (--node-mtbf-hours), which costs "
        f"{RESTART_S:g} s and half the interval between two saves.[/]"
    )


def _print_data(console: Console, spec: JobSpec) -> None:
    """Print what is striking in the shards, where they exist, and in the splits."""
    read = [split for split in spec.data.val if format_of(spec.data, split) != "shapes"]  # drawn anew for each part
    if same := [split for split in read if split in spec.data.train]:
        name = same[0].set or same[0].annotations or same[0].images
        console.print(
            f"[yellow]Data         data.val and data.train both name {escape(name)}: its metrics are of images that "
            "were trained on[/]"
        )
    for finding in job_statistics(find_parts(Run(spec).shards), spec.model)["findings"]:
        console.print(f"[yellow]Data         {escape(finding)}[/]")


def _saving_interval(spec: JobSpec) -> str:
    training = spec.training
    epochs = "epoch" if training.checkpoint_every_epochs == 1 else f"{training.checkpoint_every_epochs} epochs"
    return f"{training.checkpoint_every_steps:,} steps" if training.checkpoint_every_steps else epochs


def _print_schedule(console: Console, plan: _Plan) -> None:
    spec, training = plan.spec, plan.spec.training
    images, pace = epoch_length(spec), _pace(plan)
    if not images:
        console.print(f"Schedule     {training.epochs} epochs (no `count` in data.train, so no number of steps)")
        console.print(f"Step         {pace}")
        return
    schedule = make_schedule(training, math.ceil(images / training.global_batch))
    console.print(
        f"Schedule     {training.epochs} epochs x {schedule.steps_per_epoch:,} steps = {schedule.total_steps:,} steps, "
        f"learning rate {schedule.learning_rate(0):.3g} to {training.learning_rate:g} in {training.warmup_epochs:g} "
        f"epochs, a tenth after {', '.join(f'{epoch:g}' for epoch in training.decay_epochs)}"
    )
    console.print(f"Time         {pace}, {_durations(plan, 'training_s')} of training")


def _pace(plan: _Plan) -> str:
    slow, fast = plan.steps_s
    images = plan.batch.global_batch
    rate = _range(f"{images / slow:.1f}", f"{images / fast:.1f}")
    return f"{_range(_seconds(fast), _seconds(slow))} a step, {rate} images/s"


def _print_evaluation(console: Console, plan: _Plan) -> None:
    """Print the times of the validations and of the stages evaluate and multiscale."""
    spec, training = plan.spec, plan.spec.training
    if not spec.data.val:
        return
    every = training.validate_every_epochs
    if every and training.epochs >= every:
        count = training.epochs // every
        console.print(f"Validation   {_durations(plan, 'validation_s')} for {count} validations during training")
    images = evaluated_images(spec)
    per = f"{images:,} images" if images else f"each {UNKNOWN_IMAGES:,} images (no `count` in data.val)"
    counted = "decoding and NMS included" if plan.speed.measured else "forward passes alone"
    workers = spec.cluster.evaluation_workers or plan.workers
    console.print(f"Evaluation   {_durations(plan, 'evaluation_s')} for {per} on {workers} workers; {counted}")
    if spec.multiscale is not None:
        passes = resolve_passes(spec.multiscale, spec.model)
        cost = estimate_cost(passes, input_size=spec.model.input_size, num_images=plan.work.evaluated)
        console.print(
            f"Multi-scale  {_durations(plan, 'multiscale_s')}, {cost['views']:.0f} views of each image; "
            f"{describe_source(spec.multiscale)}"
        )


def _print_total(console: Console, plan: _Plan) -> None:
    """Print the failures that are expected, and hours and dollars of the whole job."""
    if not plan.work.steps:
        return
    longest, shortest = plan.durations
    fewest, most = (f"{each.failures:.2g}" if each.failures > 0.01 else "0.01" for each in (shortest, longest))
    losses = _range(fewest, most) if most != "0.01" else "under 0.01"
    console.print(f"Failures     {losses} losses of a node expected, {_durations(plan, 'failures_s')}")
    total = f"Together     {_durations(plan, 'total_s')}"
    if plan.device.is_gpu:
        hours = [each.total_s / 3600 * plan.workers for each in (shortest, longest)]
        total += f", {_range(f'{hours[0]:,.1f}', f'{hours[1]:,.1f}')} GPU hours"
        price = plan.assumed.price_per_gpu_hour
        if price is None:
            total += " (--price-per-gpu-hour gives dollars)"
        else:
            dollars = _range(f"{hours[0] * price:,.0f}", f"{hours[1] * price:,.0f}")
            total += f", {dollars} $ at {price:g} $ a GPU hour; head, storage and traffic apart"
    console.print(f"{total}; start-up of cluster and stages not counted")


def _print_loader(console: Console, plan: _Plan) -> None:
    """Print the cores that decoding takes beside the loader workers there are."""
    needed = plan.batch.global_batch / plan.steps_s[1] / plan.workers / _IMAGES_A_CORE
    given = max(1, plan.spec.data.loader_workers)
    enough = "" if needed <= given else "; raise data.loader_workers, or steps will wait for data"
    colour = ("", "") if needed <= given else ("[yellow]", "[/]")
    console.print(
        f"{colour[0]}Loader       {needed:.2g} cores a worker at most, at {_IMAGES_A_CORE} images/s a core (photos of "
        f"COCO); data.loader_workers is {plan.spec.data.loader_workers}{enough}{colour[1]}"
    )


def _durations(plan: _Plan, part: str) -> str:
    longest, shortest = (describe_duration(getattr(each, part)) for each in plan.durations)
    return _range(shortest, longest)


def _range(low: str, high: str) -> str:
    """Both ends, or the one that they are when rounded."""
    return low if low == high else f"{low} to {high}"


def _print_memory(console: Console, device: Device, found: Memory) -> None:
    fits = found.total_bytes <= device.memory_bytes
    verdict = (
        f"of {_bytes(device.memory_bytes)}"
        if fits
        else (
            f"[red]more than the {_bytes(device.memory_bytes)} there are[/]: lower training.micro_batch, or set "
            "model.activation_checkpointing"
        )
    )
    console.print(
        f"Memory       {_bytes(found.total_bytes)} a worker {verdict} (state {_bytes(found.state_bytes)}, activations "
        f"{_bytes(found.activation_bytes)}, workspace {_bytes(found.workspace_bytes)})"
    )


def _cost_table(cost: ModelCost) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("module")
    table.add_column("parameters", justify="right")
    table.add_column("GFLOPs per image", justify="right")
    for name, count in cost.parameters.items():
        table.add_row(name, f"{count / 1e6:.2f} M", f"{cost.gflops[name]:.1f}")
    table.add_row("[bold]total", f"[bold]{cost.total_parameters / 1e6:.2f} M", f"[bold]{cost.total_gflops:.1f}")
    return table


def _bytes(count: float) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count / 1024:.0f} KiB"


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
