"""COCO-format data sets: COCO 2014 and 2017, LVIS, and any other with its own categories.

trainval35k is two splits: train2014 whole, and val2014 with `ids` naming valminusminival2014. An `ids` file may be a
list of ids, one per line, a JSON list, or an annotation file whose images are meant. test-dev has `image_info` alone.
LVIS names its images by `coco_url`: the last two parts, as train2017/000000391895.jpg, under `images`.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, cast

from refinedet.pipeline.config.spec import Split
from refinedet.pipeline.data.annotations import (
    Annotation,
    Annotations,
    Record,
    SplitSource,
    as_number,
    fault_of_box,
    whole_number,
)
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.json_arrays import iterate_members
from refinedet.pipeline.data.remote import read_file
from refinedet.pipeline.data.samples import BadSample, Category
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

_ANNOTATION = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
_IMAGE = ("id", "file_name", "coco_url", "width", "height")


class _Content(NamedTuple):
    """Contents of an annotation file, without masks, which are skipped as it is read."""

    images: list[dict[str, Any]]
    categories: dict[int, Category]
    annotations: _Entries


class _Entries:
    """Annotations of a file as they were read, in 73 bytes each; those of unexpected types as they are."""

    _ROW = struct.Struct("<3q5db")

    def __init__(self) -> None:
        self._packed = bytearray()
        self._odd: dict[int, Any] = {}
        """by place: the values of `_ANNOTATION`, or a list of what stands in the place of an object"""
        self._count = 0

    def append(self, entry: Any) -> None:
        values = tuple(map(entry.get, _ANNOTATION)) if isinstance(entry, dict) else [entry]
        try:
            number, image, category, box, area, crowd = values
            numeric = (*cast(list[Any], box), 0.0 if area is None else area)
            if not {*map(type, (number, image, category))} == {int} or not {*map(type, numeric)} <= {int, float}:
                raise TypeError
            area = math.nan if area is None else area
            row = self._ROW.pack(number, image, category, *numeric[:-1], area, {None: 0, 0: 0, 1: 1}[crowd])
        except (TypeError, ValueError, KeyError, struct.error, OverflowError):
            self._odd[self._count], row = values, bytes(self._ROW.size)
        self._packed += row
        self._count += 1

    def __iter__(self) -> Iterator[Any]:
        for place, (number, image, category, x, y, w, h, area, crowd) in enumerate(self._ROW.iter_unpack(self._packed)):
            yield self._odd.get(place) or (number, image, category, [x, y, w, h], area, crowd)


def read_coco(root: str, split: Split, faults: FaultLog) -> SplitSource:
    """Records of a split in the order of its image ids."""
    file = split.annotations or split.image_info
    assert file
    content = _load_instances(storage.join(root, file), file, with_annotations=split.annotations is not None)
    images = _select_images(content.images, file, root, split)
    objects = _objects_by_image(content, faults, file)
    folder = storage.join(root, split.images)
    sizes = _file_sizes(folder, [image["file_name"] for image in images])
    records = []
    for image in sorted(images, key=lambda image: image["id"]):
        image_id, name = image["id"], image["file_name"]
        if name not in sizes:
            faults.add(BadSample(file, name, f"image {image_id} has no file in {folder}"))
            continue
        load = partial(read_file, storage.join(folder, name))
        annotations = objects.pop(image_id, None) or Annotations()
        records.append(Record(image_id, name, load, sizes[name], annotations, image.get("width"), image.get("height")))
    return SplitSource(tuple(sorted(content.categories.values())), tuple(records), file, fixed_ids=True)


def coco_lists(root: str, split: Split) -> Iterator[tuple[str, str]]:
    """Annotation and id files of a split."""
    for name in (split.annotations, split.image_info, split.ids):
        if name:
            yield name, storage.join(root, name)


def _load_instances(path: str, file: str, *, with_annotations: bool) -> _Content:
    found: dict[str, Any] = {}
    try:
        for name, value, element in iterate_members(path):
            if not element:
                found[name] = value
            elif name == "annotations":
                found.setdefault(name, _Entries()).append(value)
            elif name == "images":
                kept = {key: value[key] for key in _IMAGE if key in value} if isinstance(value, dict) else value
                found.setdefault(name, []).append(kept)
            elif name == "categories":
                found.setdefault(name, []).append(value)
            else:
                found[name] = []  # licences and the like are not kept
    except FileNotFoundError:
        raise UserError(f"annotation file {path} does not exist: check data.root and the split's files") from None
    except ValueError as error:
        raise UserError(f"annotation file {path} is not JSON ({error}): give a COCO instances file") from None
    wanted = ("images", "categories", "annotations") if with_annotations else ("images", "categories")
    if not all(isinstance(found.get(key), list | _Entries) for key in wanted):
        received = f"an object with {sorted(found)[:8]}"
        raise UserError(f"{path} is not a COCO file, received {received}: it needs the lists {', '.join(wanted)}")
    for image in found["images"]:
        _check_image(image, path)
    return _Content(
        found["images"], _read_categories(found["categories"], file), found.get("annotations") or _Entries()
    )


def _check_image(image: Any, path: str) -> None:
    """Check an image's id and sizes; name the file of one that has only a `coco_url`."""
    if isinstance(image, dict) and "file_name" not in image and isinstance(image.get("coco_url"), str):
        image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
    if not (
        isinstance(image, dict)
        and isinstance(image.get("id"), int)
        and whole_number(image["id"]) is not None
        and isinstance(image.get("file_name"), str)
    ):
        raise UserError(f"{path}: every image needs a whole number `id` and a `file_name`, received {image!r:.120}")
    for side in ("width", "height"):
        size = whole_number(image.get(side) or 0)  # none, or zero: unknown
        if size is None or size < 0:
            raise UserError(
                f"{path}: the {side} of image {image['id']} must be a whole number of pixels, received "
                f"{image[side]!r:.80}; correct the file, or leave width and height out"
            )


def _read_categories(entries: list[Any], file: str) -> dict[int, Category]:
    found: dict[int, Category] = {}
    for entry in entries:
        number = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        if number is None or "name" not in entry:
            raise UserError(f"{file}: every category needs a whole number `id` and a `name`, received {entry!r:.120}")
        if number in found:
            raise UserError(f"{file}: category id {number} occurs twice: give every category its own id")
        found[number] = Category(number, str(entry["name"]))
    if not found:
        raise UserError(f"{file} has no categories: a detector needs at least one")
    return found


def _select_images(images: list[dict[str, Any]], file: str, root: str, split: Split) -> list[dict[str, Any]]:
    by_id: dict[int, dict[str, Any]] = {}
    for image in images:
        if image["id"] in by_id:
            raise UserError(f"{file}: image id {image['id']} occurs twice: image ids must be unique")
        by_id[image["id"]] = image
    if not split.ids:
        return list(by_id.values())
    wanted = read_ids(storage.join(root, split.ids))
    if missing := [image_id for image_id in wanted if image_id not in by_id]:
        raise UserError(f"{split.ids} names {len(missing)} images that {file} does not have, the first: {missing[0]}")
    return [by_id[image_id] for image_id in dict.fromkeys(wanted)]


def read_ids(path: str) -> list[int]:
    """Image ids of a list file: one per line, a JSON list, or a COCO file whose images are meant."""
    try:
        text = storage.read_bytes(path).decode()
    except FileNotFoundError:
        raise UserError(f"list of image ids {path} does not exist: check the split's `ids`") from None
    try:
        if text.lstrip()[:1] in ("[", "{"):
            content = json.loads(text)
            listed = [entry["id"] for entry in content["images"]] if isinstance(content, dict) else content
            ids = [(whole_number(entry), entry) for entry in listed]
            if wrong := [entry for number, entry in ids if number is None]:
                raise ValueError(f"{wrong[0]!r:.80} is no whole number")
            return [number for number, _ in ids if number is not None]
        return [int(line) for line in text.split()]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a list of image ids ({error}): give one id a line, or a JSON list") from None


def _objects_by_image(content: _Content, faults: FaultLog, file: str) -> dict[int, Annotations]:
    objects: dict[int, Annotations] = defaultdict(Annotations)
    images = {image["id"] for image in content.images}
    for place, entry in enumerate(content.annotations):
        if not isinstance(entry, tuple):
            faults.add(BadSample(file, f"annotations[{place}]", f"{entry[0]!r:.80} is not an object; excluded"))
            continue
        received_id, received_image, received_category, received_box, received_area, crowd = entry
        image_id, category_id = whole_number(received_image), whole_number(received_category)
        bbox = _box(received_box)
        fault = None
        if image_id not in images:
            fault = f"image {received_image!r:.80} does not exist"
        elif category_id not in content.categories:
            fault = f"category {received_category!r:.80} does not exist"
        elif isinstance(bbox, str):
            fault = bbox
        elif crowd not in (0, 1, None):
            fault = f"iscrowd {crowd!r:.80} is neither 0 nor 1"
        if fault or image_id is None or category_id is None or isinstance(bbox, str):
            faults.add(BadSample(file, f"annotation {received_id!r:.80}", f"{fault}; excluded"))
            continue
        area = as_number(received_area)
        if area is None or not math.isfinite(area):
            area = bbox[2] * bbox[3]
        objects[image_id].append(Annotation(received_id, category_id, bbox, area, int(crowd or 0)))
    return objects


def _box(received: Any) -> tuple[float, float, float, float] | str:
    """The four finite numbers of a box, or why it has none."""
    values = [as_number(value) for value in received] if isinstance(received, list) else [None]
    if None in values:
        return f"box {received!r:.80} is not four numbers"
    found = tuple(value for value in values if value is not None)
    if len(found) != 4 or not all(map(math.isfinite, found)):
        return fault_of_box(found) or ""
    return found


def _file_sizes(folder: str, names: list[str]) -> dict[str, int]:
    """Bytes of those files that exist in `folder`."""
    sizes: dict[str, int] = {}
    if storage.is_local(folder):
        for name in names:
            try:
                sizes[name] = os.stat(os.path.join(folder, name)).st_size
            except OSError:
                continue
    else:
        fs, inner = storage.filesystem(folder)
        found: Any = fs.find(inner, detail=True)
        for path, info in found.items():
            sizes[path[len(inner.rstrip("/")) + 1 :]] = int(info["size"])
    return sizes
