"""AP in the middle of training, on W ranks, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from pipeline.evaluation.coco import CocoMetrics
from pipeline.evaluation.truth import GroundTruth
from pipeline.spec import Evaluation

if TYPE_CHECKING:
    from model import RefineDet
    from pipeline.data import ShardSet


def validate(
    model: RefineDet,
    shards: ShardSet,
    truth: GroundTruth,
    *,
    rank: int,
    world_size: int,
    all_gather: Callable[[Any], list[Any]],
    evaluation: Evaluation,
    autocast: torch.dtype | None = None,
) -> CocoMetrics:
    """Metrics over all samples, each detected by exactly one rank; every rank returns the same.

    `all_gather` returns the objects of all ranks on every rank (torch.distributed.all_gather_object, or [x] alone).
    It is called once, also by a rank that failed: then every rank raises, naming the failed one.
    """
    raise NotImplementedError
