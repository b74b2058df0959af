"""`refinedet plan`: what a job comes to - batch, model, memory, time, traffic - before anything is started.

Time and memory come from a stated model (`Device`, `estimate`); what of it was measured says so, and the plan
prints its assumptions. Beyond one machine all of it is calculation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from refinedet.model.config import RefineDetConfig
from refinedet.model.cost import ModelCost, count_cost
from refinedet.pipeline.config.batches import BatchPlan, plan_batches, training_sizes
from refinedet.pipeline.config.checks import check_spec
from refinedet.pipeline.config.recipes import describe_source, estimate_cost, resolve_passes
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.schedule import make_schedule
from refinedet.pipeline.config.spec import JobSpec, Training
from refinedet.pipeline.data.job_statistics import find_parts, job_statistics
from refinedet.pipeline.data.readers import format_of
from refinedet.pipeline.data.sampling import expected_repeats
from refinedet.pipeline.runs.durations import describe_duration
from refinedet.pipeline.runs.errors import UserError
from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Device:
    """Figures of a device for the time model.

    tflops       dense matrix products in bf16 (fp32 on a CPU), TFLOP/s that the vendor or a measurement gives
    fp32_share   of them in fp32, which a GPU's convolutions compute as TF32
    utilization  share of it that training this network reaches: convolutions with batch normalisation between them
    network_gb_s all-reduce bandwidth of one worker within its node, GB/s
    node_gb_s    bandwidth between two nodes, GB/s
    per_node     devices of a node
    """

    name: str
    memory_bytes: float
    tflops: float
    utilization: float
    network_gb_s: float
    note: str
    node_gb_s: float = 1.0
    per_node: int = 8
    fp32_share: float = 0.5

    @property
    def is_gpu(self) -> bool:
        return self.name != "CPU core"


_GIB = 2**30
_ASSUMED = "utilization assumed, not measured by this project"
DEVICES = {
    "CPU": Device(
        "CPU core",
        3 * _GIB,
        0.039,
        0.50,
        1.0,
        "one AVX2 core in fp32, utilization measured in the quickstart",
        fp32_share=1.0,
    ),
    "A100": Device("A100 80 GB", 79 * _GIB, 312, 0.25, 20, _ASSUMED, node_gb_s=40),
    "H100": Device("H100 80 GB", 79 * _GIB, 790, 0.20, 40, _ASSUMED, node_gb_s=80),
    "H200": Device("H200", 139 * _GIB, 790, 0.20, 40, _ASSUMED, node_gb_s=80),
}
_BACKWARD = 2.0  # a backward pass costs two forward ones
_BYTES_AN_IMAGE = {"coco": 163e3, "voc": 110e3, "shapes": 6e3}  # encoded, with objects
_HALF_PRECISION_ACTIVATIONS = 0.55  # of fp32's: what batch normalisation keeps stays fp32
_UNKNOWN_IMAGES = 1000  # of which times are printed where the number of images is not known
_WORKSPACE_BYTES = 1.5 * _GIB  # CUDA context, cuDNN workspaces, fragments


def largest_training_model(spec: JobSpec) -> RefineDetConfig:
    """The job's detector at the largest size that it is trained at: what it needs is estimated there."""
    return replace(spec.model, input_size=max(training_sizes(spec)), num_levels=spec.model.levels)


@dataclass(frozen=True)
class Estimate:
    """Estimate for one worker and one step."""

    state_bytes: float
    activation_bytes: float
    workspace_bytes: float
    compute_s: float
    communication_s: float

    @property
    def memory_bytes(self) -> float:
        return self.state_bytes + self.activation_bytes + self.workspace_bytes

    @property
    def step_s(self) -> float:
        """Communication is hidden behind the backward pass, but for what is longer than it."""
        hidden = self.compute_s * _BACKWARD / (1 + _BACKWARD)
        return self.compute_s + max(0.0, self.communication_s - hidden)


def estimate(
    model: RefineDetConfig, cost: ModelCost, training: Training, batch: BatchPlan, device: Device, nodes: int = 1
) -> Estimate:
    """Memory and time of one worker for one step, of `batch.world_size` workers on `nodes` machines.

    State: fp32 weights, gradients and momentum, the last one (ZeRO 1) or two (ZeRO 2) shared by the workers, and the
    average of the weights where it is kept. Compute: FLOPs of the whole network, every anchor, forward and backward;
    activation checkpointing repeats the backbone's forward; pretrained layers that stay as they are have no backward.
    Precision: auto is bf16 on a GPU, fp32 on a CPU. Communication: a ring over the workers of a node, then one over
    the nodes, through which every gradient goes once each way.
    """
    weights = 4.0 * cost.total_parameters
    momentum = weights / (batch.world_size if training.zero_stage >= 1 else 1)
    gradients = weights / (batch.world_size if training.zero_stage >= 2 else 1)
    average = weights if training.ema_decay else 0.0
    half = device.is_gpu and training.precision != "fp32"
    tflops = device.tflops * (1.0 if half else device.fp32_share)
    activations = cost.activation_bytes * batch.micro_batch * (_HALF_PRECISION_ACTIVATIONS if half else 1.0)
    gflops = cost.total_gflops * (1 + _BACKWARD)
    if training.backbone_lr_multiplier == 0:
        gflops -= cost.gflops["backbone"] * _BACKWARD
    elif model.activation_checkpointing:
        gflops += cost.gflops["backbone"]
    images = math.ceil(batch.global_batch / batch.world_size)
    communication = 0.0
    if batch.world_size > 1:
        within = math.ceil(batch.world_size / nodes)
        communication = 2 * weights * (within - 1) / within / (device.network_gb_s * 1e9)
        communication += 2 * weights * (nodes - 1) / nodes / (device.node_gb_s * 1e9)
    return Estimate(
        state_bytes=weights + momentum + gradients + average,
        activation_bytes=activations,
        workspace_bytes=_WORKSPACE_BYTES if device.is_gpu else 0.3 * _GIB,
        compute_s=images * gflops / (tflops * 1e3 * device.utilization),
        communication_s=communication,
    )


def print_plan(
    spec: JobSpec,
    *,
    device: str | None = None,
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    console: Console | None = None,
) -> None:
    """Print what a job comes to, on its own workers or on `nodes` x `gpus_per_node` of `device`.

    `nodes` alone are full ones: eight GPUs each.

    Raises UserError for a spec that `launch` refuses, too many workers for the batch, and an unknown device.
    """
    check_spec(spec)
    console = console or Console(highlight=False, soft_wrap=True)
    known = DEVICES.get((device or ("A100" if spec.cluster.gpus_per_worker else "CPU")).upper())
    if known is None:
        raise UserError(f"There is no device {device!r} in the plan's model; choose one of {', '.join(DEVICES)}.")
    workers = spec.cluster.min_workers
    if gpus_per_node or (nodes and known.is_gpu):
        workers = (nodes or 1) * (gpus_per_node or known.per_node)
    if not known.is_gpu:
        known = replace(known, tflops=known.tflops * spec.cluster.cpus_per_worker)
    batch = plan_batches(spec.training, workers)
    model = largest_training_model(spec)
    cost = count_cost(model)
    machines = nodes or math.ceil(workers * (spec.cluster.gpus_per_worker or 1) / known.per_node)
    found = estimate(model, cost, spec.training, batch, known, machines)

    console.print(
        f"[bold]{spec.name}[/]  RefineDet{spec.model.input_size}++, {spec.model.backbone}, {spec.runs}/{spec.name}\n"
    )
    console.print(_cost_table(cost))
    levels = "  ".join(f"stride {s}: {n:,}" for s, n in zip(spec.model.strides, cost.anchors, strict=True))
    console.print(f"\nAnchors      {cost.num_anchors:,}  ({levels})")
    upto = "up to " * (batch.micro_batch * batch.accumulation * batch.world_size > batch.global_batch)
    console.print(
        f"Batch        {batch.global_batch} = {upto}{batch.micro_batch} images x {batch.accumulation} accumulated x "
        f"{batch.world_size} workers, on {known.name}, {machines} node{'s' * (machines > 1)}"
    )
    _print_schedule(console, spec, found.step_s)
    _print_evaluation(console, spec, known, workers)
    _print_memory(console, known, found)
    checkpoint = 8.0 * cost.total_parameters + (4.0 * cost.total_parameters if spec.training.ema_decay else 0)
    kept = spec.training.keep_last + spec.training.keep_best
    console.print(f"Checkpoint   {_bytes(checkpoint)} each, {kept} kept: {_bytes(checkpoint * kept)}")
    images = sum(split.count or 0 for split in (*spec.data.train, *spec.data.val))
    an_image = _BYTES_AN_IMAGE.get(spec.data.format, 150e3)
    if images:
        console.print(f"Shards       {images:,} images, about {_bytes(images * an_image)}")
    _print_data(console, spec)
    console.print(
        f"Traffic      {_bytes(batch.global_batch / found.step_s * an_image)}/s of shards to all workers, in the first "
        f"epoch from storage, then from the nodes' caches ({_bytes(spec.data.cache_bytes)} each); gradients "
        f"{_bytes(4.0 * cost.total_parameters)} a step and worker; checkpoints {_bytes(checkpoint)} every "
        f"{_saving_interval(spec)}"
    )
    _print_assumptions(console, known, machines)


def _print_assumptions(console: Console, known: Device, machines: int) -> None:
    between = f", {known.node_gb_s:g} GB/s between nodes (nothing beyond one node was measured)" if machines > 1 else ""
    console.print(
        f"\n[dim]Assumed: {known.name} at {known.tflops:g} TFLOP/s x {known.utilization:g} ({known.note})"
        f"{f', {known.fp32_share:g} of it in fp32' if known.is_gpu else ''}; all-reduce "
        f"at {known.network_gb_s:g} GB/s a worker behind the backward pass{between}; data waits for nothing; every "
        "anchor computed, though the negative filter leaves far fewer.[/]"
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


def _epoch_length(spec: JobSpec) -> int:
    """Images of an epoch: from the shards, where they exist, else by the splits' `count`; 0: not known."""
    shards = find_parts(Run(spec).shards).get("train")
    if shards is None:
        return round(sum((split.count or 0) * split.weight for split in spec.data.train))
    repeats = expected_repeats(shards, spec.data.train, spec.data.sampling)
    return repeats.num_draws if repeats else shards.num_samples


def _print_schedule(console: Console, spec: JobSpec, step_s: float) -> None:
    images, training = _epoch_length(spec), spec.training
    if not images:
        console.print(f"Schedule     {training.epochs} epochs (no `count` in data.train, so no number of steps)")
        console.print(f"Step         {_seconds(step_s)}, {training.global_batch / step_s:.1f} images/s")
        return
    schedule = make_schedule(training, math.ceil(images / training.global_batch))
    console.print(
        f"Schedule     {training.epochs} epochs x {schedule.steps_per_epoch:,} steps = {schedule.total_steps:,} steps, "
        f"learning rate {schedule.learning_rate(0):.3g} to {training.learning_rate:g} in {training.warmup_epochs:g} "
        f"epochs, a tenth after {', '.join(f'{epoch:g}' for epoch in training.decay_epochs)}"
    )
    console.print(
        f"Time         {_seconds(step_s)} a step, {training.global_batch / step_s:.1f} images/s, "
        f"{describe_duration(step_s * schedule.total_steps)} of training"
    )


def _print_evaluation(console: Console, spec: JobSpec, device: Device, workers: int) -> None:
    """Time of the stages evaluate and multiscale: the forward passes, with all anchors computed."""
    if not spec.data.val:
        return
    shards = find_parts(Run(spec).shards).get("val")
    images = shards.num_samples if shards else sum(split.count or 0 for split in spec.data.val)
    counted = images or _UNKNOWN_IMAGES
    workers = spec.cluster.evaluation_workers or workers
    half = device.is_gpu and spec.evaluation.precision != "fp32"
    speed = device.tflops * (1.0 if half else device.fp32_share) * device.utilization * 1e3 * workers
    seconds = counted * count_cost(spec.model).total_gflops / speed
    per = f"{images:,} images" if images else f"each {_UNKNOWN_IMAGES:,} images (no `count` in data.val)"
    duration = describe_duration(seconds)
    console.print(
        f"Evaluation   {duration} of forward passes for {per} on {workers} workers; decoding, NMS and the start of the "
        "workers are not counted"
    )
    if spec.multiscale is not None:
        passes = resolve_passes(spec.multiscale, spec.model)
        cost = estimate_cost(passes, input_size=spec.model.input_size, num_images=counted)
        duration = describe_duration(seconds * cost["relative"])
        console.print(
            f"Multi-scale  {duration} of forward passes, {cost['views']:.0f} views of each image; "
            f"{describe_source(spec.multiscale)}"
        )


def _print_memory(console: Console, device: Device, found: Estimate) -> None:
    fits = found.memory_bytes <= device.memory_bytes
    verdict = (
        f"of {_bytes(device.memory_bytes)}"
        if fits
        else (
            f"[red]more than the {_bytes(device.memory_bytes)} there are[/]: lower training.micro_batch, or set "
            "model.activation_checkpointing"
        )
    )
    console.print(
        f"Memory       {_bytes(found.memory_bytes)} a worker {verdict} (state {_bytes(found.state_bytes)}, activations "
        f"{_bytes(found.activation_bytes)}, workspace {_bytes(found.workspace_bytes)})"
    )


def _cost_table(cost: ModelCost) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("module")
    table.add_column("parameters", justify="right")
    table.add_column("GFLOPs an image", justify="right")
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
