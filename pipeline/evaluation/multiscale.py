"""Multi-scale testing: every image looked at in several sizes, aspects and mirrored, and the boxes merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pipeline.evaluation.detections import DetectionTable
from pipeline.spec import MergeRule, Multiscale, Pass

if TYPE_CHECKING:
    from model import RefineDet
    from pipeline.data import ShardSet


def resolve_passes(multiscale: Multiscale, *, coarsest_stride: int) -> tuple[Pass, ...]:
    """The passes of the recipe or the job's own; UserError where a size does not fit the model's strides."""
    raise NotImplementedError


def resolve_merge(multiscale: Multiscale) -> MergeRule:
    """The job's merge rule, or the recipe's: vote for VOC, soft voting for COCO."""
    raise NotImplementedError


def estimate_cost(passes: Sequence[Pass], *, input_size: int, num_images: int) -> dict[str, float]:
    """What multi-scale testing costs: {"looks": forward images each, "relative": times the single-scale cost, ...}."""
    raise NotImplementedError


def describe_cost(passes: Sequence[Pass], *, input_size: int, num_images: int) -> str:
    """`estimate_cost` in one line, to print before it starts."""
    raise NotImplementedError


def multiscale_piece(
    model: RefineDet,
    shards: ShardSet,
    positions: Sequence[int],
    *,
    multiscale: Multiscale,
    autocast: torch.dtype | None = None,
) -> DetectionTable:
    """Detections of the samples at `positions`, merged over all passes. Otherwise as `detect_piece`."""
    raise NotImplementedError
