"""Multi-scale testing: detection in several views of every image (sizes, aspects, mirrored), whose boxes are merged.

An image is decoded once for all passes. Passes are batched by the size they warp to. Exactly square images are turned
as portrait ones, as by the release's `h < w`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import torch
from refinedet.model import RefineDet
from refinedet.pipeline.config.recipes import resolve_passes, resolve_selection, sides_of
from refinedet.pipeline.config.spec import MergeRule, Multiscale, Pass
from refinedet.pipeline.data.samples import Category, Sample
from refinedet.pipeline.inference.detect import Found, as_table, batched, detect_view, evaluating
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.inference.merging import merge_boxes

_BATCHES_DECODED = 4  # images held at once, in batches: enough to fill batches of landscape and of portrait ones


def detect_samples_by_rules(
    model: RefineDet,
    samples: Iterable[Sample],
    categories: Sequence[Category],
    multiscale: Multiscale,
    rules: Mapping[str, MergeRule],
    autocast: torch.dtype | None = None,
) -> dict[str, DetectionTable]:
    """Detections of samples by each rule; the views of an image are computed once for all rules."""
    num_views = sum(1 + one.flip for one in resolve_passes(multiscale, model.config))
    tables: dict[str, list[DetectionTable]] = {name: [] for name in rules}
    for batch, found in detect_batches_in_views(model, samples, multiscale, autocast):
        for name, rule in rules.items():
            merged = merge_boxes(rule, found.boxes, found.scores, found.labels, found.image, num_views=num_views)
            tables[name].append(as_table(Found(*merged), batch, categories))
    return {name: DetectionTable.concatenate(parts) for name, parts in tables.items()}


def detect_batches_in_views(
    model: RefineDet, samples: Iterable[Sample], multiscale: Multiscale, autocast: torch.dtype | None = None
) -> Iterator[tuple[list[Sample], Found]]:
    """Batches of samples, and what all passes found in them, not merged yet."""
    with evaluating(model):
        for batch in batched(samples, multiscale.batch_size * _BATCHES_DECODED):
            yield batch, detect_in_views(model, [sample.image for sample in batch], multiscale, autocast)


def detect_in_views(
    model: RefineDet, images: Sequence[np.ndarray], multiscale: Multiscale, autocast: torch.dtype | None = None
) -> Found:
    """Detections of all passes over images, uint8 [H, W, 3], not merged yet."""
    passes = resolve_passes(multiscale, model.config)
    views = [found for one in passes for found in _detect_in_pass(model, images, one, multiscale, autocast)]
    return Found(
        torch.cat([one.boxes for one in views]),
        torch.cat([one.scores for one in views]),
        torch.cat([one.labels for one in views]),
        torch.cat([one.image for one in views]),
    )


def _detect_in_pass(
    model: RefineDet, images: Sequence[np.ndarray], one: Pass, multiscale: Multiscale, autocast: torch.dtype | None
) -> list[Found]:
    """One pass over images, in batches of one size; `image` is the place in `images`."""
    config = resolve_selection(multiscale, model.config)
    by_size: dict[tuple[int, int], list[int]] = {}
    for place, image in enumerate(images):
        height, width = image.shape[:2]
        sides = sides_of(one)
        by_size.setdefault(sides if height < width else (sides[1], sides[0]), []).append(place)
    num_images = max(1, multiscale.batch_size // (1 + one.flip))
    parts = []
    for size, places in by_size.items():
        for start in range(0, len(places), num_images):
            chosen = places[start : start + num_images]
            shown = [images[place] for place in chosen]
            found = detect_view(model, shown, size, config=config, flip=one.flip, autocast=autocast)
            sides = found.boxes[:, 2:] - found.boxes[:, :2] + 1  # the authors count inclusive pixels here
            fits = torch.ones(len(sides), dtype=torch.bool)
            if one.min_side_below is not None:
                fits &= sides.amin(1) < one.min_side_below
            if one.max_side_above is not None:
                fits &= sides.amax(1) > one.max_side_above
            found = found.select(fits.nonzero().squeeze(1))
            parts.append(Found(found.boxes, found.scores, found.labels, torch.tensor(chosen)[found.image]))
    return parts
