"""SSD's augmentation as the Caffe release does it: expand, crop, distort, resize, mirror (RefineDet section IV-B).

Large-scale jitter (Ghiasi et al., Simple Copy-Paste, 2021) and mosaic (Bochkovskiy et al., YOLOv4, 2020) are off by
default.

A transform is one class and one entry in `TRANSFORMS`; the section `data.augmentation` of the spec switches it by the
same name. Each draws from a generator of its own, a function of (seed, epoch, sample key) and its name, so that adding
one shifts none of the others. A transform changes a `ViewPlan`; pixels are touched once, when the plan is rendered:
distortion works pixel by pixel, so cutting out the crop first gives the same result for a fraction of the work.

Two deviations from the Caffe code, both in favour of its paper: boxes follow the crop in whole pixels, where Caffe
cuts pixels at truncated and boxes at exact corners; and hue wraps around, where Caffe clamps it at red.

G boxes in one image, H W pixels
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import cv2
import numpy as np
from refinedet.pipeline.config.spec import Augmentation
from refinedet.pipeline.data.randomness import keyed_generator
from refinedet.pipeline.data.resampling import Border, resize_bordered

MEAN_RGB = (123, 117, 104)
MIN_IOUS = (0.1, 0.3, 0.5, 0.7, 0.9, 0.0)
"""of the random crops; the last is the release's "IoU at most 1", which any crop meets that has a box to meet it"""
NUM_TRIALS = 50
INTERPOLATIONS = (
    cv2.INTER_LINEAR,
    cv2.INTER_AREA,
    cv2.INTER_NEAREST_EXACT,  # INTER_NEAREST shifts the image by half a pixel
    cv2.INTER_CUBIC,
    cv2.INTER_LANCZOS4,
)


@dataclass(frozen=True)
class Window:
    """A rectangle of whole pixels, in the image's own coordinates; it may reach beyond the image."""

    left: int
    top: int
    width: int
    height: int


class Picture(NamedTuple):
    """An image and its objects.

    image   uint8   [H, W, 3]  RGB
    boxes   float32 [G, 4]     xyxy, pixels of `image`
    labels  int64   [G]
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray


def no_companions() -> Sequence[Picture]:
    return ()


@dataclass(frozen=True)
class ViewPlan:
    """Plan of a training view: the part of the image that it shows.

    image       uint8   [H, W, 3]  RGB
    boxes       float32 [G, 4]     xyxy, pixels of `image`
    labels      int64   [G]
    companions  reads other samples, for the views that several make up
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    window: Window
    recolour: tuple[Callable[[np.ndarray], np.ndarray], ...] = ()
    """one after the other, of the image's own pixels; the border that `Expand` adds keeps its colour"""
    interpolation: int = cv2.INTER_LINEAR
    mirrored: bool = False
    companions: Callable[[], Sequence[Picture]] = no_companions

    def render(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Image [size, size, 3], boxes [G', 4] in its pixels, labels [G']: those whose centre lies in the window."""
        boxes, labels = project_boxes(self.boxes, self.labels, self.window, (size, size))
        pixels, border = _cut(self.image, self.window)
        for recolour in self.recolour if pixels.size else ():
            pixels = recolour(pixels)
        pixels = resize_bordered(pixels, border, MEAN_RGB, size, self.interpolation)
        if self.mirrored:
            pixels, boxes = cv2.flip(pixels, 1), mirror_boxes(boxes, size)
        return pixels, boxes, labels


class Mosaic:
    """Half of the time, put a random part of the image and of three others on tiles that meet at a random point."""

    def __call__(self, plan: ViewPlan, rng: np.random.Generator) -> ViewPlan:
        coin, x, y = rng.random(3)
        places, draws = rng.random(4), rng.random((4, 3))
        height, width, _ = plan.image.shape
        if coin >= 0.5 or min(height, width) < 2:
            return plan
        pictures = [Picture(plan.image, plan.boxes, plan.labels), *plan.companions()]
        if len(pictures) < len(places):
            return plan
        meeting = (_share(width, 0.3 + 0.4 * x), _share(height, 0.3 + 0.4 * y))
        order = np.argsort(places, kind="stable").tolist()
        image, boxes, labels = join_tiles([pictures[at] for at in order], (width, height), meeting, draws)
        return replace(plan, image=image, boxes=boxes, labels=labels, window=Window(0, 0, width, height))


class ScaleJitter:
    """Show the image at 0.1 to 2 times its size: a part of it, or all of it on a larger canvas, at a random place."""

    def __call__(self, plan: ViewPlan, rng: np.random.Generator) -> ViewPlan:
        scale, x, y = rng.random(3)
        return replace(plan, window=jitter_window(plan.window, 0.1 + 1.9 * scale, x, y))


class Expand:
    """Half of the time, put the image at a random place on a canvas of 1 to 4 times its sides."""

    def __call__(self, plan: ViewPlan, rng: np.random.Generator) -> ViewPlan:
        coin, ratio, x, y = rng.random(4)
        return replace(plan, window=expand_window(plan.window, 1 + 3 * ratio, x, y)) if coin < 0.5 else plan


class Crop:
    """Cut out one of the crops whose overlap with a box meets a random sampler's demand, or nothing."""

    def __call__(self, plan: ViewPlan, rng: np.random.Generator) -> ViewPlan:
        choice, trials = rng.random(), rng.random((len(MIN_IOUS), NUM_TRIALS, 4))
        return replace(plan, window=crop_window(plan.window, plan.boxes, choice, trials))


class Distort:
    """Change brightness, contrast, saturation and hue, each half of the time."""

    def __call__(self, plan: ViewPlan, rng: np.random.Generator) -> ViewPlan:
        draws = rng.random(9)
        return replace(plan, recolour=(*plan.recolour, lambda pixels: distort(pixels, draws)))


class RandomInterpolation:
    """Resize by one of five interpolations."""

    def __call__(self, plan: ViewPlan, rng: np.random.Generator) -> ViewPlan:
        return replace(plan, interpolation=INTERPOLATIONS[int(rng.random() * len(INTERPOLATIONS))])


class Mirror:
    """Half of the time, mirror left to right."""

    def __call__(self, plan: ViewPlan, rng: np.random.Generator) -> ViewPlan:
        return replace(plan, mirrored=rng.random() < 0.5)


TRANSFORMS: dict[str, Callable[[ViewPlan, np.random.Generator], ViewPlan]] = {
    "mosaic": Mosaic(),  # first: the others change the image that it makes
    "scale_jitter": ScaleJitter(),
    "expand": Expand(),
    "crop": Crop(),
    "distort": Distort(),
    "random_interpolation": RandomInterpolation(),
    "mirror": Mirror(),
}
"""in the order in which they are applied"""
assert TRANSFORMS.keys() == Augmentation.model_fields.keys(), "Augmentation in config/data_spec.py has other names"


def augment(
    image: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    *,
    size: int,
    key: tuple[int | str, ...],
    settings: Augmentation,
    companions: Callable[[], Sequence[Picture]] = no_companions,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One random training view of an image, a function of `key`: (seed, epoch, sample key).

    image    uint8   [H, W, 3]  RGB
    boxes    float32 [G, 4]     xyxy, pixels of `image`
    labels   int64   [G]
    companions  reads the samples that `mosaic` shows beside this one
    returns  image [size, size, 3], boxes [G', 4] in its pixels, labels [G']; those whose centre lies in the crop
    """
    height, width, _ = image.shape
    plan = ViewPlan(image, boxes, labels, Window(0, 0, width, height), companions=companions)
    for name, transform in TRANSFORMS.items():
        if getattr(settings, name):
            plan = transform(plan, keyed_generator("augment", name, *key))
    return plan.render(size)


def join_tiles(
    pictures: Sequence[Picture], size: tuple[int, int], meeting: tuple[int, int], draws: np.ndarray
) -> Picture:
    """Four pictures on the four tiles of one, row by row.

    Each shows half to all of the widest part that has its tile's shape. Objects stay whose centre is in that part.

    size     (width, height) of the result, pixels
    meeting  (x, y) of the corner that the tiles share
    draws    [4, 3]  uniform numbers: how much of each picture is shown, and where it is cut out, x and y
    """
    canvas = np.empty((size[1], size[0], 3), np.uint8)
    found = []
    columns, rows = ((0, meeting[0]), (meeting[0], size[0])), ((0, meeting[1]), (meeting[1], size[1]))
    tiles = [(*column, *row) for row in rows for column in columns]
    for picture, (x1, x2, y1, y2), (share, x, y) in zip(pictures, tiles, draws.tolist(), strict=True):
        tile = (x2 - x1, y2 - y1)
        height, width, _ = picture.image.shape
        scale = min(width / tile[0], height / tile[1]) * (0.5 + 0.5 * share)
        shown = (max(1, round(tile[0] * scale)), max(1, round(tile[1] * scale)))
        window = Window(int(x * (width - shown[0] + 1)), int(y * (height - shown[1] + 1)), *shown)
        pixels, _ = _cut(picture.image, window)
        interpolation = cv2.INTER_AREA if scale > 1 else cv2.INTER_LINEAR
        canvas[y1:y2, x1:x2] = cv2.resize(pixels, tile, interpolation=interpolation)
        boxes, labels = project_boxes(picture.boxes, picture.labels, window, tile)
        found.append((boxes + np.array([x1, y1, x1, y1], np.float32), labels))
    return Picture(
        canvas, np.concatenate([boxes for boxes, _ in found]), np.concatenate([labels for _, labels in found])
    )


def _share(length: int, share: float) -> int:
    """A share of a length in whole pixels, from 1 to one less than the length."""
    return min(max(round(length * share), 1), length - 1)


def jitter_window(image: Window, scale: float, x: float, y: float) -> Window:
    """The window, 1 / `scale` times the image, in which the image appears `scale` times as large; x, y in [0, 1)."""

    def place(start: int, length: int, shown: int, at: float) -> int:
        slack = length - shown
        return start + int(at * (slack + 1)) if slack >= 0 else start - int(at * (1 - slack))

    width, height = max(1, round(image.width / scale)), max(1, round(image.height / scale))
    return Window(place(image.left, image.width, width, x), place(image.top, image.height, height, y), width, height)


def expand_window(image: Window, ratio: float, x: float, y: float) -> Window:
    """The canvas, `ratio` times the image, on which the image lies at a random place; x, y in [0, 1)."""
    width, height = int(image.width * ratio), int(image.height * ratio)
    return Window(-int(x * (width - image.width + 1)), -int(y * (height - image.height + 1)), width, height)


def crop_window(canvas: Window, boxes: np.ndarray, choice: float, trials: np.ndarray) -> Window:
    """Pick one of the crops that met their sampler's demand, or the whole canvas.

    trials  [samplers, NUM_TRIALS, 4]  uniform numbers: scale, aspect, x, y
    choice  uniform number
    """
    if not len(boxes):
        return canvas
    scale, aspect, x, y = trials.reshape(-1, 4).T
    scale = 0.3 + 0.7 * scale
    stretch = np.sqrt(np.minimum(np.maximum(0.5 + 1.5 * aspect, scale**2), 1 / scale**2))
    width = np.maximum(np.floor(scale * stretch * canvas.width), 1)
    height = np.maximum(np.floor(scale / stretch * canvas.height), 1)
    left = canvas.left + np.floor(x * (canvas.width - width + 1))
    top = canvas.top + np.floor(y * (canvas.height - height + 1))
    met = _best_iou(left, top, width, height, boxes).reshape(trials.shape[:2]) >= np.array(MIN_IOUS)[:, None]
    successful = np.flatnonzero(met.any(1))
    picked = int(choice * (len(successful) + 1))
    if picked == len(successful):
        return canvas
    sampler = successful[picked]
    trial = sampler * trials.shape[1] + met[sampler].argmax()
    return Window(*(int(values[trial]) for values in (left, top, width, height)))


def _best_iou(
    left: np.ndarray, top: np.ndarray, width: np.ndarray, height: np.ndarray, boxes: np.ndarray
) -> np.ndarray:
    """IoU of each of N crops [N] with the box [G, 4] that overlaps it best."""
    box_areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    x1, y1, x2, y2 = boxes.T[:, :, None].astype(np.float64)
    w = np.minimum(left + width, x2) - np.maximum(left, x1)
    h = np.minimum(top + height, y2) - np.maximum(top, y1)
    inside = np.maximum(w, 0) * np.maximum(h, 0)
    return (inside / (width * height + box_areas[:, None] - inside)).max(0)


def project_boxes(
    boxes: np.ndarray, labels: np.ndarray, window: Window, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes whose centre lies in the window, clipped to it, in pixels of the window resized.

    size  (width, height) of the resized window, pixels
    """
    origin = np.array([window.left, window.top] * 2, np.float32)
    extent = np.array([window.width, window.height] * 2, np.float32)
    moved = boxes - origin
    centre = (moved[:, :2] + moved[:, 2:]) / 2
    kept = ((centre >= 0) & (centre < extent[:2])).all(1)
    clipped = np.clip(moved[kept], 0, extent) * (np.array(size * 2, np.float32) / extent)
    return clipped.astype(np.float32), labels[kept]


def mirror_boxes(boxes: np.ndarray, width: float) -> np.ndarray:
    """Boxes of the image mirrored left to right: x' = W - x."""
    mirrored = boxes.copy()
    mirrored[:, 0], mirrored[:, 2] = width - boxes[:, 2], width - boxes[:, 0]
    return mirrored


def _cut(image: np.ndarray, window: Window) -> tuple[np.ndarray, Border]:
    """The window's part of the image, which may be empty, and how far the window reaches beyond it."""
    height, width, _ = image.shape
    right, bottom = window.left + window.width, window.top + window.height
    x1, y1 = max(window.left, 0), max(window.top, 0)
    x2, y2 = max(min(right, width), x1), max(min(bottom, height), y1)
    return image[y1:y2, x1:x2], (y1 - window.top, bottom - y2, x1 - window.left, right - x2)


def distort(image: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each half of the time; contrast second or last by a coin flip.

    draws  [9]  uniform numbers: whether and how much of each in that order, and the coin
    """
    brightness = round(64 * draws[1] - 32) if draws[0] < 0.5 else None
    contrast = 0.5 + draws[3] if draws[2] < 0.5 else None
    saturation = 0.5 + draws[5] if draws[4] < 0.5 else None
    hue = int(37 * draws[7]) - 18 if draws[6] < 0.5 else None  # OpenCV's degrees: 180 are the circle
    contrast_last = draws[8] < 0.5
    if brightness:
        shift = cv2.add if brightness > 0 else cv2.subtract  # both saturate
        image = shift(image, np.array([abs(brightness)] * 3 + [0.0]))
    if contrast is not None and not contrast_last:
        image = cv2.convertScaleAbs(image, alpha=contrast)
    if saturation is not None or hue:
        planes = list(cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV)))
        if hue:
            planes[0] = cv2.LUT(planes[0], ((np.arange(256) + hue) % 180).astype(np.uint8))
        if saturation is not None:
            planes[1] = cv2.convertScaleAbs(planes[1], alpha=saturation)
        image = cv2.cvtColor(cv2.merge(planes), cv2.COLOR_HSV2RGB)
    if contrast is not None and contrast_last:
        image = cv2.convertScaleAbs(image, alpha=contrast)
    return image
