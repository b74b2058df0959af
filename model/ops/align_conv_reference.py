"""AlignConv in plain PyTorch: the operator's oracle, and its stand-in where the library is not built.

Legend: B images, F channels, H W cells of a level, N rows (anchors that are computed), K kernel side, O outputs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

# Bounds the samples alive at once: rows * K * K * F * 4 bytes, 19 MB for 2048 rows of 9 taps and 256 channels.
REFERENCE_ROWS = 2048


def align_conv_reference(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    rows: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    *,
    box_gradient: bool = False,
) -> Tensor:
    """Same contract as `align_conv`; differentiable to features, weight and bias by autograd.

    box_gradient  let the gradient reach the boxes through the bilinear weights too; for checking only
    """
    if not box_gradient:
        boxes = boxes.detach()
    accumulate = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    boxes = boxes.to(accumulate)
    aspects, outputs, _, kernel, _ = weight[0].shape
    level, aspect, image = split_rows(rows, features, aspects)
    places: list[Tensor] = []
    values: list[Tensor] = []
    for position, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        cells = feature.permute(0, 2, 3, 1).to(accumulate)
        for shape in range(aspects):
            # [O, F, K, K] -> [K*K*F, O]: taps outside, channels inside, like the samples.
            filters = weight[position][shape].permute(2, 3, 1, 0).flatten(0, 2).to(accumulate)
            offset = bias[position][shape].to(accumulate)
            chosen = torch.nonzero((level == position) & (aspect == shape)).squeeze(1)
            # At least one chunk, so that a group without rows still gives its filters a gradient (of zero).
            for chunk in torch.split(chosen, REFERENCE_ROWS) if chosen.numel() else (chosen,):
                y, x = sample_points(boxes[chunk], kernel, stride)
                samples = _bilinear(cells, image[chunk], y, x)
                places.append(chunk)
                values.append(torch.addmm(offset, samples.flatten(1), filters))
    output = values[0].new_zeros(rows.shape[0], outputs)
    return output.index_copy(0, torch.cat(places), torch.cat(values)).to(features[0].dtype)


def split_rows(rows: Tensor, features: Sequence[Tensor], aspects: int) -> tuple[Tensor, Tensor, Tensor]:
    """Level, aspect and image of each row, [N] int64; the level of an empty row is -1.

    rows  [N]  numbers of anchors in the order (level, aspect, image, y, x)
    """
    batch = features[0].shape[0]
    sizes = [feature.shape[-2] * feature.shape[-1] for feature in features]
    ends = list(itertools.accumulate(batch * aspects * size for size in sizes))
    level = torch.zeros_like(rows)
    rest, cells = rows.clone(), torch.full_like(rows, sizes[0])
    for position, start in enumerate(ends[:-1], start=1):
        here = rows >= start
        level = level + here
        rest = torch.where(here, rows - start, rest)
        cells = torch.where(here, sizes[position], cells)
    image = rest // cells
    empty = (rows < 0) | (rows >= ends[-1])
    return torch.where(empty, -1, level), image // batch, image % batch


def sample_points(boxes: Tensor, kernel: int, stride: int) -> tuple[Tensor, Tensor]:
    """Centres of the KxK equal parts of each box, in cells of the level: (y, x), [N, K*K], row by row."""
    parts = (torch.arange(kernel, device=boxes.device, dtype=boxes.dtype) + 0.5) / kernel
    corner, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
    points = (corner + size * parts[:, None]) / stride - 0.5  # [N, K, (x, y)]
    x = points[:, None, :, 0].expand(-1, kernel, -1)
    y = points[:, :, None, 1].expand(-1, -1, kernel)
    return y.flatten(1), x.flatten(1)


def _bilinear(cells: Tensor, image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Values of cells [B, H, W, F] at (y, x) [N, T] of the images [N] -> [N, T, F]; a corner off the map counts 0."""
    batch, height, width, _ = cells.shape
    flat = cells.reshape(batch * height * width, -1)
    samples = flat.new_zeros(*y.shape, flat.shape[1])
    top, left = y.detach().floor(), x.detach().floor()
    for corner_y in (top, top + 1):
        for corner_x in (left, left + 1):
            # False for NaN too: such a sample is outside every map.
            inside = (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
            share = torch.where(inside, (1 - (y - corner_y).abs()) * (1 - (x - corner_x).abs()), 0)
            row, column = torch.where(inside, corner_y, 0).long(), torch.where(inside, corner_x, 0).long()
            samples = samples + flat[(image[:, None] * height + row) * width + column] * share[..., None]
    return samples
