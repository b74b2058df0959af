"""The work of a job in steps and images, from its spec and the shards that exist."""

from __future__ import annotations

import math

from refinedet.model.cost import count_cost
from refinedet.pipeline.config.recipes import estimate_cost, resolve_passes
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.data.index import find_parts
from refinedet.pipeline.data.sampling import expected_repeats
from refinedet.pipeline.planning.estimates import Workload

UNKNOWN_IMAGES = 1000
"""images of an evaluation whose number is not known"""


def epoch_length(spec: JobSpec) -> int:
    """Images of an epoch: from the shards, where they exist, else by the splits' `count`; 0: not known."""
    shards = find_parts(Run(spec).shards).get("train")
    if shards is None:
        return round(sum((split.count or 0) * split.weight for split in spec.data.train))
    repeats = expected_repeats(shards, spec.data.train, spec.data.sampling)
    return repeats.num_draws if repeats else shards.num_samples


def evaluated_images(spec: JobSpec) -> int:
    """Images to measure on, known as those of an epoch are."""
    shards = find_parts(Run(spec).shards).get("val")
    return shards.num_samples if shards else sum(split.count or 0 for split in spec.data.val)


def describe_workload(spec: JobSpec) -> Workload:
    """The work of all stages; without a `count` no steps, and UNKNOWN_IMAGES to measure on."""
    training = spec.training
    images, measured = epoch_length(spec), evaluated_images(spec) or UNKNOWN_IMAGES
    steps_per_epoch = math.ceil(images / training.global_batch)
    evaluated = measured if spec.data.val else 0
    validations = training.epochs // training.validate_every_epochs if training.validate_every_epochs else 0
    relative = 0.0
    if spec.multiscale is not None and evaluated:
        passes = resolve_passes(spec.multiscale, spec.model)
        relative = estimate_cost(passes, input_size=spec.model.input_size, num_images=evaluated)["relative"]
    return Workload(
        steps=training.epochs * steps_per_epoch,
        forward_gflops=count_cost(spec.model).total_gflops,
        validated=validations * (images if training.validate_on == "train" else evaluated),
        evaluated=evaluated,
        multiscale_cost=relative,
        save_every=training.checkpoint_every_steps or training.checkpoint_every_epochs * steps_per_epoch,
    )
