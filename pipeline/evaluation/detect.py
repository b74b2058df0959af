"""Detect on images of a data set: boxes in original pixels, categories by their original ids.

Pure functions of (model, shards, positions): whoever calls them decides where and how often.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from pipeline.evaluation.detections import DetectionTable
from pipeline.spec import Evaluation

if TYPE_CHECKING:
    from model import RefineDet
    from pipeline.data import ShardSet


def detect_piece(
    model: RefineDet,
    shards: ShardSet,
    positions: Sequence[int],
    *,
    evaluation: Evaluation,
    autocast: torch.dtype | None = None,
) -> DetectionTable:
    """Detections of the samples at `positions`, at the model's input size.

    Boxes are scaled back to the original image and clipped to it. `evaluation.merge` replaces the model's own
    suppression. The model's device is used; it is put into evaluation mode, and back.
    """
    raise NotImplementedError
