"""OpenCV's resize of an image with a border around it, for a fraction of the work where that is much.

An image that was expanded up to four times is mostly border, and for such a canvas Lanczos and area interpolation take
OpenCV 5 to 20 ms. All interpolations are sums of a few weighted columns and then of a few weighted rows, so the canvas
need not be made: border counts as one more line, and lines of the view that show nothing else are not computed.

S side of the view, H W pixels of the image, K taps of the interpolation, T lines of the view that show the image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

Border = tuple[int, int, int, int]
"""pixels above, below, left and right of the image, as `cv2.copyMakeBorder` takes them"""


def resize_bordered(
    image: np.ndarray, border: Border, colour: tuple[int, int, int], size: int, interpolation: int
) -> np.ndarray:
    """The image uint8 [H, W, 3] with its border, resized to [S, S, 3] as `cv2.resize` does, to one level."""
    if not image.size:
        return cv2.merge([np.full((size, size), level, np.uint8) for level in colour])
    top, bottom, left, right = border
    height, width = top + image.shape[0] + bottom, left + image.shape[1] + right
    if _is_slow(interpolation, any(border), height, width, size):
        rows = _Lines.of(*find_taps(interpolation, size, height), before=top, inside=image.shape[0], extent=height)
        columns = _Lines.of(*find_taps(interpolation, size, width), before=left, inside=image.shape[1], extent=width)
        return _resample(image, rows, columns, colour, size)
    if any(border):
        image = cv2.copyMakeBorder(image, *border, cv2.BORDER_CONSTANT, value=colour)
    return cv2.resize(image, (size, size), interpolation=interpolation)


def _is_slow(interpolation: int, bordered: bool, height: int, width: int, size: int) -> bool:
    """Return whether OpenCV would take longer, as measured."""
    if interpolation == cv2.INTER_LANCZOS4:
        return True
    if interpolation == cv2.INTER_AREA:  # where a side grows, OpenCV takes a kind of linear interpolation instead
        return bordered and min(height, width) >= size
    return bordered and height * width > 4 * size**2


def find_taps(interpolation: int, size: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which of `extent` lines make up each of `size`, and their relative weights: [S, K] both.

    Lines before the first and after the last stand for those.
    """
    if interpolation == cv2.INTER_NEAREST_EXACT:
        numbers = np.arange(extent, dtype=np.float32)[:, None]  # OpenCV rounds in its own way: have it choose of these
        taps = cv2.resize(numbers, (1, size), interpolation=interpolation)
        return taps.astype(np.int64), np.ones((size, 1), np.float32)
    if interpolation == cv2.INTER_AREA:  # what of each line the view's covers; extent >= size
        edges = np.arange(size + 1) * (extent / size)
        taps = edges[:-1].astype(np.int64)[:, None] + np.arange(math.ceil(extent / size) + 1)
        covered = np.minimum(taps + 1, edges[1:, None]) - np.maximum(taps, edges[:-1, None])
        return taps, np.maximum(covered, 0).astype(np.float32)
    num_taps, weigh = _KERNELS[interpolation]
    centre = (np.arange(size) + 0.5) * (extent / size) - 0.5
    taps = np.floor(centre).astype(np.int64)[:, None] + np.arange(1 - num_taps // 2, 1 + num_taps // 2)
    return taps, weigh(np.abs(centre[:, None] - taps).astype(np.float32))


def _weigh_cubic(distance: np.ndarray) -> np.ndarray:
    near = (1.25 * distance - 2.25) * distance**2 + 1
    far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
    return np.where(distance < 1, near, far)


_KERNELS = {
    cv2.INTER_LINEAR: (2, lambda distance: 1 - distance),
    cv2.INTER_CUBIC: (4, _weigh_cubic),
    cv2.INTER_LANCZOS4: (8, lambda distance: np.sinc(distance) * np.sinc(distance / 4)),
}


@dataclass(frozen=True)
class _Lines:
    """Sums for the view's lines `first` .. `last` - 1; those around them show border alone."""

    first: int
    last: int
    taps: Tensor
    """int64 [T, K]; the line after the image's last is border"""
    weights: Tensor
    """float32 [T, K]"""

    @classmethod
    def of(cls, taps: np.ndarray, weights: np.ndarray, *, before: int, inside: int, extent: int) -> _Lines:
        weights /= weights.sum(1, keepdims=True)
        taps = np.minimum(np.maximum(taps, 0), extent - 1) - before
        first, last = 0, len(taps)
        if inside < extent:
            outside = (taps < 0) | (taps >= inside)
            taps[outside] = inside
            showing = np.flatnonzero(~outside.all(1)) if not outside.all() else [0]  # one line at least
            first, last = int(showing[0]), int(showing[-1]) + 1
        return cls(first, last, torch.from_numpy(taps[first:last]), torch.from_numpy(weights[first:last]))

    def sum(self, lines: np.ndarray) -> np.ndarray:
        """Weighted sums [T, N, 3] of lines [L, N, 3]."""
        table = torch.from_numpy(lines).flatten(1)
        sums = embedding_bag(self.taps, table, mode="sum", per_sample_weights=self.weights)
        return sums.view(-1, *lines.shape[1:]).numpy()


def _resample(image: np.ndarray, rows: _Lines, columns: _Lines, colour: tuple[int, int, int], size: int) -> np.ndarray:
    height, width, _ = image.shape
    by_column = np.empty((width + 1, height, 3), np.float32)
    by_column[:-1], by_column[-1] = cv2.transpose(image), colour
    by_column = columns.sum(by_column)
    by_row = np.empty((height + 1, len(by_column), 3), np.float32)
    by_row[:-1], by_row[-1] = cv2.transpose(by_column), colour
    _, view = cv2.threshold(rows.sum(by_row), 0, 0, cv2.THRESH_TOZERO)
    view = cv2.convertScaleAbs(view)  # rounds, and ends at 255
    around = (rows.first, size - rows.last, columns.first, size - columns.last)
    return cv2.copyMakeBorder(view, *around, cv2.BORDER_CONSTANT, value=colour) if any(around) else view
