"""Assignment of anchors to boxes (section IV-D).

B images, A anchors per image, G boxes (padded to the largest count of the batch), K candidates a box

First every box takes an anchor of its own, the pair of highest IoU first (bipartite matching); then every anchor
left over takes the box it overlaps most, if by `positive_iou` or more. Equal overlaps go to the lower anchor, then to
the lower box, as in the Caffe release's loops. To keep that order on any device, and to compare a whole batch at
once, a pair's (IoU, anchor, box) is packed into one integer whose order is the order of preference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .boxes import paired_overlaps
from .structures import Matches, Targets

MIN_BIPARTITE_IOU = 1e-6
ANCHOR_BITS, BOX_BITS = 20, 13  # beside them the 30 bits of an IoU in [0, 1]: 63 in all
PAIRS_AT_ONCE = 2**22  # bounds the memory of a crowded batch: a pair's keys and its IoU take some 40 bytes


def match_anchors(
    anchors: Tensor, targets: Sequence[Targets], iou: tuple[float, float], *, binary: bool = False
) -> Matches:
    """Match the anchors of a batch to its boxes.

    anchors  [A, 4] shared by the images, or [B, A, 4]; xyxy pixels, unclipped
    iou      (negative below, positive from)
    binary   every object has label 1 (the ARM)
    """
    num_images, num_anchors = len(targets), anchors.shape[-2]
    labels = torch.zeros(num_images, num_anchors, dtype=torch.int64, device=anchors.device)
    matched = torch.zeros_like(labels)
    most = max((len(target.labels) for target in targets), default=0)
    if most == 0:
        return Matches(labels, matched)
    if num_anchors >= 2**ANCHOR_BITS or most >= 2**BOX_BITS:
        raise ValueError(
            f"matching holds fewer than {2**ANCHOR_BITS} anchors and {2**BOX_BITS} boxes per image, "
            f"received {num_anchors} and {most}."
        )
    step = max(1, PAIRS_AT_ONCE // (num_anchors * most))
    for start in range(0, num_images, step):
        part = slice(start, start + step)
        own = anchors if anchors.dim() == 2 else anchors[part]
        labels[part], matched[part] = _match_images(own, targets[part], iou, binary)
    return Matches(labels, matched)


@torch.no_grad()
def _match_images(
    anchors: Tensor, targets: Sequence[Targets], iou: tuple[float, float], binary: bool
) -> tuple[Tensor, Tensor]:
    most = max(1, max(len(target.labels) for target in targets))
    boxes = anchors.new_zeros(len(targets), most, 4, dtype=torch.float32)
    classes = torch.zeros(len(targets), most, dtype=torch.int64, device=anchors.device)
    for image, target in enumerate(targets):
        boxes[image, : len(target.boxes)] = target.boxes  # padding has no area, hence overlaps nothing
        classes[image, : len(target.labels)] = 1 if binary else target.labels

    best, candidates = _best_pairs(boxes, anchors)
    best_iou, _, matched = _unpack(best)
    labels = torch.where(best_iou >= iou[1], classes.gather(1, matched), torch.where(best_iou < iou[0], 0, -1))

    owner = _match_bipartite(candidates, anchors.shape[-2])
    matched = torch.where(owner >= 0, owner, matched)
    return torch.where(owner >= 0, classes.gather(1, matched), labels), matched


def _best_pairs(boxes: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of each anchor's best box [B, A], and of each box's best anchors [B, G, K], a part of the boxes at a time.

    A box only ever gets one of its G best anchors, for the other boxes take at most G - 1; and none that it does not
    overlap. K is the smaller bound.
    """
    num_images, num_boxes, num_anchors = *boxes.shape[:2], anchors.shape[-2]
    best = torch.zeros(num_images, num_anchors, dtype=torch.int64, device=anchors.device)
    most = min(num_boxes, num_anchors)
    parts: list[Tensor] = []
    step = max(1, PAIRS_AT_ONCE // (num_images * num_anchors))
    for start in range(0, num_boxes, step):
        overlaps = paired_overlaps(boxes[:, start : start + step], anchors)
        apart = overlaps <= MIN_BIPARTITE_IOU
        keys = _pack(overlaps, start)
        best = torch.maximum(best, keys.amax(dim=1))
        wanted = most if most <= 64 else min(most, num_anchors - int(apart.sum(dim=2).min()))
        parts.append(keys.masked_fill_(apart, 0).topk(max(1, wanted), dim=2).values)
    width = max(part.shape[2] for part in parts)
    return best, torch.cat([F.pad(part, (0, width - part.shape[2])) for part in parts], dim=1)


def _match_bipartite(candidates: Tensor, num_anchors: int) -> Tensor:
    """Give every box the best anchor that is still free, the best pair first; the box of each anchor, -1 for none.

    A pair that is the best for its box and for its anchor alike will be taken whatever is taken before it. Each round
    takes all such pairs at once, and a few rounds do (each waits for the device).

    candidates  [B, G, K]  keys of the anchors that a box may get, 0: none
    returns     [B, A]
    """
    num_images, num_boxes = candidates.shape[:2]
    owner = torch.full((num_images, num_anchors), -1, dtype=torch.int64, device=candidates.device)
    candidates = candidates.flatten(1)
    anchor = _unpack(candidates)[1].clamp_(max=num_anchors - 1)
    while True:
        best_of_box = candidates.view(num_images, num_boxes, -1).amax(dim=2)
        best_of_anchor = torch.zeros_like(owner).scatter_reduce_(1, anchor, candidates, "amax")
        _, wanted, box = _unpack(best_of_box)
        mutual = (best_of_box > 0) & (best_of_anchor.gather(1, wanted.clamp(max=num_anchors - 1)) == best_of_box)
        image, row = mutual.nonzero().unbind(1)
        if not len(row):  # the best of all remaining pairs is always mutual: none is left
            return owner
        owner[image, wanted[image, row]] = box[image, row]
        used = (owner.gather(1, anchor) >= 0).view(num_images, num_boxes, -1) | mutual[:, :, None]
        candidates = candidates.masked_fill(used.flatten(1), 0)


def _pack(overlaps: Tensor, first_box: int) -> Tensor:
    """[B, G, A] IoU -> int64 keys; the bits of a positive float order like the float."""
    _, num_boxes, num_anchors = overlaps.shape
    anchor = 2**ANCHOR_BITS - 1 - torch.arange(num_anchors, device=overlaps.device)
    box = 2**BOX_BITS - 1 - torch.arange(first_box, first_box + num_boxes, device=overlaps.device)
    place = (anchor[None, :] << BOX_BITS) | box[:, None]
    keys = overlaps.contiguous().view(torch.int32).long()
    return keys.bitwise_left_shift_(ANCHOR_BITS + BOX_BITS).bitwise_or_(place)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys -> (IoU, anchor, box)."""
    overlaps = (keys >> (ANCHOR_BITS + BOX_BITS)).int().view(torch.float32)
    anchor = 2**ANCHOR_BITS - 1 - ((keys >> BOX_BITS) & (2**ANCHOR_BITS - 1))
    box = 2**BOX_BITS - 1 - (keys & (2**BOX_BITS - 1))
    return overlaps, anchor, box
