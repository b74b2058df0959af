"""Which anchor answers for which box (section IV-D).

B images, A anchors an image, G boxes (padded to the largest count of the batch), K candidates a box

First every box takes an anchor of its own, the pair of highest IoU first (bipartite matching); then every anchor
left over takes the box it overlaps most, if by `positive_iou` or more. Equal overlaps go to the lower anchor, then to
the lower box, as in the Caffe release's loops. To keep that order on any device, and to compare a whole batch at
once, a pair's (IoU, anchor, box) is packed into one integer whose order is the order of preference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .boxes import paired_overlaps
from .structures import Matches, Targets

MIN_BIPARTITE_IOU = 1e-6
ANCHOR_BITS, BOX_BITS = 21, 12
PAIRS_AT_ONCE = 2**24  # bounds the memory of a crowded batch; an IoU matrix of this size takes 64 MiB


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
            f"matching holds fewer than {2**ANCHOR_BITS} anchors and {2**BOX_BITS} boxes an image, "
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

    keys = _pack(paired_overlaps(boxes, anchors))
    best = keys.amax(dim=1)
    best_iou, _, matched = _unpack(best)
    labels = torch.where(best_iou >= iou[1], classes.gather(1, matched), torch.where(best_iou < iou[0], 0, -1))

    owner = _match_bipartite(keys)
    matched = torch.where(owner >= 0, owner, matched)
    return torch.where(owner >= 0, classes.gather(1, matched), labels), matched


def _match_bipartite(keys: Tensor) -> Tensor:
    """Give every box the best anchor that is still free, the best pair first; the box of each anchor, -1 for none.

    Two shortcuts, neither of which changes the result. A box only ever gets one of its G best anchors, for the other
    boxes take at most G - 1. And a pair that is the best for its box and for its anchor alike will be taken whatever
    is taken before it; so each round takes all such pairs at once, and a few rounds do (each waits for the device).

    keys     [B, G, A]
    returns  [B, A]
    """
    num_images, num_boxes, num_anchors = keys.shape
    owner = torch.full((num_images, num_anchors), -1, dtype=torch.int64, device=keys.device)
    candidates = keys.topk(min(num_boxes, num_anchors), dim=2).values
    overlap, anchor, _ = _unpack(candidates)
    candidates = candidates.masked_fill_(overlap <= MIN_BIPARTITE_IOU, 0).flatten(1)
    anchor = anchor.flatten(1)
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


def _pack(overlaps: Tensor) -> Tensor:
    """[B, G, A] IoU -> int64 keys; the bits of a positive float order like the float."""
    _, num_boxes, num_anchors = overlaps.shape
    anchor = 2**ANCHOR_BITS - 1 - torch.arange(num_anchors, device=overlaps.device)
    box = 2**BOX_BITS - 1 - torch.arange(num_boxes, device=overlaps.device)
    place = (anchor[None, :] << BOX_BITS) | box[:, None]
    return (overlaps.contiguous().view(torch.int32).long() << (ANCHOR_BITS + BOX_BITS)).bitwise_or_(place)


def _unpack(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys -> (IoU, anchor, box)."""
    overlaps = (keys >> (ANCHOR_BITS + BOX_BITS)).int().view(torch.float32)
    anchor = 2**ANCHOR_BITS - 1 - ((keys >> BOX_BITS) & (2**ANCHOR_BITS - 1))
    box = 2**BOX_BITS - 1 - (keys & (2**BOX_BITS - 1))
    return overlaps, anchor, box
