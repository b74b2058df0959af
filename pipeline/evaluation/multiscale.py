"""Multi-scale testing: every image looked at in several sizes, aspects and mirrored, and the boxes merged.

An image is decoded once for all passes. Passes are batched by the size they warp to.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from model import RefineDet, RefineDetConfig
from pipeline.data import Category, EvaluationSamples, Sample, ShardSet
from pipeline.errors import UserError
from pipeline.evaluation.detect import Found, as_table, batched, evaluating, look
from pipeline.evaluation.detections import DetectionTable
from pipeline.evaluation.merging import merge_boxes
from pipeline.evaluation.recipes import RECIPES, Recipe
from pipeline.spec import MergeRule, Multiscale, Pass

_BATCHES_DECODED = 4  # images held at once, in batches: enough to fill batches of landscape and of portrait ones


def resolve_passes(multiscale: Multiscale, config: RefineDetConfig) -> tuple[Pass, ...]:
    """The passes of the recipe or the job's own; UserError where a size does not fit the model's strides."""
    recipe = _recipe(multiscale)
    passes = recipe.passes if recipe else multiscale.passes
    if not passes:
        raise UserError(
            "multiscale has neither `recipe` nor `passes`: give a recipe "
            f"({', '.join(sorted(RECIPES))}) or passes such as [{{size: {config.input_size}}}]"
        )
    stride = config.coarsest_stride
    for one in passes:
        if any(side % stride for side in _sides(one)):
            raise UserError(
                f"multiscale: a pass's size must be a multiple of the model's coarsest stride {stride}, received "
                f"{one.size}; take {max(stride, round(max(_sides(one)) / stride) * stride)} for the longer side"
            )
    return passes


def resolve_merge(multiscale: Multiscale) -> MergeRule:
    """The job's merge rule, or the recipe's: vote for VOC, soft voting for COCO and own passes."""
    recipe = _recipe(multiscale)
    return multiscale.merge or (recipe.merge if recipe else MergeRule(method="soft_vote"))


def estimate_cost(passes: Sequence[Pass], *, input_size: int, num_images: int) -> dict[str, float]:
    """What multi-scale testing costs: {"looks", "relative", "images"}.

    looks     forward passes of one image
    relative  pixels over those of one look at the input size, which is about how time compares
    images    looks over all images
    """
    looks = sum(1 + one.flip for one in passes)
    pixels = sum((1 + one.flip) * _sides(one)[0] * _sides(one)[1] for one in passes)
    return {"looks": looks, "relative": pixels / input_size**2, "images": looks * num_images}


def describe_cost(passes: Sequence[Pass], *, input_size: int, num_images: int) -> str:
    """`estimate_cost` in one line, to print before it starts."""
    cost = estimate_cost(passes, input_size=input_size, num_images=num_images)
    return (
        f"multi-scale: {len(passes)} passes, {cost['looks']:.0f} looks at each of {num_images} images "
        f"({cost['images']:.0f} in all), about {cost['relative']:.1f} times the single-scale time"
    )


def multiscale_piece(
    model: RefineDet,
    shards: ShardSet,
    positions: Sequence[int],
    *,
    multiscale: Multiscale,
    autocast: torch.dtype | None = None,
) -> DetectionTable:
    """Detections of the samples at `positions`, merged over all passes. Otherwise as `detect_piece`."""
    return multiscale_samples(model, EvaluationSamples(shards, positions), shards.categories, multiscale, autocast)


def multiscale_samples(
    model: RefineDet,
    samples: Iterable[Sample],
    categories: Sequence[Category],
    multiscale: Multiscale,
    autocast: torch.dtype | None = None,
) -> DetectionTable:
    """As `multiscale_piece`, of any samples."""
    rule = resolve_merge(multiscale)
    num_looks = sum(1 + one.flip for one in resolve_passes(multiscale, model.config))
    tables = []
    for batch, found in look_many_times(model, samples, multiscale, autocast):
        merged = merge_boxes(rule, found.boxes, found.scores, found.labels, found.image, num_looks=num_looks)
        tables.append(as_table(Found(*merged), batch, categories))
    return DetectionTable.concatenate(tables)


def look_many_times(
    model: RefineDet, samples: Iterable[Sample], multiscale: Multiscale, autocast: torch.dtype | None = None
) -> Iterator[tuple[list[Sample], Found]]:
    """Batches of samples, and what all passes found in them, not merged yet."""
    passes = resolve_passes(multiscale, model.config)
    with evaluating(model):
        for batch in batched(samples, multiscale.batch_size * _BATCHES_DECODED):
            looks = [found for one in passes for found in _look_once(model, batch, one, multiscale, autocast)]
            yield (
                batch,
                Found(
                    torch.cat([one.boxes for one in looks]),
                    torch.cat([one.scores for one in looks]),
                    torch.cat([one.labels for one in looks]),
                    torch.cat([one.image for one in looks]),
                ),
            )


def _look_once(
    model: RefineDet, samples: Sequence[Sample], one: Pass, multiscale: Multiscale, autocast: torch.dtype | None
) -> list[Found]:
    """One pass over samples, in batches of one size; `image` is the place in `samples`."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for place, sample in enumerate(samples):
        height, width = sample.image.shape[:2]
        sides = _sides(one)
        by_size.setdefault(sides if width >= height else (sides[1], sides[0]), []).append(place)
    num_images = max(1, multiscale.batch_size // (1 + one.flip))
    parts = []
    for size, places in by_size.items():
        for start in range(0, len(places), num_images):
            chosen = places[start : start + num_images]
            images = [samples[place].image for place in chosen]
            found = look(model, images, size, config=model.config, flip=one.flip, autocast=autocast)
            sides = found.boxes[:, 2:] - found.boxes[:, :2] + 1  # the authors count inclusive pixels here
            fits = torch.ones(len(sides), dtype=torch.bool)
            if one.min_side_below is not None:
                fits &= sides.amin(1) < one.min_side_below
            if one.max_side_above is not None:
                fits &= sides.amax(1) > one.max_side_above
            found = found.select(fits.nonzero().squeeze(1))
            parts.append(Found(found.boxes, found.scores, found.labels, torch.tensor(chosen)[found.image]))
    return parts


def _sides(one: Pass) -> tuple[int, int]:
    """Height and width for landscape images."""
    return one.size if isinstance(one.size, tuple) else (one.size, one.size)


def _recipe(multiscale: Multiscale) -> Recipe | None:
    if multiscale.recipe is None:
        return None
    if multiscale.recipe not in RECIPES:
        raise UserError(f"multiscale.recipe must be one of {', '.join(sorted(RECIPES))}, received {multiscale.recipe}")
    return RECIPES[multiscale.recipe]
