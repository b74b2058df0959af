"""AlignConv as gather, matrix product and scatter: its forward on a CPU, and its backward everywhere.

Legend: B images, F channels, H W cells of a level, N rows (anchors that are computed), K kernel side, T = K * K taps,
O outputs. A group is one aspect of one level: the rows that share filters.
"""

# torch's `tolist` is typed in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds the columns alive at once, rows * T * F numbers: in the caches of a CPU, 9 MB for 256 channels in fp32.
ROWS_PER_CHUNK = {"cpu": 1024, "cuda": 16384}

Place = tuple[Sequence[Tensor], Sequence[int], Tensor, Tensor, int, int]
"""features, strides, boxes, rows, aspects and kernel side: the operators' arguments that place samples"""


def group_bounds(features: Sequence[Tensor], aspects: int) -> list[int]:
    """First row number of each group, and the number of all rows."""
    sizes = [feature.shape[0] * feature.shape[2] * feature.shape[3] for feature in features for _ in range(aspects)]
    return [0, *itertools.accumulate(sizes)]


def align_conv_forward(
    features: list[Tensor], strides: list[int], boxes: Tensor, rows: Tensor, weight: list[Tensor], bias: list[Tensor]
) -> Tensor:
    """Forward pass of `align_conv` for features on a CPU."""
    aspects, outputs, _, kernel = weight[0].shape[:4]
    if len(rows) and (rows[0] < 0 or (rows[1:] < rows[:-1]).any()):
        raise ValueError("align_conv: rows must be ascending numbers from 0 on, received others.")
    rows = rows.contiguous()
    bounds = torch.tensor(group_bounds(features, aspects))
    starts = cast(list[int], torch.searchsorted(rows, bounds).tolist())
    output = features[0].new_empty(len(rows), outputs)
    output[starts[-1] :] = 0  # empty rows
    matrices = [_as_matrix(own) for filters in weight for own in filters.unbind()]
    biases = [own for level in bias for own in level.unbind()]
    for part, groups in _divide(starts, ROWS_PER_CHUNK["cpu"]):
        columns = torch.ops.refinedet.align_conv_columns(features, strides, boxes[part], rows[part], aspects, kernel)
        products = [_multiply(columns[here], matrices[group], biases[group]) for group, here in groups]
        torch.cat(products, out=output[part])
        del columns  # the next ones take its place in the caches
    return output


def _divide(starts: Sequence[int], size: int) -> Iterator[tuple[slice, list[tuple[int, slice]]]]:
    """Cut rows into parts of at most `size`: each part, with its groups and where in the part each one lies.

    A product arranges its filters first, so groups are cut as rarely as possible: only those beyond `size`, evenly.
    """
    part: list[tuple[int, int, int]] = []  # group, first row, end
    for group, (start, end) in enumerate(itertools.pairwise(starts)):
        pieces = -(-(end - start) // size)
        for piece in range(pieces):
            first, last = (start + (end - start) * edge // pieces for edge in (piece, piece + 1))
            if part and last - part[0][1] > size:
                yield _place_in_part(part)
                part = []
            part.append((group, first, last))
    if part:
        yield _place_in_part(part)


def _place_in_part(part: list[tuple[int, int, int]]) -> tuple[slice, list[tuple[int, slice]]]:
    first = part[0][1]
    return slice(first, part[-1][2]), [(group, slice(start - first, end - first)) for group, start, end in part]


def _multiply(columns: Tensor, filters: Tensor, bias: Tensor) -> Tensor:
    """columns [n, C] times filters [O, C], plus bias [O], on a CPU.

    In fp32 as a 1x1 convolution of n cells, which oneDNN computes with whatever the processor has. Torch's
    matrix product is MKL's: it leaves AVX-512 of other makers than Intel unused, and takes twice as long there.
    The convolution's sums depend on the number of threads, so that the deterministic mode does without; so do few rows,
    which take less time than arranging their filters for oneDNN.
    """
    few = len(columns) <= 32
    if few or columns.dtype != torch.float32 or torch.are_deterministic_algorithms_enabled():
        return torch.addmm(bias, columns, filters.T)
    cells = columns[None, None].permute(0, 3, 1, 2)  # [1, C, 1, n], channels inside
    missing = -len(bias) % 16  # whole vectors of outputs take less time than masked ones
    filters, bias = F.pad(filters, (0, 0, 0, missing)), F.pad(bias, (0, missing))
    return F.conv2d(cells, filters[:, :, None, None], bias)[0, : len(bias) - missing, 0].T


def align_conv_backward(
    grad: Tensor,
    features: list[Tensor],
    strides: list[int],
    boxes: Tensor,
    rows: Tensor,
    weight: list[Tensor],
    features_grad: bool,
    filters_grad: bool,
    deterministic: bool,
) -> list[Tensor]:
    """Gradients of the features (where asked for), then of the weights and of the biases (where asked for).

    Rows without a gradient are skipped: their number is the one thing that the host waits for. A filter without rows
    gets a gradient of zeros.
    """
    aspects, outputs, channels, kernel = weight[0].shape[:4]
    sums = torch.float64 if grad.dtype == torch.float64 else torch.float32
    pixels = [feature.shape[0] * feature.shape[2] * feature.shape[3] for feature in features]
    cells = grad.new_zeros(sum(pixels) if features_grad else 0, channels, dtype=sums)
    filters = grad.new_zeros(len(features) * aspects, outputs, kernel * kernel * channels, dtype=sums)
    bias = grad.new_zeros(len(features) * aspects, outputs, dtype=sums)

    chosen, starts = _rows_with_gradient(grad, rows, group_bounds(features, aspects))
    grad, boxes, rows = grad[chosen], boxes[chosen], rows[chosen]
    for part, groups in _divide(starts, ROWS_PER_CHUNK["cuda" if grad.is_cuda else "cpu"]):
        place = (features, strides, boxes[part], rows[part], aspects, kernel)
        columns = operators().align_conv_columns(*place) if filters_grad else None
        spread = grad.new_empty(part.stop - part.start, filters.shape[2]) if features_grad else None
        for group, here in groups:
            own = grad[part][here]
            if columns is not None:
                filters[group] += own.T @ columns[here]
                bias[group] += own.sum(dim=0, dtype=sums)
            if spread is not None:
                torch.mm(own, _as_matrix(weight[group // aspects][group % aspects]), out=spread[here])
        if spread is not None:
            _scatter(cells, spread, place, deterministic and grad.is_cuda)

    gradients: list[Tensor] = []
    if features_grad:
        for part, feature in zip(torch.split(cells, pixels), features, strict=True):
            batch, _, height, width = feature.shape
            own = part.view(batch, height, width, channels).permute(0, 3, 1, 2)
            gradients.append(own.to(grad.dtype, copy=True))  # results of an operator share no memory
    if filters_grad:
        shape = (len(features), aspects, outputs, kernel, kernel, channels)
        for sum_of_levels in (filters.view(shape).permute(0, 1, 2, 5, 3, 4), bias.view(shape[:3])):
            gradients += [own.to(grad.dtype, copy=True) for own in sum_of_levels]
    return gradients


def operators() -> Any:
    """The kernels around the products; the tests put the bodies of the GPU's kernels in their place."""
    return torch.ops.refinedet


def _as_matrix(filters: Tensor) -> Tensor:
    """[O, F, K, K] -> [O, T * F]: taps outside, channels inside, like the columns."""
    return filters.permute(0, 2, 3, 1).reshape(filters.shape[0], -1)


def _rows_with_gradient(grad: Tensor, rows: Tensor, bounds: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Rows whose gradient is not zero, in order, and where each group begins among them."""
    used = (grad != 0).any(dim=1) & (rows >= 0) & (rows < bounds[-1])
    before = torch.cat([used.new_zeros(1, dtype=torch.int64), used.cumsum(0)])
    places = torch.searchsorted(rows.contiguous(), torch.tensor(bounds, device=rows.device))
    starts = cast(list[int], before[places].tolist())
    return (~used).sort(stable=True).indices[: starts[-1]], starts


def _scatter(cells: Tensor, columns: Tensor, place: Place, deterministic: bool) -> None:
    """Add columns [n, T * F] to the cells [pixels, F]; where asked for, in one order on a GPU too."""
    if not deterministic:
        operators().align_conv_scatter(cells, columns, *place)
        return
    features, strides, boxes, rows, aspects, kernel = place
    from_taps = columns.view(-1, cells.shape[1]).to(cells.dtype)
    for pixel, share in find_corners(features, strides, boxes, rows, aspects, kernel):
        # Accumulation by index_put_ sorts, so that equal places add up in one order.
        cells.index_put_((pixel.flatten(),), from_taps * share.flatten()[:, None], accumulate=True)


def find_corners(
    features: Sequence[Tensor], strides: Sequence[int], boxes: Tensor, rows: Tensor, aspects: int, kernel: int
) -> list[tuple[Tensor, Tensor]]:
    """Return the four corners of every sample: each one's cell among those of all levels, and its weight; [n, T]."""
    bounds = torch.tensor(group_bounds(features, aspects)[::aspects], device=rows.device)
    level = torch.searchsorted(bounds, rows, right=True) - 1

    def numbers(of_levels: Sequence[int]) -> Tensor:
        return torch.tensor(of_levels, device=rows.device)[level][:, None]

    height, width = (numbers([feature.shape[side] for feature in features]) for side in (2, 3))
    batch = features[0].shape[0]
    cell = (rows - bounds[level])[:, None] % (batch * height * width)
    begin = bounds[level][:, None] // aspects + cell // (height * width) * height * width
    parts = (torch.arange(kernel, device=boxes.device, dtype=boxes.dtype) + 0.5) / kernel
    corner, size = boxes[:, None, :2], boxes[:, None, 2:] - boxes[:, None, :2]
    points = (corner + size * parts[:, None]) / numbers(strides)[..., None] - 0.5  # [n, K, (x, y)]
    x = points[:, None, :, 0].expand(-1, kernel, -1).flatten(1)
    y = points[:, :, None, 1].expand(-1, -1, kernel).flatten(1)
    found: list[tuple[Tensor, Tensor]] = []
    for corner_y in (y.floor(), y.floor() + 1):
        for corner_x in (x.floor(), x.floor() + 1):
            # False for NaN too: such a sample is outside every map.
            inside = (corner_y >= 0) & (corner_y < height) & (corner_x >= 0) & (corner_x < width)
            share = torch.where(inside, (1 - (y - corner_y).abs()) * (1 - (x - corner_x).abs()), 0)
            place = begin + torch.where(inside, corner_y, 0).long() * width + torch.where(inside, corner_x, 0).long()
            found.append((place, share))
    return found
