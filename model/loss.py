"""The loss of RefineDet++: equation 1, with hard negative mining (section IV-E).

B images, A anchors an image, C classes with background, N rows that the ADM computed, P of them positive
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import encode_boxes
from .config import RefineDetConfig
from .filtering import select_survivors
from .matching import match_anchors
from .structures import Losses, Matches, Predictions, Targets


def detection_loss(predictions: Predictions, targets: Sequence[Targets], config: RefineDetConfig) -> Losses:
    """Both modules' classification and regression losses.

    The ARM learns (object or not, deltas to the tiled anchors); the ADM learns (class, deltas to the refined anchors,
    which are matched anew). Each is a sum over its positives and its mined negatives, divided by its positives
    (`loss_normalization: arm` divides both by the ARM's). An image without objects adds nothing, and neither does an
    anchor that the ARM filtered, unless it is positive.
    """
    p = predictions
    zero = p.adm_class.new_zeros(())
    arm_class = arm_box = arm_positives = zero
    if p.arm_class is not None and p.arm_box is not None:
        matches = match_anchors(p.anchors, targets, config.arm_iou, binary=True)
        arm_class, arm_box, arm_positives = _module_loss(
            p.arm_class.flatten(0, 1), p.arm_box.flatten(0, 1), None, matches, matches.labels == 0, p.anchors, targets,
            config.negatives_per_positive,
        )  # fmt: skip

    matches = p.matches or match_anchors(p.refined, targets, config.adm_iou)
    eligible = matches.labels == 0
    if p.arm_class is not None:
        eligible = eligible & select_survivors(p.arm_class, config.theta)
    adm_class, adm_box, adm_positives = _module_loss(
        p.adm_class, p.adm_box, p.index, matches, eligible, p.refined, targets, config.negatives_per_positive
    )

    by_arm = config.loss_normalization == "arm" and p.arm_class is not None
    arm_count = arm_positives.clamp(min=1)
    adm_count = arm_count if by_arm else adm_positives.clamp(min=1)
    return Losses(arm_class / arm_count, arm_box / arm_count, adm_class / adm_count, adm_box / adm_count)


def _module_loss(
    logits: Tensor,
    deltas: Tensor,
    index: Tensor | None,
    matches: Matches,
    eligible: Tensor,
    anchors: Tensor,
    targets: Sequence[Targets],
    ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """One module's sums: (cross entropy, smooth L1, number of positives).

    logits    [N, C]     rows of the module, fp32
    deltas    [N, 4]
    index     [N]        image * A + anchor of each row; None: N = B * A
    eligible  [B, A]     negatives that may be mined
    anchors   [A, 4] or [B, A, 4]  what the deltas are relative to
    """
    logits, deltas = logits.float(), deltas.float()
    row_labels = matches.labels.flatten() if index is None else matches.labels.flatten()[index]
    positive_rows = (row_labels > 0).nonzero().squeeze(1)
    entropy = F.cross_entropy(logits, row_labels.clamp(min=0), reduction="none")

    hardness = entropy.detach()
    if index is not None:
        hardness = hardness.new_full((matches.labels.numel(),), -torch.inf).scatter_(0, index, hardness)
    negatives = mine_negatives(hardness.view_as(eligible), eligible, (matches.labels > 0).sum(dim=1), ratio).flatten()
    chosen = (row_labels > 0) | (negatives if index is None else negatives[index])
    class_loss = torch.where(chosen, entropy, 0.0).sum()

    place = positive_rows if index is None else index[positive_rows]
    num_anchors = matches.labels.shape[1]
    image, anchor = place // num_anchors, place % num_anchors
    first_box = torch.tensor([0, *[len(target.labels) for target in targets][:-1]], device=place.device).cumsum(0)
    boxes = torch.cat([target.boxes for target in targets]).to(place.device)
    wanted = boxes[first_box[image] + matches.boxes[image, anchor]]
    reference = anchors[anchor] if anchors.dim() == 2 else anchors[image, anchor]
    box_loss = F.smooth_l1_loss(deltas[positive_rows], encode_boxes(wanted, reference), reduction="sum")
    return class_loss, box_loss, (matches.labels > 0).sum()


def mine_negatives(hardness: Tensor, eligible: Tensor, positives: Tensor, ratio: float) -> Tensor:
    """The hardest eligible negatives of each image, at most `int(ratio * positives)` of them.

    hardness   [B, A]  cross entropy against background; the order among equals is that of the anchors
    eligible   [B, A]  bool
    positives  [B]     matched anchors of each image
    returns    [B, A]  bool
    """
    count = torch.minimum((positives.double() * ratio).long(), eligible.sum(dim=1))
    order = hardness.masked_fill(~eligible, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    taken = torch.arange(hardness.shape[1], device=hardness.device) < count[:, None]
    return torch.zeros_like(eligible).scatter_(1, order, taken) & eligible
