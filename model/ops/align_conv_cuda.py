"""The backward of AlignConv on a GPU: columns gathered and scattered by kernels, matrix products in ATen.

Legend: F channels, N rows (anchors that are computed), K kernel side, T = K * K taps, O outputs. A group is one aspect
of one level: the rows that share filters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .align_conv_reference import split_index

# Bounds the columns alive at once: rows * T * F * 4 bytes, 75 MB for 8192 rows of 9 taps and 256 channels in fp32.
ROWS_PER_CHUNK = 8192


def align_conv_backward(
    grad: Tensor,
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    index: Tensor,
    weight: list[Tensor],
    features_grad: bool,
    filters_grad: bool,
    deterministic: bool,
) -> list[Tensor]:
    """Gradients of the features (where asked for), then of the weights and of the biases (where asked for).

    Rows without a gradient are skipped, which takes a look at their number: the host waits once.
    """
    aspects, outputs, channels, kernel = weight[0].shape[:4]
    sizes = [(feature.shape[0], feature.shape[2], feature.shape[3]) for feature in features]
    pixels = [batch * height * width for batch, height, width in sizes]
    cells = grad.new_zeros(sum(pixels) if features_grad else 0, channels, dtype=torch.float32)
    filters = grad.new_zeros(len(features), aspects, outputs, kernel * kernel * channels, dtype=torch.float32)
    bias = grad.new_zeros(len(features), aspects, outputs, dtype=torch.float32)

    rows, counts = _rows_by_group(grad, features, index, aspects)
    for group, chosen in enumerate(rows.split(counts)):
        level, aspect = divmod(group, aspects)
        turned = weight[level][aspect].permute(0, 2, 3, 1).reshape(outputs, -1)
        for chunk in chosen.split(ROWS_PER_CHUNK):
            place = (features, strides, boxes[chunk], index[chunk], aspects, kernel)
            here = grad[chunk]
            if filters_grad:
                filters[level, aspect] += here.T @ operators().align_conv_columns(*place)
                bias[level, aspect] += here.sum(dim=0, dtype=torch.float32)
            if features_grad:
                _scatter(cells, (here @ turned).float(), place, deterministic)

    gradients = []
    if features_grad:
        for part, (batch, height, width) in zip(cells.split(pixels), sizes, strict=True):
            gradients.append(part.view(batch, height, width, channels).permute(0, 3, 1, 2).to(grad.dtype))
    if filters_grad:
        turned_back = filters.view(len(features), aspects, outputs, kernel, kernel, channels).permute(0, 1, 2, 5, 3, 4)
        gradients += turned_back.to(grad.dtype).contiguous().unbind()
        gradients += bias.to(grad.dtype).unbind()
    return gradients


def operators():
    """The kernels around the products; the tests put the kernels' bodies on the host in their place."""
    return torch.ops.refinedet


def _rows_by_group(grad: Tensor, features: list[Tensor], index: Tensor, aspects: int) -> tuple[Tensor, list[int]]:
    """Rows that have a gradient, group after group, and the number of each group."""
    anchors = sum(feature.shape[2] * feature.shape[3] for feature in features) * aspects
    used = (grad != 0).any(dim=1) & (index >= 0) & (index < features[0].shape[0] * anchors)
    rows = torch.nonzero(used).squeeze(1)
    level, _, aspect = split_index(index[rows], features, aspects)
    group = level * aspects + aspect
    order = group.sort(stable=True).indices
    numbers = torch.arange(len(features) * aspects, device=group.device)
    counts = (group[:, None] == numbers).sum(dim=0).tolist()
    return rows[order], counts


def _scatter(cells: Tensor, columns: Tensor, place: tuple, deterministic: bool) -> None:
    """Add columns [n, T * F] to the cells [pixels, F]; deterministically in the order of a stable sort by pixel."""
    if not deterministic:
        operators().align_conv_scatter(cells, columns, *place)
        return
    pixels, weights = operators().align_conv_targets(*place)
    pixels, order = pixels.sort(stable=True)
    operators().align_conv_scatter_sorted(cells, columns, pixels, order, weights)
