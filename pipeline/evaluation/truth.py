"""Ground truth of a COCO instances file, as columns.

G objects, I images, K categories.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from refinedet.pipeline.data.records import whole_number
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroundTruth:
    """Objects of a COCO instances file, in the file's order; those of unlisted images or categories are left out.

    image_ids     [I] int64, ascending, unique
    category_ids  [K] int64, ascending, unique
    names         K category names, unique
    image_id, category_id, annotation_id  [G] int64
    bbox          [G, 4] float64 xywh
    area          [G] float64: the annotation's own (of its mask), not the box's
    crowd         [G] bool
    difficult     [G] bool: VOC's flag; COCO's numbers do not look at it
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

    def __len__(self) -> int:
        return len(self.area)

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


def _from_coco(source: Mapping[str, Any], name: str) -> GroundTruth:
    image_ids = np.unique(_whole_numbers(source["images"], "id", f"{name}: an image's"))
    numbers = _whole_numbers(source["categories"], "id", f"{name}: a category's").tolist()
    categories = {number: str(category["name"]) for number, category in zip(numbers, source["categories"], strict=True)}
    category_ids = np.array(sorted(categories), np.int64)
    names = [categories[category] for category in category_ids.tolist()]
    if len(set(names)) < len(names):
        names = [f"{word} ({category})" for word, category in zip(names, category_ids.tolist(), strict=True)]

    annotations = source["annotations"]
    whose = f"{name}: an annotation's"
    annotation_id = _whole_numbers(annotations, "id", whose)
    if len(np.unique(annotation_id)) < len(annotation_id):
        values, counts = np.unique(annotation_id, return_counts=True)
        raise UserError(
            f"{name}: annotation id {values[counts.argmax()]} is used {counts.max()} times; ids must be unique, "
            "number the annotations from 1"
        )
    if (annotation_id == 0).any():
        logger.warning(
            "%s: an annotation has the id 0, which the COCO API counts as found by nobody; its detection becomes a "
            "false positive here too. Number the annotations from 1.",
            name,
        )
    truth = GroundTruth(
        image_ids=image_ids,
        category_ids=category_ids,
        names=tuple(names),
        image_id=_whole_numbers(annotations, "image_id", whose),
        category_id=_whole_numbers(annotations, "category_id", whose),
        annotation_id=annotation_id,
        bbox=_numbers(annotations, "bbox", whose).reshape(-1, 4),
        area=_numbers(annotations, "area", whose),
        crowd=_flags([annotation.get("iscrowd", 0) for annotation in annotations], f"{whose} iscrowd"),
        difficult=_flags([one.get("difficult", one.get("ignore", 0)) for one in annotations], f"{whose} difficult"),
    )
    if len(truth.bbox) != len(truth) or not (np.isfinite(truth.bbox).all() and np.isfinite(truth.area).all()):
        raise UserError(f"{name}: every bbox must be four finite numbers and every area finite; mend the file")
    listed = np.isin(truth.image_id, image_ids) & np.isin(truth.category_id, category_ids)
    if listed.all():
        return truth
    logger.warning(
        "%s: %d annotations of images or categories that the file does not list are left out", name, (~listed).sum()
    )
    return GroundTruth(
        image_ids,
        category_ids,
        truth.names,
        truth.image_id[listed],
        truth.category_id[listed],
        truth.annotation_id[listed],
        truth.bbox[listed],
        truth.area[listed],
        truth.crowd[listed],
        truth.difficult[listed],
    )


def _whole_numbers(entries: Sequence[Mapping[str, Any]], field: str, whose: str) -> np.ndarray:
    """[N] int64. Text, fractions and what 64 bits do not hold are a UserError: NumPy would make ids of them."""
    values = [entry[field] for entry in entries]
    found = np.array(values)
    if not values or (found.ndim == 1 and found.dtype.kind == "i"):
        return found.astype(np.int64)
    for value in values:
        if whole_number(value) is None:
            raise UserError(f"{whose} {field} must be a whole number, received {value!r:.80}; mend the file")
    return np.array([whole_number(value) for value in values], np.int64)


def _numbers(entries: Sequence[Mapping[str, Any]], field: str, whose: str) -> np.ndarray:
    """[N, ...] float64; text is a UserError: NumPy would read it."""
    values = [entry[field] for entry in entries]
    found = np.array(values)
    if values and found.dtype.kind not in "iuf":
        wrong = next((value for value in values if np.array(value).dtype.kind not in "iuf"), values[0])
        raise UserError(f"{whose} {field} must be numbers, received {wrong!r:.80}; mend the file")
    return found.astype(np.float64)


def _flags(values: Sequence[Any], what: str) -> np.ndarray:
    """[N] bool, of 0 and 1."""
    for value in values:
        if value not in (0, 1, None):
            raise UserError(f"{what} must be 0 or 1, received {value!r:.80}; mend the file")
    return np.array(values, bool)
