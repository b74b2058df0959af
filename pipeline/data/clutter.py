"""The harder drawn set: 20 classes, many objects of all sizes, before and inside one another, and marks of no class.

Each outline comes plain and patterned, which are two classes; its colour is random. Six objects per image
on average, a third of them shorter than a fifth of the image.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from refinedet.pipeline.data.randomness import keyed_generator
from refinedet.pipeline.data.shapes import (
    SHAPES,
    Drawing,
    choose_image_size,
    describe_object,
    draw_background,
    extent_of,
    overlap_of,
    paint_shape,
    place_outline,
    settle_areas,
)

_PATTERNS = ("checks", "stripes", "bands", "dots")
# By category id.
CLUTTER = {
    **{number: shape._replace(fill="plain") for number, shape in enumerate(SHAPES.values(), start=1)},
    **{
        number: shape._replace(name=f"patterned {shape.name}", fill=_PATTERNS[number % 4])
        for number, shape in enumerate(SHAPES.values(), start=len(SHAPES) + 1)
    },
}
_SIZES = ((0.1, 0.2), (0.2, 0.4), (0.4, 0.8))
"""longer side over the image's shorter side: small, medium, large"""
_SIZE_SHARES = (0.34, 0.4, 0.26)
_MEAN_OBJECTS, _MOST_OBJECTS = 6.5, 16
_MAX_OVERLAP = 0.45
"""of the smaller of two boxes, unless one object lies on one much larger"""
_MUCH_SMALLER = 0.25
"""in area"""
_MIN_SEEN = 0.1
"""of an object's box; one that is hidden further is excluded from the truth"""
_ATTEMPTS = 12


def draw_clutter(seed: int, part: str, index: int, image_size: int) -> Drawing:
    """Draw image `index` of a part; a pure function of its arguments."""
    height, width = choose_image_size(seed, part, index, image_size)
    rng = keyed_generator("clutter", seed, part, index)
    image = draw_background(rng, height, width)
    _draw_marks(rng, image)
    owner = np.zeros((height, width), np.uint8)  # which object a pixel shows, 0: none
    objects: list[dict[str, Any]] = []
    boxes: list[tuple[float, float, float, float]] = []
    count = min(int(rng.geometric(1 / _MEAN_OBJECTS)), _MOST_OBJECTS)
    # Roughly the largest first, so that most small objects are in front.
    for size in sorted(_draw_sizes(rng, count), key=lambda size: -size * rng.uniform(0.6, 1.6)):
        category_id = int(rng.integers(1, len(CLUTTER) + 1))
        shape = CLUTTER[category_id]
        for _ in range(_ATTEMPTS):
            outline = place_outline(rng, shape, size * min(height, width), height, width)
            box = extent_of(outline)
            if all(_may_overlap(box, other) for other in boxes):
                painted = shape._replace(hue=int(rng.integers(180)), saturation=int(rng.integers(60, 230)))
                paint_shape(rng, image, owner, len(objects) + 1, painted, outline)
                boxes.append(box)
                objects.append(describe_object(category_id, box, outline))
                break
    settle_areas(objects, owner)
    seen = [entry for entry in objects if entry["area"] >= _MIN_SEEN * entry["bbox"][2] * entry["bbox"][3]]
    grain = rng.normal(0, 5, image.shape)
    return Drawing(np.clip(image + grain, 0, 255).astype(np.uint8), seen)


def _draw_sizes(rng: np.random.Generator, count: int) -> list[float]:
    ranges = [_SIZES[int(kind)] for kind in rng.choice(3, count, p=_SIZE_SHARES)]
    return [float(np.exp(rng.uniform(np.log(low), np.log(high)))) for low, high in ranges]


def _may_overlap(box: tuple[float, ...], before: tuple[float, ...]) -> bool:
    """Return whether an object may be painted over one that was painted before."""
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (box, before)]
    return areas[0] < _MUCH_SMALLER * areas[1] or overlap_of(box, before) <= _MAX_OVERLAP


def _draw_marks(rng: np.random.Generator, image: np.ndarray) -> None:
    """Lines, arcs and open corners of any colour, which belong to no class."""
    height, width = image.shape[:2]
    for _ in range(rng.integers(0, 13)):
        colour = tuple(int(value) for value in rng.integers(20, 236, 3))
        points = (rng.random((3, 2)) * (width, height)).astype(int)
        thickness = int(rng.integers(1, 4))
        kind = rng.integers(3)
        if kind == 0:
            cv2.line(image, points[0].tolist(), points[1].tolist(), colour, thickness, cv2.LINE_AA)
        elif kind == 1:
            axes = (rng.uniform(0.04, 0.3, 2) * min(height, width)).astype(int)
            start = float(rng.uniform(0, 360))
            end = start + float(rng.uniform(60, 200))
            cv2.ellipse(image, points[0].tolist(), axes.tolist(), 0.0, start, end, colour, thickness, cv2.LINE_AA)
        else:
            corner = points[0] + (rng.uniform(-0.3, 0.3, (3, 2)) * min(height, width)).astype(int)
            cv2.polylines(image, [corner], False, colour, thickness, cv2.LINE_AA)
