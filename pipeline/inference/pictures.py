"""Pictures of boxes: detections or ground truth, drawn so that they can be read.

Small images are enlarged before drawing, so that lines and labels stay sharp; a class has the same colour everywhere.
"""

from __future__ import annotations

import colorsys
import functools
import importlib.util
import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

_GOLDEN_RATIO = 0.61803398875
_Rectangle = tuple[float, float, float, float]


@dataclass(frozen=True)
class Boxes:
    """Boxes in one image.

    boxes    [N, 4]  xyxy, pixels of the image
    labels   [N]     1..C
    scores   [N]     0..1, or None for the truth
    matched  [N]     False: drawn dashed (a missed object, a false alarm); None: all solid
    crowd    [N]     True: a region of many objects, drawn thin and without a name
    """

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    matched: np.ndarray | None = None
    crowd: np.ndarray | None = None


def draw_detections(
    image: np.ndarray,
    found: Boxes,
    class_names: Mapping[int, str] | Sequence[str] | None,
    *,
    score_threshold: float = 0.0,
    long_side: int = 640,
    line_width: int | None = None,
) -> Image.Image:
    """Draw boxes with class names, and scores where there are any, on a copy of `image`.

    image        uint8 [H, W, 3], RGB
    class_names  name of each label: a mapping, or a sequence whose first entry is label 1's; None: boxes alone
    long_side    an image smaller than this is enlarged to it; a larger one keeps its size
    line_width   pixels of the picture; None: by its size
    """
    height, width = image.shape[:2]
    scale = max(1.0, long_side / max(height, width))
    if scale > 1:  # OpenCV takes a sixth of Pillow's time, which was two thirds of drawing a picture
        image = cv2.resize(image, (round(width * scale), round(height * scale)), interpolation=cv2.INTER_CUBIC)
    picture = Image.fromarray(np.ascontiguousarray(image)).convert("RGB")
    size = max(picture.size)
    line = line_width or max(3, round(size / 180))
    font = label_font(max(14, round(size / 31)))

    kept = [
        index for index in range(len(found.boxes)) if found.scores is None or found.scores[index] >= score_threshold
    ]
    areas = [float(np.prod(np.maximum(found.boxes[index, 2:] - found.boxes[index, :2], 0))) for index in kept]
    kept = [index for _, index in sorted(zip(areas, kept, strict=True), key=lambda pair: -pair[0])]
    draw = ImageDraw.Draw(picture)
    for index in kept:  # large boxes first, so that small ones lie on top
        crowd = found.crowd is not None and bool(found.crowd[index])
        solid = found.matched is None or bool(found.matched[index])
        box = _inside(found.boxes[index] * scale, picture.size)
        _draw_box(draw, box, class_colour(int(found.labels[index])), max(1, line // 2) if crowd else line, solid)
    if class_names is None:
        return picture
    taken: list[_Rectangle] = []
    for index in reversed(kept):
        if found.crowd is not None and found.crowd[index]:
            continue
        label = int(found.labels[index])
        text = _name(class_names, label)
        if found.scores is not None:
            text += f" {found.scores[index]:.2f}"
        box = _inside(found.boxes[index] * scale, picture.size)
        taken.append(_draw_label(draw, text, box, class_colour(label), font, picture.size, taken))
    return picture


def class_colour(label: int) -> tuple[int, int, int]:
    """RGB of a class: hues a golden section apart, so that neighbours differ, at one lightness that carries white."""
    hue = (0.58 + (label - 1) * _GOLDEN_RATIO) % 1.0
    lightness = 0.40 if 0.1 < hue < 0.5 else 0.50  # yellow to cyan look brighter than they are
    red, green, blue = colorsys.hls_to_rgb(hue, lightness, 0.78)
    return round(red * 255), round(green * 255), round(blue * 255)


@functools.cache
def label_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which covers most scripts of Europe, from matplotlib's files; else Pillow's own."""
    found = importlib.util.find_spec("matplotlib")
    if found and found.origin:
        path = os.path.join(os.path.dirname(found.origin), "mpl-data", "fonts", "ttf", "DejaVuSans.ttf")
        if os.path.exists(path):
            return ImageFont.truetype(path, size)
    return ImageFont.load_default(size)


def _name(class_names: Mapping[int, str] | Sequence[str], label: int) -> str:
    if isinstance(class_names, Mapping):
        return class_names.get(label, f"class {label}")
    return class_names[label - 1] if 0 < label <= len(class_names) else f"class {label}"


def _inside(box: np.ndarray, size: tuple[int, int]) -> _Rectangle:
    left, top = (min(max(float(value), 0.0), side - 1.0) for value, side in zip(box[:2], size, strict=True))
    right, bottom = (min(max(float(value), 0.0), side - 1.0) for value, side in zip(box[2:], size, strict=True))
    return left, top, max(left, right), max(top, bottom)


def _draw_box(draw: ImageDraw.ImageDraw, box: _Rectangle, colour: tuple[int, int, int], line: int, solid: bool) -> None:
    left, top, right, bottom = box
    corners = [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]
    for start, end in itertools.pairwise(corners):
        pieces = [(start, end)] if solid else _dashes(start, end, 4 * line)
        for piece in pieces:
            draw.line([*piece[0], *piece[1]], fill=(255, 255, 255), width=line + 2)
    for start, end in itertools.pairwise(corners):
        pieces = [(start, end)] if solid else _dashes(start, end, 4 * line)
        for piece in pieces:
            draw.line([*piece[0], *piece[1]], fill=colour, width=line)


def _dashes(
    start: tuple[float, float], end: tuple[float, float], dash: float
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    length = abs(end[0] - start[0]) + abs(end[1] - start[1])
    count = max(1, round((length / dash - 1) / 2))
    pitch = length / (2 * count + 1) if length else 0.0
    direction = ((end[0] - start[0]) / length, (end[1] - start[1]) / length) if length else (0.0, 0.0)

    def at(distance: float) -> tuple[float, float]:
        return start[0] + direction[0] * distance, start[1] + direction[1] * distance

    return [(at(2 * index * pitch), at((2 * index + 1) * pitch)) for index in range(count + 1)]


def _draw_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    box: _Rectangle,
    colour: tuple[int, int, int],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
    taken: Sequence[_Rectangle],
) -> _Rectangle:
    """Put a label at the first place around its box that hides no other label; the place is returned."""
    left, _, right, _ = draw.textbbox((0, 0), text, font=font)
    _, top, _, bottom = draw.textbbox((0, 0), "Hg", font=font)  # one height for all, whatever their letters
    pad_x, pad_y = 5, 3
    wide, high = right - left + 2 * pad_x, bottom - top + 2 * pad_y
    x0, y0, x1, y1 = box
    places = [(x0, y0 - high), (x0, y0), (x0, y1), (x1 - wide, y0 - high), (x1 - wide, y1), (x0, y1 - high), (x1, y0)]
    clamped = [(min(max(x, 0), size[0] - wide), min(max(y, 0), size[1] - high)) for x, y in places]
    rectangles = [(x, y, x + wide, y + high) for x, y in clamped]
    overlaps = [sum(_overlap(rectangle, other) for other in taken) for rectangle in rectangles]
    x, y, end_x, end_y = rectangles[overlaps.index(min(overlaps))]
    draw.rectangle((x, y, end_x, end_y), fill=colour)
    draw.text((x + pad_x - left, y + pad_y - top), text, fill=(255, 255, 255), font=font)
    return x, y, end_x, end_y


def _overlap(first: _Rectangle, second: _Rectangle) -> float:
    wide = min(first[2], second[2]) - max(first[0], second[0])
    high = min(first[3], second[3]) - max(first[1], second[1])
    return max(wide, 0.0) * max(high, 0.0)
