"""Ground truth of a COCO instances file, as columns.

G objects, I images, K categories. A pair of an image and a category is one number, image index * K + category index.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from refinedet.pipeline.data.annotations import whole_number
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)


MARKS = {
    "crowd": "mark crowds (iscrowd)",
    "difficult": "mark objects to be ignored (difficult or ignore)",
    "group_of": "mark groups (is_group_of)",
    "federated": "list the categories looked for in each image (neg_category_ids, not_exhaustive_category_ids)",
}
"""Marks that need a rule of the metric, in words"""


def _no_pairs() -> np.ndarray:
    return np.zeros(0, np.int64)


@dataclass(frozen=True)
class GroundTruth:
    """Objects of a COCO instances file, in the file's order; those of unlisted images or categories are excluded.

    image_ids     [I] int64, ascending, unique
    category_ids  [K] int64, ascending, unique
    names         K category names, unique
    image_id, category_id, annotation_id  [G] int64
    bbox          [G, 4] float64 xywh
    area          [G] float64: the annotation's own (of its mask), not the box's
    crowd         [G] bool
    difficult     [G] bool: VOC's flag, or `ignore`
    group_of      [G] bool: Open Images' flag
    file_names    I file names, "" where the file has none
    image_names   I ids as the file has them, where they are text: image_ids then number them; else empty
    federated     whether the images list the categories that were looked for, as LVIS does
    verified_absent, not_exhaustive  [N] int64 pairs of an image and a category, ascending
    frequencies   K of r, c, f (LVIS); else empty
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    names: tuple[str, ...]
    image_id: np.ndarray
    category_id: np.ndarray
    annotation_id: np.ndarray
    bbox: np.ndarray
    area: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    group_of: np.ndarray
    file_names: tuple[str, ...] = ()
    image_names: tuple[str, ...] = ()
    federated: bool = False
    verified_absent: np.ndarray = field(default_factory=_no_pairs)
    not_exhaustive: np.ndarray = field(default_factory=_no_pairs)
    frequencies: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.area)

    @property
    def marks(self) -> frozenset[str]:
        """Those of MARKS that the annotations have."""
        present = {
            "crowd": self.crowd.any(),
            "difficult": self.difficult.any(),
            "group_of": self.group_of.any(),
            "federated": self.federated,
        }
        return frozenset(name for name, here in present.items() if here)

    def select(self, objects: np.ndarray) -> GroundTruth:
        """The same images and categories with some of the objects, by index or mask."""
        columns = {one.name: getattr(self, one.name) for one in fields(self)}
        names = ("image_id", "category_id", "annotation_id", "bbox", "area", "crowd", "difficult", "group_of")
        return replace(self, **{name: columns[name][objects] for name in names})

    def original_id(self, image_id: int | np.integer) -> int | str:
        """The id of an image as its file has it."""
        return self.image_names[int(np.searchsorted(self.image_ids, image_id))] if self.image_names else int(image_id)

    def table_of(
        self, detections: DetectionTable | Sequence[Mapping[str, Any]], *, first_row: int = 0
    ) -> DetectionTable:
        """Detections with this truth's image ids; rows name images as the annotation file does.

        first_row  number of the first row in its file, for errors
        """
        if isinstance(detections, DetectionTable) or not self.image_names or not isinstance(detections, Sequence):
            return DetectionTable.of(detections, first_row=first_row)
        numbers = dict(zip(self.image_names, self.image_ids.tolist(), strict=True))
        rows = []
        for index, row in enumerate(detections, start=first_row):
            name = row.get("image_id") if isinstance(row, Mapping) else None
            if not isinstance(name, str) or name not in numbers:
                raise UserError(
                    f"detections, row {index}: image_id {name!r:.80} is not among the {len(numbers)} of the "
                    "annotations, which are text; evaluate against the annotations of the images it was run on"
                )
            rows.append({**row, "image_id": numbers[name]})
        return DetectionTable.of(rows, first_row=first_row)

    @staticmethod
    def of(source: GroundTruth | Mapping[str, Any] | str) -> GroundTruth:
        """From a COCO instances dict or its file; UserError where it is not one."""
        if isinstance(source, GroundTruth):
            return source
        name = "annotations"
        if isinstance(source, str):
            name, source = source, read_json_file(source, "annotations")
        if not isinstance(source, Mapping) or not {"images", "annotations", "categories"} <= source.keys():
            received = sorted(source)[:6] if isinstance(source, Mapping) else type(source).__name__
            raise UserError(
                f"{name} is not a COCO instances file: it needs images, annotations and categories, received "
                f"{received}; give instances_*.json"
            )
        try:
            return _from_coco(source, name)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{name} is not a COCO instances file: {type(error).__name__} {error}; every annotation needs id, "
                "image_id, category_id, bbox [x, y, width, height] and area"
            ) from error


def read_json_file(path: str, what: str) -> Any:
    """Content of a JSON file; UserError, naming it, where it is missing or was cut short."""
    try:
        return json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"{what}: there is no file {path}; give the path of a JSON file") from None
    except OSError as error:
        raise UserError(f"{what}: {path} cannot be read ({error.strerror or error}); give a JSON file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{what}: {path} is not whole JSON ({error}); write or copy it again") from None


def pair_keys(truth: GroundTruth, image_id: np.ndarray, category_id: np.ndarray) -> np.ndarray:
    """[N] the pairs of images and categories that the truth lists, as numbers."""
    image = np.searchsorted(truth.image_ids, image_id)
    return image * len(truth.category_ids) + np.searchsorted(truth.category_ids, category_id)


def _from_coco(source: Mapping[str, Any], name: str) -> GroundTruth:
    numbered, image_names = _number_images(source["images"], name)
    image_ids = np.unique(np.array(list(numbered.values()), np.int64))
    numbers = _whole_numbers(source["categories"], "id", f"{name}: a category's").tolist()
    categories = dict(zip(numbers, source["categories"], strict=True))
    category_ids = np.array(sorted(categories), np.int64)
    names = [str(categories[category]["name"]) for category in category_ids.tolist()]
    if len(set(names)) < len(names):
        names = [f"{word} ({category})" for word, category in zip(names, category_ids.tolist(), strict=True)]
    annotations = source["annotations"]
    whose = f"{name}: an annotation's"
    truth = GroundTruth(
        image_ids=image_ids,
        category_ids=category_ids,
        names=tuple(names),
        image_id=_image_ids(annotations, numbered, bool(image_names), whose),
        category_id=_whole_numbers(annotations, "category_id", whose),
        annotation_id=_annotation_ids(annotations, name),
        bbox=_numbers(annotations, "bbox", whose).reshape(-1, 4),
        area=_numbers(annotations, "area", whose),
        crowd=_flags([one.get("iscrowd", 0) for one in annotations], f"{whose} iscrowd"),
        difficult=_flags([one.get("difficult", one.get("ignore", 0)) for one in annotations], f"{whose} difficult"),
        group_of=_flags([one.get("is_group_of", 0) for one in annotations], f"{whose} is_group_of"),
        image_names=image_names,
    )
    if len(truth.bbox) != len(truth) or not (np.isfinite(truth.bbox).all() and np.isfinite(truth.area).all()):
        raise UserError(f"{name}: every bbox must be four finite numbers and every area finite; fix the file")
    listed = np.isin(truth.image_id, image_ids) & np.isin(truth.category_id, category_ids)
    if not listed.all():
        unlisted = int((~listed).sum())
        logger.warning(
            "%s: %d annotations of images or categories that the file does not list are excluded", name, unlisted
        )
        truth = truth.select(listed)
    by_id = {numbered[one["id"]]: one for one in source["images"]}
    images = [by_id[number] for number in image_ids.tolist()]
    truth = replace(truth, file_names=tuple(str(one.get("file_name", "")) for one in images))
    return _with_lvis_fields(truth, images, [categories[number] for number in category_ids.tolist()])


def _number_images(images: Sequence[Mapping[str, Any]], name: str) -> tuple[dict[Any, int], tuple[str, ...]]:
    """The number of each image by its id in the file, and the ids in the order of the numbers where they are text."""
    ids = [image["id"] for image in images]
    if not any(isinstance(value, str) for value in ids):
        return dict(zip(ids, _whole_numbers(images, "id", f"{name}: an image's").tolist(), strict=True)), ()
    if not all(isinstance(value, str) for value in ids):
        raise UserError(f"{name}: image ids must be all whole numbers or all text, received both; fix the file")
    names = tuple(sorted(set(ids)))
    return {value: number for number, value in enumerate(names, start=1)}, names


def _image_ids(
    annotations: Sequence[Mapping[str, Any]], numbered: Mapping[Any, int], text: bool, whose: str
) -> np.ndarray:
    """[G] numbers of the annotations' images; -1 for a text that no image has."""
    if not text:
        return _whole_numbers(annotations, "image_id", whose)
    for annotation in annotations:
        if not isinstance(annotation["image_id"], str):
            raise UserError(
                f"{whose} image_id must be text as the images' ids are, received {annotation['image_id']!r:.80}; "
                "fix the file"
            )
    return np.array([numbered.get(annotation["image_id"], -1) for annotation in annotations], np.int64)


def _annotation_ids(annotations: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    found = _whole_numbers(annotations, "id", f"{name}: an annotation's")
    if len(np.unique(found)) < len(found):
        values, counts = np.unique(found, return_counts=True)
        raise UserError(
            f"{name}: annotation id {values[counts.argmax()]} is used {counts.max()} times; ids must be unique, "
            "number the annotations from 1"
        )
    if (found == 0).any():
        logger.warning(
            "%s: an annotation has the id 0, which the COCO API counts as not found; its detection becomes a "
            "false positive here too. Number the annotations from 1.",
            name,
        )
    return found


def _with_lvis_fields(
    truth: GroundTruth, images: Sequence[Mapping[str, Any]], categories: Sequence[Mapping[str, Any]]
) -> GroundTruth:
    """Add LVIS's fields of images (in the order of image_ids) and categories (of category_ids), if they exist."""
    pairs = {}
    for name in ("neg_category_ids", "not_exhaustive_category_ids"):
        listed = [(image, category) for image, one in enumerate(images) for category in one.get(name, ())]
        image, category = np.array(listed, np.int64).reshape(-1, 2).T
        known = np.isin(category, truth.category_ids)
        keys = image[known] * len(categories) + np.searchsorted(truth.category_ids, category[known])
        pairs[name] = np.unique(keys)
    federated = any("neg_category_ids" in one or "not_exhaustive_category_ids" in one for one in images)
    frequencies = tuple(str(one.get("frequency", "")) for one in categories)
    return replace(
        truth,
        federated=federated,
        verified_absent=pairs["neg_category_ids"],
        not_exhaustive=pairs["not_exhaustive_category_ids"],
        frequencies=frequencies,
    )


def _whole_numbers(entries: Sequence[Mapping[str, Any]], field: str, whose: str) -> np.ndarray:
    """[N] int64. Text, fractions and what 64 bits do not hold are a UserError: NumPy would make ids of them."""
    values = [entry[field] for entry in entries]
    found = np.array(values)
    if not values or (found.ndim == 1 and found.dtype.kind == "i"):
        return found.astype(np.int64)
    for value in values:
        if whole_number(value) is None:
            raise UserError(f"{whose} {field} must be a whole number, received {value!r:.80}; fix the file")
    return np.array([whole_number(value) for value in values], np.int64)


def _numbers(entries: Sequence[Mapping[str, Any]], field: str, whose: str) -> np.ndarray:
    """[N, ...] float64; text is a UserError: NumPy would read it."""
    values = [entry[field] for entry in entries]
    found = np.array(values)
    if values and found.dtype.kind not in "iuf":
        wrong = next((value for value in values if np.array(value).dtype.kind not in "iuf"), values[0])
        raise UserError(f"{whose} {field} must be numbers, received {wrong!r:.80}; fix the file")
    return found.astype(np.float64)


def _flags(values: Sequence[Any], what: str) -> np.ndarray:
    """[N] bool, of 0 and 1."""
    for value in values:
        if value not in (0, 1, None):
            raise UserError(f"{what} must be 0 or 1, received {value!r:.80}; fix the file")
    return np.array(values, bool)
