"""OpenCV's resize of an image with a border around it, for a fraction of the work where that is slow.

An image that was expanded up to four times is mostly border, and Lanczos and area interpolation take OpenCV 5 to 20 ms
for such a canvas. Both are sums of a few weighted columns and then of a few weighted rows, so the canvas need not be
made: border counts as one more line, and a line of the view that shows nothing else is not computed.

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
        return np.full((size, size, 3), colour, np.uint8)
    top, bottom, left, right = border
    height, width = top + image.shape[0] + bottom, left + image.shape[1] + right
    # Where a side grows, OpenCV's area interpolation is a kind of linear one.
    by_area = interpolation == cv2.INTER_AREA and any(border) and min(height, width) >= size
    if by_area or interpolation == cv2.INTER_LANCZOS4:
        taps_of = area_taps if by_area else lanczos_taps
        rows = _Lines.of(*taps_of(size, height), before=top, inside=image.shape[0], extent=height)
        columns = _Lines.of(*taps_of(size, width), before=left, inside=image.shape[1], extent=width)
        return _resample(image, rows, columns, colour, size)
    if any(border):
        image = cv2.copyMakeBorder(image, *border, cv2.BORDER_CONSTANT, value=colour)
    return cv2.resize(image, (size, size), interpolation=interpolation)


def lanczos_taps(size: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of `extent` lines make up each of `size`, and their relative weights: [S, K] both.

    Lines before the first and after the last stand for those.
    """
    centre = (np.arange(size) + 0.5) * (extent / size) - 0.5
    taps = np.floor(centre).astype(np.int32)[:, None] + np.arange(-3, 5, dtype=np.int32)
    distance = (centre[:, None] - taps).astype(np.float32)
    return taps, np.sinc(distance) * np.sinc(distance / 4)


def area_taps(size: int, extent: int) -> tuple[np.ndarray, np.ndarray]:
    """The same for the mean over the area that a line of the view covers; extent >= size."""
    edges = np.arange(size + 1) * (extent / size)
    taps = edges[:-1].astype(np.int32)[:, None] + np.arange(math.ceil(extent / size) + 1, dtype=np.int32)
    covered = np.minimum(taps + 1, edges[1:, None]) - np.maximum(taps, edges[:-1, None])
    return taps, np.maximum(covered, 0).astype(np.float32)


@dataclass(frozen=True)
class _Lines:
    """Of what the view's lines `first` .. `last` - 1 are sums; those around show border alone."""

    first: int
    last: int
    taps: Tensor
    """int32 [T, K]; the line after the image's last is border"""
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
            showing = np.flatnonzero(~outside.all(1))
            first, last = (int(showing[0]), int(showing[-1]) + 1) if len(showing) else (0, 0)
        return cls(first, last, torch.from_numpy(taps[first:last]), torch.from_numpy(weights[first:last]))

    def __call__(self, lines: np.ndarray) -> np.ndarray:
        """Weighted sums [T, N, 3] of lines [L, N, 3]."""
        table = torch.from_numpy(lines).flatten(1)
        sums = embedding_bag(self.taps, table, mode="sum", per_sample_weights=self.weights)
        return sums.view(-1, *lines.shape[1:]).numpy()


def _resample(image: np.ndarray, rows: _Lines, columns: _Lines, colour: tuple[int, int, int], size: int) -> np.ndarray:
    height, width, _ = image.shape
    by_column = np.empty((width + 1, height, 3), np.float32)
    by_column[:-1] = cv2.transpose(image)
    by_column[-1] = colour
    by_column = columns(by_column)
    by_row = np.empty((height + 1, len(by_column), 3), np.float32)
    cv2.transpose(by_column, dst=by_row[:-1])
    by_row[-1] = colour
    view = cv2.convertScaleAbs(cv2.max(rows(by_row), 0))  # rounds, and ends at 255
    around = (rows.first, size - rows.last, columns.first, size - columns.last)
    return cv2.copyMakeBorder(view, *around, cv2.BORDER_CONSTANT, value=colour) if any(around) else view
