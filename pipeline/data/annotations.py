"""Result of a data format's reader: the categories, and one record per image."""

from __future__ import annotations

import math
import numbers
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.samples import BadSample, Category


class Annotation(NamedTuple):
    """One object, in COCO's terms."""

    id: int
    category_id: int
    bbox: tuple[float, float, float, float]
    """x, y, width, height; pixels, continuous"""
    area: float
    """of the object's mask where the data set has it: it decides COCO's small, medium and large"""
    iscrowd: int = 0
    difficult: int = 0


class Annotations(Sequence[Annotation]):
    """The objects of one image, in 58 bytes each instead of some 400: a data set may have tens of millions."""

    __slots__ = ("_odd", "_packed")
    _ROW = struct.Struct("<2q5d2b")

    def __init__(self, annotations: Iterable[Annotation] = ()) -> None:
        self._packed = bytearray()
        self._odd: dict[int, Any] | None = None
        """ids, by place, that are no whole numbers of 64 bits"""
        for annotation in annotations:
            self.append(annotation)

    def append(self, annotation: Annotation) -> None:
        number = annotation.id
        if type(number) is not int or not -(2**63) <= number < 2**63:
            self._odd = {**(self._odd or {}), len(self): number}
            number = 0
        self._packed += self._ROW.pack(number, annotation.category_id, *annotation.bbox, *annotation[3:])

    def ids(self) -> np.ndarray:
        """int64 [N]; 0 stands for what is no whole number."""
        ids = np.array([row[0] for row in self._ROW.iter_unpack(self._packed)], np.int64)
        ids[list(self._odd or ())] = 0
        return ids

    def __len__(self) -> int:
        return len(self._packed) // self._ROW.size

    def __iter__(self) -> Iterator[Annotation]:
        odd = self._odd or {}
        for place, (number, category, x, y, w, h, *rest) in enumerate(self._ROW.iter_unpack(self._packed)):
            yield Annotation(odd.get(place, number), category, (x, y, w, h), *rest)

    def __getitem__(self, index: Any) -> Any:
        return list(self)[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Annotations) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Record:
    """One image: where its bytes come from, and its objects."""

    image_id: int
    file_name: str
    load: Callable[[], bytes]
    num_bytes: int
    """of the encoded image, as known before it is read; shards are cut by it"""
    annotations: Annotations = field(default_factory=Annotations)
    width: int | None = None
    """pixels, from the annotations; None: the image's own size is used"""
    height: int | None = None


@dataclass(frozen=True)
class SplitSource:
    """One split of a data set as its reader gives it, or a whole part (train or val), ready to be written."""

    categories: tuple[Category, ...]
    records: tuple[Record, ...]
    name: str = ""
    """in messages"""
    fixed_ids: bool = False
    """ids of categories, images and annotations are the data set's own, as COCO's; else they count from 1"""


def number_classes(
    name: str,
    records: Sequence[Record],
    objects: Sequence[Sequence[tuple[str, tuple[float, ...], int]]],
    faults: FaultLog,
    names: Sequence[str] = (),
) -> SplitSource:
    """A source of a format whose objects carry class names: names become categories, by name.

    objects  of each record: (class name, COCO box, difficult)
    names    classes that the data set lists, also where no object is of them
    """
    categories = {
        label: Category(number, label)
        for number, label in enumerate(
            sorted({*names, *(label for found in objects for label, _, _ in found)} - {""}), start=1
        )
    }
    finished = []
    for record, found in zip(records, objects, strict=True):
        annotations = []
        for number, (label, bbox, difficult) in enumerate(found, start=1):
            fault = None if label.strip() else "an object without a class name"
            if len(bbox) != 4 or not all(map(math.isfinite, bbox)):
                fault = fault_of_box(bbox)
            if fault:
                faults.add(BadSample(name, f"{record.file_name}, object {number}", f"{fault}; excluded"))
            else:
                box = (bbox[0], bbox[1], bbox[2], bbox[3])
                category = categories[label].id
                annotations.append(Annotation(number, category, box, box[2] * box[3], 0, difficult))
        finished.append(replace(record, annotations=Annotations(annotations)))
    return SplitSource(tuple(categories.values()), tuple(finished), name)


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
    """Return why a box (x, y, width, height) cannot be trained on, or None."""
    if len(bbox) != 4 or not math.isfinite(sum(bbox)):  # NaN and infinity outlive a sum
        return f"box {list(bbox)} is not four finite numbers"
    x, y, w, h = bbox
    if w <= 0 or h <= 0:
        return f"box {list(bbox)} has no area"
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        return f"box {list(bbox)} lies outside the image of {width} x {height} pixels"
    corners = single_precision_corners(np.array([bbox]), width, height)[0]
    if not (corners[2:] > corners[:2]).all():
        return f"box {list(bbox)} has no area inside the image in single precision"
    return None


def are_learnable(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    """Return which COCO boxes, float64 [G, 4], have no fault by `fault_of_box`; bool [G]."""
    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(boxes.sum(1))
        start, sides = boxes[:, :2], boxes[:, 2:]
        inside = (sides > 0) & (start < (width, height)) & (start + sides > 0)
    corners = single_precision_corners(boxes, width, height)
    return finite & (inside & (corners[:, 2:] > corners[:, :2])).all(1)


def single_precision_corners(boxes: np.ndarray, width: float, height: float) -> np.ndarray:
    """COCO boxes [G, 4] as training takes them: xyxy float32, clipped to the image."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinity minus infinity is NaN, which no comparison passes
        corners = boxes.astype(np.float32)
        corners[:, 2:] += corners[:, :2]
    return np.clip(corners, 0, np.array([width, height, width, height], np.float32))
