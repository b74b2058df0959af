"""How a global batch is divided: over ranks, and into micro-batches one after the other."""

from __future__ import annotations

from dataclasses import dataclass

from refinedet.pipeline.config.spec import Training
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
    """The global batch stays what the spec says, whatever the number of workers; UserError where it cannot."""
    if spec.global_batch % world_size:
        raise UserError(
            f"training.global_batch {spec.global_batch} cannot be shared by {world_size} workers; choose a number of "
            f"workers that divides it, or training.global_batch={-(-spec.global_batch // world_size) * world_size}"
        )
    share = spec.global_batch // world_size
    micro_batch = spec.micro_batch or share
    if share % micro_batch:
        raise UserError(
            f"training.micro_batch {micro_batch} does not divide a worker's share {share} of the global batch "
            f"({spec.global_batch} / {world_size} workers); choose one of "
            f"{', '.join(str(n) for n in range(1, share + 1) if share % n == 0)}"
        )
    return BatchPlan(spec.global_batch, micro_batch, share // micro_batch, world_size)


def possible_world_sizes(spec: Training, least: int, most: int) -> list[int]:
    """Numbers of workers from `least` to `most` that the global batch can be shared by, largest first.

    Raises UserError where there is none; for a single number, with what would do instead.
    """
    if least == most:
        return [plan_batches(spec, most).world_size]
    sizes = [size for size in range(most, least - 1, -1) if _can_share(spec, size)]
    if not sizes:
        raise UserError(
            f"training.global_batch {spec.global_batch} can be shared by no number of workers from {least} to {most}"
            + (f" in micro-batches of {spec.micro_batch}" if spec.micro_batch else "")
            + "; choose cluster.workers so that one of them divides it."
        )
    return sizes


def _can_share(spec: Training, world_size: int) -> bool:
    try:
        plan_batches(spec, world_size)
    except UserError:
        return False
    return True
