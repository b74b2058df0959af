"""What a reader of a data set format gives: its categories, and one record an image."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from refinedet.pipeline.data.samples import Category


class Annotation(NamedTuple):
    """One object, in COCO's terms."""

    id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    """x, y, width, height; pixels, continuous"""
    area: float
    """of the object's mask where the data set knows it: COCO's small, medium and large go by it"""
    iscrowd: int = 0
    difficult: int = 0


@dataclass(frozen=True)
class Record:
    """One image: where its bytes come from, and its objects."""

    image_id: int
    file_name: str
    load: Callable[[], bytes]
    num_bytes: int
    """of the encoded image, as known before it is read; shards are cut by it"""
    annotations: tuple[Annotation, ...] = ()
    width: int | None = None
    """pixels, as the annotations say; None: the image's own word is taken"""
    height: int | None = None


@dataclass(frozen=True)
class Source:
    """One part (train or val) of a data set, ready to be written into shards."""

    categories: tuple[Category, ...]
    records: tuple[Record, ...]


def whole_number(value: Any) -> int | None:
    """A number that JSON holds as 7 or 7.0, within 64 bits; None for anything else: text, true, 7.5, null."""
    if type(value) is int:  # nearly always, in files of a million annotations
        return value if -(2**63) <= value < 2**63 else None
    number = as_number(value)
    whole = number is not None and number.is_integer() and -(2**63) <= value < 2**63
    return int(value) if whole else None


def as_number(value: Any) -> float | None:
    """A number as a float; None for anything else, text and true too, and for one beyond a float's range."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def fault_of_box(bbox: tuple[float, ...], width: float = math.inf, height: float = math.inf) -> str | None:
    """Why a box (x, y, width, height) cannot be learnt from, or None."""
    if len(bbox) != 4 or not math.isfinite(sum(bbox)):  # NaN and infinity outlive a sum
        return f"box {list(bbox)} is not four finite numbers"
    x, y, w, h = bbox
    if w <= 0 or h <= 0:
        return f"box {list(bbox)} has no area"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return f"box {list(bbox)} lies outside the image of {width} x {height} pixels"
    return None
