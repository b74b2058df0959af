"""Anchors tiled over the image (section IV-C).

A anchors, in the order level, y, x, aspect; xyxy, pixels of the network input
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

ASPECTS = (1.0, 2.0, 0.5)  # width / height, in the order of the Caffe release
SCALE = 4  # an anchor's side is 4S, S the stride of its level


def tile_anchors(height: int, width: int, strides: Sequence[int]) -> Tensor:
    """One scale and three aspect ratios centred in every cell, not clipped to the image.

    height, width  of the network input, pixels; multiples of every stride
    returns        [A, 4]  xyxy, pixels, fp32
    """
    levels: list[Tensor] = []
    for stride in strides:
        ys = (torch.arange(height // stride, dtype=torch.float64) + 0.5) * stride
        xs = (torch.arange(width // stride, dtype=torch.float64) + 0.5) * stride
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        centres = torch.stack([x, y], dim=-1)[:, :, None]
        root = torch.tensor(ASPECTS, dtype=torch.float64).sqrt()
        half = 0.5 * SCALE * stride * torch.stack([root, 1 / root], dim=-1)
        levels.append(torch.cat([centres - half, centres + half], dim=-1).reshape(-1, 4))
    return torch.cat(levels).float()


def count_anchors(height: int, width: int, strides: Sequence[int]) -> tuple[int, ...]:
    """Anchors of each level."""
    return tuple((height // stride) * (width // stride) * len(ASPECTS) for stride in strides)


def order_rows(batch: int, height: int, width: int, strides: Sequence[int]) -> Tensor:
    """The anchors of a batch in the order (level, aspect, image, y, x), in which AlignConv computes rows.

    returns  [B * A + 1]  image * A + anchor at each place, int64; the last place, of empty rows, holds B * A
    """
    counts = count_anchors(height, width, strides)
    images = torch.arange(batch)[None, :, None] * sum(counts)
    places: list[Tensor] = []
    start = 0
    for count in counts:
        own = torch.arange(start, start + count).view(-1, len(ASPECTS))
        places.append((own.T[:, None] + images).flatten())
        start += count
    return torch.cat([*places, torch.tensor([batch * start])])
