"""The loss of RefineDet++: equation 1, with hard negative mining (section IV-E).

    L = 1/N_arm * ( sum_i L_b(p_i, [l*_i >= 1]) + sum_i [l*_i >= 1] L_r(x_i, g*_i) )
      + 1/N_adm * ( sum_i L_m(c_i, l*_i)        + sum_i [l*_i >= 1] L_r(t_i, g*_i) )

Of anchor i, the ARM predicts the logits p_i (object or not) and the deltas x_i; the ADM predicts the logits c_i of the
classes and the deltas t_i. l*_i is the class of the box that it matches (0: none), g*_i are the deltas to that box.
The ADM's anchors are the refined ones, which are matched anew: each line has its own l* and g*.

N counts the positive anchors of the whole global batch. L_b and L_m are cross entropy over the positives and the mined
negatives, L_r is smooth L1 over the positives. Four functions are the parts: `matching.match_anchors`,
`mine_negatives`, `classification_loss` and `box_loss`.

A process that holds a part of the global batch computes `sum_losses` for each part, adds up `LossSums.positives` over
all parts and processes, and calls `LossSums.divide` with the total. `detection_loss` does both for a batch that is
whole.

B images, A anchors per image, C classes with background, N rows that the ADM computed, P of them positive
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import encode_boxes
from .config import RefineDetConfig
from .filtering import select_survivors, share_by_level
from .matching import match_anchors
from .structures import AnyTargets, Losses, LossSums, Matches, Predictions, Targets, as_targets


def detection_loss(
    predictions: Predictions,
    targets: Sequence[AnyTargets],
    config: RefineDetConfig,
    positives: Tensor | None = None,
) -> Losses:
    """Both modules' classification and regression losses, divided by their positives.

    positives  [2], of the ARM and of the ADM, over the whole global batch; None: the positives of `targets`
    """
    return sum_losses(predictions, targets, config).divide(positives)


def sum_losses(predictions: Predictions, targets: Sequence[AnyTargets], config: RefineDetConfig) -> LossSums:
    """The four sums of equation 1 and the positives that divide them.

    The ARM learns (object or not, deltas to the tiled anchors); the ADM learns (class, deltas to the refined anchors,
    which are matched anew). An image without objects adds nothing, and neither does an anchor that the ARM filtered,
    unless it is positive. `loss_normalization: arm` counts the ARM's positives for both.

    targets  of each image: `Targets`, or torchvision's dicts with `boxes` and `labels`
    """
    p = predictions
    unseen = p.matches is None  # else the forward pass has validated them
    targets = as_targets(targets, config.num_classes, batch=p.refined.shape[0], validate=unseen)
    zero = p.adm_class.new_zeros(())
    arm = _ModuleSums(zero, zero, zero)
    if p.arm_class is not None and p.arm_box is not None:
        matches = match_anchors(p.anchors, targets, config.arm_iou, binary=True)
        rows = _ModuleRows(p.arm_class.flatten(0, 1), p.arm_box.flatten(0, 1), None)
        arm = _sum_module(rows, matches, matches.labels == 0, p.anchors, targets, config.negatives_per_positive)

    matches = p.matches or match_anchors(p.refined, targets, config.adm_iou)
    eligible = matches.labels == 0
    survivors = None
    if p.arm_class is not None:
        survivors = select_survivors(p.arm_class, config.theta)
        eligible = eligible & survivors
    rows = _ModuleRows(p.adm_class, p.adm_box, p.index)
    adm = _sum_module(rows, matches, eligible, p.refined, targets, config.negatives_per_positive)
    by_arm = config.loss_normalization == "arm" and p.arm_class is not None
    return LossSums(
        arm_class=arm.entropy,
        arm_box=arm.smooth_l1,
        adm_class=adm.entropy,
        adm_box=adm.smooth_l1,
        positives=torch.stack([arm.positives, arm.positives if by_arm else adm.positives]),
        survivors=None if survivors is None else share_by_level(survivors, p.level_anchors),
        rows=zero.new_full((), len(p.adm_class) / matches.labels.numel()),
    )


class _ModuleRows(NamedTuple):
    """Predictions of one module.

    logits  [N, C]
    deltas  [N, 4]
    anchor  [N]     image * A + anchor of each row; None: every anchor, N = B * A
    """

    logits: Tensor
    deltas: Tensor
    anchor: Tensor | None

    def of_rows(self, values: Tensor) -> Tensor:
        """[B, A] -> [N]"""
        return values.flatten() if self.anchor is None else values.flatten()[self.anchor]

    def of_anchors(self, values: Tensor, like: Tensor, missing: float) -> Tensor:
        """[N] -> [B, A], as `like` has it; anchors without a row get `missing`."""
        if self.anchor is None:
            return values.view_as(like)
        return values.new_full((like.numel(),), missing).scatter_(0, self.anchor, values).view_as(like)


class _ModuleSums(NamedTuple):
    """One line of equation 1 before division; scalars."""

    entropy: Tensor
    smooth_l1: Tensor
    positives: Tensor


def _sum_module(
    rows: _ModuleRows,
    matches: Matches,
    eligible: Tensor,
    anchors: Tensor,
    targets: Sequence[Targets],
    ratio: float,
) -> _ModuleSums:
    """Sums of one module: mine its negatives, then add up what equation 1 has for it.

    eligible  [B, A]  negatives that may be mined
    anchors   [A, 4] or [B, A, 4]  what the deltas are relative to
    """
    labels = rows.of_rows(matches.labels)
    entropy = F.cross_entropy(rows.logits.float(), labels.clamp(min=0), reduction="none")

    # A negative's entropy is that against background. Mining compares the anchors of an image; those without a row
    # come last.
    hardness = rows.of_anchors(entropy.detach(), like=eligible, missing=-torch.inf)
    count = (matches.labels > 0).sum(dim=1)
    mined = mine_negatives(hardness, eligible, count, ratio)

    positive = (labels > 0).nonzero().squeeze(1)
    place = positive if rows.anchor is None else rows.anchor[positive]
    return _ModuleSums(
        entropy=classification_loss(entropy, labels > 0, rows.of_rows(mined)),
        smooth_l1=box_loss(rows.deltas[positive].float(), *_matched_pairs(place, matches, anchors, targets)),
        positives=count.sum().to(entropy.dtype),
    )


def classification_loss(entropy: Tensor, positive: Tensor, mined: Tensor) -> Tensor:
    """L_b or L_m: the sum over positives and mined negatives of their cross entropy [N]."""
    return torch.where(positive | mined, entropy, 0.0).sum()


def box_loss(deltas: Tensor, boxes: Tensor, anchors: Tensor) -> Tensor:
    """L_r: the sum of smooth L1 between predicted and wanted deltas of the positives.

    deltas   [P, 4]  predicted, relative to `anchors`
    boxes    [P, 4]  the object that each positive matches, xyxy pixels
    anchors  [P, 4]  xyxy pixels
    """
    return F.smooth_l1_loss(deltas, encode_boxes(boxes, anchors), reduction="sum")


def mine_negatives(hardness: Tensor, eligible: Tensor, positives: Tensor, ratio: float) -> Tensor:
    """The hardest eligible negatives of each image, at most `int(ratio * positives)` of them.

    hardness   [B, A]  cross entropy against background, read where eligible; equals are taken in the anchors' order
    eligible   [B, A]  bool
    positives  [B]     matched anchors of each image
    returns    [B, A]  bool
    """
    count = torch.minimum((positives.double() * ratio).long(), eligible.sum(dim=1))
    order = hardness.masked_fill(~eligible, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    taken = torch.arange(hardness.shape[1], device=hardness.device) < count[:, None]
    return torch.zeros_like(eligible).scatter_(1, order, taken) & eligible


def _matched_pairs(
    place: Tensor, matches: Matches, anchors: Tensor, targets: Sequence[Targets]
) -> tuple[Tensor, Tensor]:
    """Box and anchor, [P, 4] each, of the positives at `place` = image * A + anchor."""
    num_anchors = matches.labels.shape[1]
    image, anchor = place // num_anchors, place % num_anchors
    first_box = torch.tensor([0, *[len(target.labels) for target in targets][:-1]], device=place.device).cumsum(0)
    boxes = torch.cat([target.boxes for target in targets]).to(place.device)
    wanted = boxes[first_box[image] + matches.boxes[image, anchor]]
    return wanted, anchors[anchor] if anchors.dim() == 2 else anchors[image, anchor]
