"""Global batches: their division over ranks and into micro-batches, and the sizes of their images."""

from __future__ import annotations

from dataclasses import dataclass

from refinedet.pipeline.config.spec import JobSpec, Training
from refinedet.pipeline.runs.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """The division of a global batch; images per rank and per micro-batch differ by at most one."""

    global_batch: int
    micro_batch: int
    """the largest micro-batch of any rank"""
    accumulation: int
    """micro-batches of each rank, the same on all of them"""
    world_size: int


def divide_batch(global_batch: int, micro_batch: int | None, world_size: int) -> BatchPlan:
    """Divide a global batch over ranks, and each share into as many micro-batches as the largest share needs.

    micro_batch  largest number of images that a rank holds at once; None: its whole share. A limit of one image is
                 exceeded by one where shares differ: the smaller share has too few images for as many micro-batches.
    """
    smallest, rest = divmod(global_batch, world_size)
    if not smallest:
        raise UserError(
            f"training.global_batch {global_batch} has fewer images than the {world_size} workers that share it: "
            f"choose at most {global_batch} workers, or training.global_batch={world_size}"
        )
    largest = smallest + (rest > 0)
    accumulation = min(-(-largest // (micro_batch or largest)), smallest)
    return BatchPlan(global_batch, -(-largest // accumulation), accumulation, world_size)


def plan_batches(spec: Training, world_size: int) -> BatchPlan:
    """`divide_batch` of the spec's global batch and micro-batch. Raises UserError for more workers than images."""
    return divide_batch(spec.global_batch, spec.micro_batch, world_size)


def possible_world_sizes(spec: Training, least: int, most: int) -> list[int]:
    """Numbers of workers from `least` to `most`, largest first. Raises UserError where one cannot share the batch."""
    return [plan_batches(spec, size).world_size for size in range(most, least - 1, -1)]


def training_sizes(spec: JobSpec) -> tuple[int, ...]:
    """Sides of the square inputs of training, pixels. Raises UserError where one does not fit the model's strides."""
    stride, sizes = spec.model.coarsest_stride, spec.training.input_sizes
    if any(size % stride for size in sizes):
        raise UserError(
            f"training.input_sizes must be multiples of the model's coarsest stride {stride}, received {list(sizes)}"
        )
    return sizes or (spec.model.input_size,)
