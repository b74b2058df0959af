"""Box arithmetic: deltas (section III-C) and overlap (the Jaccard index of section IV-D).

A anchors, G boxes; boxes are xyxy in pixels, computed in fp32, under autocast too
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The network predicts deltas divided by these variances, as SSD and the Caffe release do.
VARIANCES = (0.1, 0.1, 0.2, 0.2)

# A side changes by at most this factor. The Caffe release has no bound; a fresh network without one can
# predict sides that overflow, and then the ADM's targets are not finite.
MAX_SIDE_CHANGE = 1000.0


def encode_boxes(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Deltas that turn `anchors` into `boxes`; inverse of `decode_boxes`.

    boxes    [..., 4]  xyxy, pixels, of positive area
    anchors  [..., 4]  xyxy, pixels, of positive area
    returns  [..., 4]  (dx, dy, dw, dh), divided by the variances, fp32
    """
    boxes, anchors = boxes.float(), anchors.float()
    sides = anchors[..., 2:] - anchors[..., :2]
    near, far = (boxes - anchors).chunk(2, dim=-1)  # corner by corner: coordinates around 1000 cancel without a loss
    shift = 0.5 * (near + far) / sides
    growth = (far - near) / sides
    variances = boxes.new_tensor(VARIANCES)
    return torch.cat([shift, growth.log1p()], dim=-1) / variances


def decode_boxes(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Apply anchor-relative deltas; inverse of `encode_boxes`. Nothing is clipped to the image.

    deltas   [..., 4]  (dx, dy, dw, dh), divided by the variances
    anchors  [..., 4]  xyxy, pixels
    returns  [..., 4]  xyxy, pixels, fp32
    """
    near, far = anchors.float().chunk(2, dim=-1)
    shift, growth = deltas.float().chunk(2, dim=-1)
    sides, bound = far - near, math.log(MAX_SIDE_CHANGE)
    growth = (VARIANCES[2] * growth).clamp(-bound, bound).expm1()
    near = near.addcmul(shift, sides, value=VARIANCES[0]).addcmul(growth, sides, value=-0.5)
    far = far.addcmul(shift, sides, value=VARIANCES[0]).addcmul(growth, sides, value=0.5)
    return torch.cat([near, far], dim=-1)


def paired_overlaps(boxes: Tensor, anchors: Tensor) -> Tensor:
    """IoU of every box with every anchor, in [0, 1]; 0 for boxes without area.

    boxes    [..., G, 4]  xyxy
    anchors  [..., A, 4]  xyxy
    returns  [..., G, A]  fp32
    """
    boxes, anchors = boxes.float(), anchors.float()
    left, top, right, bottom = (side.unsqueeze(-1) for side in boxes.unbind(-1))
    a_left, a_top, a_right, a_bottom = (side.unsqueeze(-2) for side in anchors.unbind(-1))
    width = (torch.minimum(right, a_right) - torch.maximum(left, a_left)).clamp_(min=0)
    height = (torch.minimum(bottom, a_bottom) - torch.maximum(top, a_top)).clamp_(min=0)
    intersection = width.mul_(height)
    union = (right - left) * (bottom - top) + (a_right - a_left) * (a_bottom - a_top) - intersection
    return (intersection / union.clamp_(min=1e-12)).clamp_(max=1)
