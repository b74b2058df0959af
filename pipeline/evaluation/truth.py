"""Ground truth of a COCO instances file, as columns.

G objects, I images, K categories.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.errors import UserError

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
        except (KeyError, TypeError, ValueError) as error:
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
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{what}: {path} is not whole JSON ({error}); write or copy it again") from None


def _from_coco(source: Mapping[str, Any], name: str) -> GroundTruth:
    image_ids = np.unique(np.array([image["id"] for image in source["images"]], np.int64))
    categories = {int(category["id"]): str(category["name"]) for category in source["categories"]}
    category_ids = np.array(sorted(categories), np.int64)
    names = [categories[category] for category in category_ids.tolist()]
    if len(set(names)) < len(names):
        names = [f"{word} ({category})" for word, category in zip(names, category_ids.tolist(), strict=True)]

    annotations = source["annotations"]
    annotation_id = np.array([annotation["id"] for annotation in annotations], np.int64)
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
        image_id=np.array([annotation["image_id"] for annotation in annotations], np.int64),
        category_id=np.array([annotation["category_id"] for annotation in annotations], np.int64),
        annotation_id=annotation_id,
        bbox=np.array([annotation["bbox"] for annotation in annotations], np.float64).reshape(-1, 4),
        area=np.array([annotation["area"] for annotation in annotations], np.float64),
        crowd=np.array([bool(annotation.get("iscrowd", 0)) for annotation in annotations], bool),
        difficult=np.array([bool(one.get("difficult", one.get("ignore", 0))) for one in annotations], bool),
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
