"""The synthetic data set: shapes on textured backgrounds, drawn on the spot from a seed, in COCO's terms.

Ten classes with sparse ids, which differ in outline, typical colour and fill. 1 to 5 objects per image, small to large,
some elongated, some overlapping; now and then a crowd of tiny ones. Small networks learn it in minutes on a CPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np
from refinedet.pipeline.data.randomness import keyed_generator


class Shape(NamedTuple):
    name: str
    outline: str
    hue: int
    """OpenCV's degrees, 0..179"""
    saturation: int
    fill: str
    aspect: float = 1.0
    """longer over shorter side"""


# By category id.
SHAPES = {
    1: Shape("disc", "disc", 0, 220, "plain"),
    2: Shape("square", "square", 112, 210, "checks"),
    3: Shape("triangle", "triangle", 60, 200, "stripes"),
    5: Shape("star", "star", 28, 230, "plain"),
    7: Shape("ring", "ring", 140, 170, "plain"),
    13: Shape("cross", "cross", 12, 230, "plain"),
    17: Shape("bar", "bar", 92, 220, "bands", 3.6),
    44: Shape("hexagon", "hexagon", 165, 110, "dots"),
    62: Shape("leaf", "leaf", 42, 210, "stripes", 2.0),
    90: Shape("heart", "heart", 155, 220, "plain"),
}
_CROWD_PROBABILITY = 0.04
_FINER = 4
_SHIFT = 4  # fixed-point bits of the polygon corners


class Drawing(NamedTuple):
    image: np.ndarray
    """uint8 [H, W, 3] BGR"""
    annotations: list[dict[str, Any]]
    """in COCO's terms, without ids; crowds with RLE, the others with polygons"""


def draw_shapes(seed: int, part: str, index: int, image_size: int) -> Drawing:
    """Draw image `index` of a part; a pure function of its arguments."""
    height, width = choose_image_size(seed, part, index, image_size)
    rng = keyed_generator("shapes", seed, part, index)
    image = draw_background(rng, height, width)
    owner = np.zeros((height, width), np.uint8)  # which object a pixel shows, 0: none
    objects: list[dict[str, Any]] = []
    boxes: list[tuple[float, float, float, float]] = []
    if rng.random() < _CROWD_PROBABILITY:
        objects.append(_draw_crowd(rng, image, owner, boxes))
    sizes = sorted((_object_size(rng) for _ in range(rng.choice(5, p=[0.15, 0.25, 0.25, 0.2, 0.15]) + 1)), reverse=True)
    for size in sizes:
        category_id = int(rng.choice(list(SHAPES)))
        for _ in range(12):
            outline = place_outline(rng, SHAPES[category_id], size * min(height, width), height, width)
            box = extent_of(outline)
            if all(overlap_of(box, other) <= 0.3 for other in boxes):
                paint_shape(rng, image, owner, len(objects) + 1, SHAPES[category_id], outline)
                boxes.append(box)
                objects.append(describe_object(category_id, box, outline))
                break
    settle_areas(objects, owner)
    grain = rng.integers(0, 11, image.shape, dtype=np.uint8)
    return Drawing(cv2.subtract(cv2.add(image, grain), np.full_like(image, 5)), objects)


def choose_image_size(seed: int, part: str, index: int, longer: int) -> tuple[int, int]:
    shorter = (longer, longer * 3 // 4, longer * 7 // 8)[int(keyed_generator("size", seed, part, index).integers(3))]
    return (shorter, longer) if index % 2 else (longer, shorter)


def encode_jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


def draw_background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Soft muted blotches, a grain, and a few faint lines."""
    coarse = rng.normal(0, 1, (5, 5, 3)) * 12 + rng.uniform(70, 165) + rng.uniform(-14, 14, 3)
    fine = rng.normal(0, 1, (24, 24, 1)) * rng.uniform(3, 10)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    image += cv2.resize(fine, (width, height), interpolation=cv2.INTER_CUBIC)[..., None]
    image = np.clip(image, 0, 255).astype(np.uint8)
    for _ in range(rng.integers(0, 5)):
        ends = (rng.random((2, 2)) * (width, height) * 2**_SHIFT).astype(int)
        tone = image[rng.integers(height), rng.integers(width)].astype(int) + rng.integers(-25, 26)
        colour = tuple(int(value) for value in np.clip(tone, 0, 255))
        cv2.line(image, ends[0].tolist(), ends[1].tolist(), colour, int(rng.integers(1, 3)), cv2.LINE_AA, _SHIFT)
    return image


def _object_size(rng: np.random.Generator) -> float:
    """Longer side over the image's shorter side."""
    low, high = (0.08, 0.14) if rng.random() < 0.1 else (0.16, 0.6)
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def place_outline(rng: np.random.Generator, shape: Shape, size: float, height: int, width: int) -> np.ndarray:
    """Corners [N, 2] of a shape somewhere in the image, whole or nearly so."""
    aspect = shape.aspect * rng.uniform(0.85, 1.15)
    if shape.aspect > 1:
        size = min(1.3 * size, 0.9 * min(height, width))
    scale = np.array([size, size / aspect]) / 2
    points = _OUTLINES[shape.outline] * scale
    angle = np.deg2rad(rng.uniform(-12, 12) + (90 if shape.aspect > 1 and rng.random() < 0.5 else 0))
    points = points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    low, high = points.min(0), points.max(0)
    room = np.array([width, height]) - (high - low)
    corner = room * np.clip(rng.uniform(-0.03, 1.03, 2), 0, 1)
    return points - low + corner


def paint_shape(
    rng: np.random.Generator, image: np.ndarray, owner: np.ndarray, number: int, shape: Shape, outline: np.ndarray
) -> None:
    """Draw a shape into `image` and its number into `owner`, both in place."""
    height, width = owner.shape
    x1, y1 = np.maximum(np.floor(outline.min(0)).astype(int) - 1, 0)
    x2, y2 = np.minimum(np.ceil(outline.max(0)).astype(int) + 2, (width, height))
    # Drawn finer and averaged: OpenCV's own anti-aliasing makes shapes half a pixel larger than their outline.
    corners = np.round(((outline - (x1, y1)) * _FINER - 0.5) * 2**_SHIFT).astype(np.int32)
    fine = np.zeros(((y2 - y1) * _FINER, (x2 - x1) * _FINER), np.uint8)
    parts = [corners]
    if shape.outline == "ring":
        middle = corners.mean(0)
        parts.append(np.round((corners - middle) * 0.5 + middle).astype(np.int32))
    cv2.fillPoly(fine, parts, 255, cv2.LINE_8, _SHIFT)
    mask = cv2.resize(fine, (x2 - x1, y2 - y1), interpolation=cv2.INTER_AREA)
    fill = _fill(rng, shape, mask.shape)
    region = image[y1:y2, x1:x2]
    alpha = (mask.astype(np.float32) / 255)[..., None]
    region[:] = (region * (1 - alpha) + fill * alpha + 0.5).astype(np.uint8)
    owner[y1:y2, x1:x2][mask > 127] = number


def _fill(rng: np.random.Generator, shape: Shape, size: tuple[int, ...]) -> np.ndarray:
    """float32 [h, w, 3] BGR of a shape's colour and pattern, lit from one side."""
    height, width = size
    hue = (shape.hue + rng.integers(-5, 6)) % 180
    saturation = np.clip(shape.saturation + rng.integers(-30, 26), 0, 255)
    value = rng.integers(175, 246)
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None]
    light = 1 - 0.25 * (x / width * np.float32(rng.uniform(-1, 1)) + y / height)
    period = max(4.0, max(size) / rng.uniform(3.5, 5.0))
    phase = rng.uniform(0, period)
    if shape.fill == "dots":
        centred = [(axis + phase) % period - period / 2 for axis in (x, y)]
        light -= 0.45 * (centred[0] ** 2 + centred[1] ** 2 < (period * 0.28) ** 2)
    elif shape.fill != "plain":
        columns, rows = (np.floor((axis + phase) / (period / 2)) for axis in (x, y))
        across = columns if width > height else rows
        light -= 0.45 * ({"checks": columns + rows, "stripes": rows, "bands": across}[shape.fill] % 2)
    colour = cv2.cvtColor(np.array([[[hue, saturation, value]]], np.uint8), cv2.COLOR_HSV2BGR)[0, 0]
    return np.minimum(light[..., None] * colour.astype(np.float32), 255)


def _draw_crowd(
    rng: np.random.Generator, image: np.ndarray, owner: np.ndarray, boxes: list[tuple[float, float, float, float]]
) -> dict[str, Any]:
    """A heap of tiny shapes of one class, annotated as one region."""
    height, width = owner.shape
    category_id = int(rng.choice([1, 2, 5, 44]))
    side = 0.45 * min(height, width)
    corner = rng.random(2) * (np.array([width, height]) - side)
    for _ in range(14):
        outline = _OUTLINES[SHAPES[category_id].outline] * side * 0.11
        paint_shape(rng, image, owner, 1, SHAPES[category_id], outline + corner + side * rng.uniform(0.12, 0.88, 2))
    y, x = np.nonzero(owner)
    box = (float(x.min()), float(y.min()), float(x.max() + 1), float(y.max() + 1))
    boxes.append(box)
    entry = describe_object(category_id, box, np.empty((0, 2)))
    return {**entry, "iscrowd": 1, "segmentation": _encode_mask(owner == 1)}


def _encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO's uncompressed RLE: lengths of runs down the columns, zeros first."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [0]])
    edges = np.concatenate([[0], np.nonzero(np.diff(flat))[0], [mask.size]])
    counts = np.diff(edges).tolist()
    return {"size": list(mask.shape), "counts": counts if counts[-1] else counts[:-1]}


def describe_object(category_id: int, box: tuple[float, float, float, float], outline: np.ndarray) -> dict[str, Any]:
    x1, y1, x2, y2 = (round(value, 2) for value in box)
    return {
        "category_id": category_id,
        "bbox": [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)],
        "area": 0.0,
        "iscrowd": 0,
        "segmentation": [np.round(outline, 2).ravel().tolist()],
    }


def settle_areas(objects: list[dict[str, Any]], owner: np.ndarray) -> None:
    """`area` is what is seen of an object."""
    counts = np.bincount(owner.ravel(), minlength=len(objects) + 1)
    for number, entry in enumerate(objects, start=1):
        entry["area"] = float(counts[number])


def extent_of(outline: np.ndarray) -> tuple[float, float, float, float]:
    (x1, y1), (x2, y2) = outline.min(0), outline.max(0)
    return float(x1), float(y1), float(x2), float(y2)


def overlap_of(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over the smaller of two boxes."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))


def _polar(count: int, radii: tuple[float, ...] = (1.0,), start: float = -90.0) -> np.ndarray:
    angles = np.deg2rad(start + np.arange(count) * 360 / count)
    radius = np.resize(radii, count)
    return np.stack([np.cos(angles) * radius, np.sin(angles) * radius], 1)


def _unit(points: np.ndarray) -> np.ndarray:
    """Stretched to fill [-1, 1] both ways."""
    low, high = points.min(0), points.max(0)
    return (points - low) / (high - low) * 2 - 1


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], 1)


def _leaf() -> np.ndarray:
    t = np.linspace(-1, 1, 24)
    half = np.cos(t * np.pi / 2)
    return np.concatenate([np.stack([t, half], 1), np.stack([t, -half], 1)[::-1][1:-1]])


_ARM = 0.36
_OUTLINES = {
    "disc": _unit(_polar(40)),
    "square": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float),
    "triangle": np.array([[0, -1], [1, 1], [-1, 1]], float),
    "star": _unit(_polar(10, (1.0, 0.45))),
    "ring": _unit(_polar(40)),
    "cross": np.array(
        [[-_ARM, -1], [_ARM, -1], [_ARM, -_ARM], [1, -_ARM], [1, _ARM], [_ARM, _ARM],
         [_ARM, 1], [-_ARM, 1], [-_ARM, _ARM], [-1, _ARM], [-1, -_ARM], [-_ARM, -_ARM]], float
    ),
    "bar": np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]], float),
    "hexagon": _unit(_polar(6, start=0.0)),
    "leaf": _unit(_leaf()),
    "heart": _unit(_heart()),
}  # fmt: skip
