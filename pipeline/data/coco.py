"""COCO-format data sets: COCO 2014 and 2017, and any other with its own categories.

trainval35k is two splits: train2014 whole, and val2014 with `ids` naming valminusminival2014. An `ids` file may be a
list of ids, one a line, a JSON list, or an annotation file whose images are meant. test-dev has `image_info` alone.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections import defaultdict
from functools import partial
from typing import Any

from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.faults import FaultLog
from refinedet.pipeline.data.records import Annotation, Record, Source, as_number, fault_of_box, whole_number
from refinedet.pipeline.data.samples import BadSample, Category
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

logger = logging.getLogger(__name__)


def read_coco(data: Data, part: str, splits: tuple[Split, ...], faults: FaultLog) -> Source:
    """Records of `splits` one after the other, each in the order of its image ids."""
    del part
    assert data.root
    categories: dict[int, Category] = {}
    records: list[Record] = []
    seen: dict[int, str] = {}
    ids = _AnnotationIds(faults)
    for split in splits:
        file = split.annotations or split.image_info
        assert file
        content = _load_instances(storage.join(data.root, file), with_annotations=split.annotations is not None)
        _merge_categories(categories, content, file)
        images = _select_images(content, file, data, split)
        ids.next_split()
        objects = _objects_by_image(content, categories, ids, faults, file)
        folder = storage.join(data.root, split.images)
        sizes = _file_sizes(folder, [image["file_name"] for image in images])
        for image in sorted(images, key=lambda image: image["id"]):
            image_id, name = image["id"], image["file_name"]
            if image_id in seen:
                raise UserError(
                    f"image id {image_id} of {file} is already taken in {seen[image_id]}: "
                    "image ids must be unique in data.train and in data.val"
                )
            seen[image_id] = file
            if name not in sizes:
                faults.add(BadSample(file, name, f"image {image_id} has no file in {folder}"))
                continue
            annotations = tuple(objects.get(image_id, ()))
            width, height = image.get("width"), image.get("height")
            for annotation in annotations:
                if fault := fault_of_box(annotation.bbox, width or float("inf"), height or float("inf")):
                    faults.add(BadSample(file, f"annotation {annotation.id}", f"{fault}; it is not learnt from"))
            load = partial(storage.read_bytes, storage.join(folder, name))
            records.append(Record(image_id, name, load, sizes[name], annotations, width, height))
    return Source(tuple(sorted(categories.values())), tuple(records))


def _load_instances(path: str, *, with_annotations: bool) -> dict[str, Any]:
    try:
        content = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise UserError(f"annotation file {path} does not exist: check data.root and the split's files") from None
    except ValueError as error:
        raise UserError(f"annotation file {path} is not JSON ({error}): give a COCO instances file") from None
    wanted = ("images", "categories", "annotations") if with_annotations else ("images", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in wanted):
        received = f"an object with {sorted(content)[:8]}" if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path} is not a COCO file, received {received}: it needs the lists {', '.join(wanted)}")
    for image in content["images"]:
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
                    f"{image[side]!r:.80}; mend the file, or leave width and height out"
                )
    return content


def _merge_categories(categories: dict[int, Category], content: dict[str, Any], file: str) -> None:
    found: dict[int, Category] = {}
    for entry in content["categories"]:
        number = whole_number(entry.get("id")) if isinstance(entry, dict) else None
        if number is None or "name" not in entry:
            raise UserError(f"{file}: every category needs a whole number `id` and a `name`, received {entry!r:.120}")
        category = Category(number, str(entry["name"]))
        if category.id in found:
            raise UserError(f"{file}: category id {category.id} is there twice: give every category its own id")
        found[category.id] = category
    if not found:
        raise UserError(f"{file} has no categories: a detector needs at least one")
    if categories and categories != found:
        raise UserError(f"{file} has other categories than the splits before it: splits of one part must agree")
    categories.update(found)


def _select_images(content: dict[str, Any], file: str, data: Data, split: Split) -> list[dict[str, Any]]:
    by_id: dict[int, dict[str, Any]] = {}
    for image in content["images"]:
        if image["id"] in by_id:
            raise UserError(f"{file}: image id {image['id']} is there twice: image ids must be unique")
        by_id[image["id"]] = image
    if not split.ids:
        return list(by_id.values())
    wanted = read_ids(storage.join(data.root or "", split.ids))
    if missing := [image_id for image_id in wanted if image_id not in by_id]:
        raise UserError(f"{split.ids} names {len(missing)} images that {file} does not have, the first: {missing[0]}")
    return [by_id[image_id] for image_id in dict.fromkeys(wanted)]


def read_ids(path: str) -> list[int]:
    """Image ids of a list file: one a line, a JSON list, or a COCO file whose images are meant."""
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


class _AnnotationIds:
    """Keeps annotation ids positive and unique: COCO's code takes id 0 for "unmatched", and drops repeated ids.

    Files number their annotations each from 1: an id that another split has taken is given a new one, and no fault.
    """

    def __init__(self, faults: FaultLog) -> None:
        self.faults = faults
        self.split = 0
        self.seen: dict[int, int] = {}  # id -> the last split that had it
        self.free = 2**40

    def next_split(self) -> None:
        self.split += 1

    def take(self, received: Any, file: str) -> int:
        number = isinstance(received, int) and (whole_number(received) or 0) > 0
        before = self.seen.get(received) if number else None
        if number:
            self.seen[received] = self.split
            if before is None:
                return received
        self.free += 1
        if not number or before == self.split:
            why = "is there twice" if number else "is not a positive number"
            self.faults.add(BadSample(file, f"annotation {received!r}", f"its id {why}; it goes on as {self.free}"))
        return self.free


def _objects_by_image(
    content: dict[str, Any], categories: dict[int, Category], ids: _AnnotationIds, faults: FaultLog, file: str
) -> dict[int, list[Annotation]]:
    objects: dict[int, list[Annotation]] = defaultdict(list)
    images = {image["id"] for image in content["images"]}
    for place, entry in enumerate(content.get("annotations") or ()):
        if not isinstance(entry, dict):
            faults.add(BadSample(file, f"annotations[{place}]", f"{entry!r:.80} is not an object; left out"))
            continue
        name = f"annotation {entry.get('id')!r:.80}"
        image_id, category_id = whole_number(entry.get("image_id")), whole_number(entry.get("category_id"))
        bbox, crowd = _box(entry.get("bbox")), entry.get("iscrowd")
        fault = None
        if image_id not in images:
            fault = f"image {entry.get('image_id')!r:.80} does not exist"
        elif category_id not in categories:
            fault = f"category {entry.get('category_id')!r:.80} does not exist"
        elif isinstance(bbox, str):
            fault = bbox
        elif crowd not in (0, 1, None):
            fault = f"iscrowd {crowd!r:.80} is neither 0 nor 1"
        if fault or image_id is None or category_id is None or isinstance(bbox, str):
            faults.add(BadSample(file, name, f"{fault}; left out"))
            continue
        area = as_number(entry.get("area"))
        if area is None or not math.isfinite(area):
            area = bbox[2] * bbox[3]
        annotation = Annotation(ids.take(entry.get("id"), file), category_id, bbox, area, int(crowd or 0))
        objects[image_id].append(annotation)
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
    """Bytes of the files in `folder` that are there."""
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
