"""Negative anchor filtering (section III-B).

B images, A anchors per image
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .structures import Matches


def select_survivors(arm_class: Tensor, theta: float) -> Tensor:
    """Anchors whose negative confidence does not exceed theta.

    arm_class  [B, A, 2]  logits (background, object)
    returns    [B, A]     bool; all true at theta 1
    """
    if theta >= 1.0:
        return torch.ones_like(arm_class[..., 0], dtype=torch.bool)
    scores = arm_class.detach().float()
    # Of two classes, softmax is the sigmoid of the difference; the object's side keeps its digits near theta = 1.
    return torch.sigmoid(scores[..., 1] - scores[..., 0]) >= 1.0 - theta


def share_by_level(survivors: Tensor, level_anchors: Sequence[int]) -> Tensor:
    """Share of each level's anchors that survive: [B, A] bool -> [levels], fp32."""
    return torch.stack([level.float().mean() for level in torch.split(survivors, list(level_anchors), dim=1)])


def select_trained_rows(survivors: Tensor | None, matches: Matches) -> Tensor:
    """Anchors that the ADM's loss can use: every positive, and the surviving negatives of images that have one.

    Filtering removes negatives only; a positive stays however sure the ARM is that it is background.

    survivors  [B, A] or None: all
    returns    [B, A] bool
    """
    positive = matches.labels > 0
    negative = (matches.labels == 0) & positive.any(dim=1, keepdim=True)
    return positive | (negative if survivors is None else negative & survivors)
