"""LabelMe data sets: a JSON file beside each image, with shapes in pixels.

Rectangles, polygons and circles become boxes; points and lines have no area, are counted and excluded.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

from refinedet.pipeline.config.spec import Split
from refinedet.pipeline.data.annotations import Annotations, Record, SplitSource, number_classes
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.image_files import list_sizes
from refinedet.pipeline.data.images import SUFFIXES
from refinedet.pipeline.data.remote import read_file
from refinedet.pipeline.data.samples import BadSample
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

_WITH_AREA = ("rectangle", "polygon", "circle", "mask", "")


def read_labelme(root: str, split: Split, faults: FaultLog) -> SplitSource:
    """Records of a directory, in the order of its images' paths. An image without a JSON file has no objects."""
    directory = storage.join(root, split.images)
    files = list_sizes(directory)
    if not files:
        raise UserError(f"{directory} does not exist or is empty: check data.root and the split's `images`")
    records, objects = [], []
    images = [name for name in files if name.lower().endswith(SUFFIXES)]
    for image_id, name in enumerate(images, start=1):
        label = f"{os.path.splitext(name)[0]}.json"
        size, found = ((None, None), [])
        if label in files:
            size, found = _read_labels(storage.join(directory, label), split.images, name, faults)
        load = partial(read_file, storage.join(directory, name))
        records.append(Record(image_id, name, load, files[name], Annotations(), *size))
        objects.append(found)
    return number_classes(split.images, records, objects, faults)


def labelme_lists(root: str, split: Split) -> Iterator[tuple[str, str]]:
    """The JSON files of a directory."""
    directory = storage.join(root, split.images)
    for name in list_sizes(directory):
        if name.endswith(".json"):
            yield name, storage.join(directory, name)


def _read_labels(
    path: str, split: str, image: str, faults: FaultLog
) -> tuple[tuple[int | None, int | None], list[tuple[str, tuple[float, ...], int]]]:
    try:
        content: Any = json.loads(storage.read_bytes(path))
        size = (content.get("imageWidth"), content.get("imageHeight"))
        found = []
        for number, shape in enumerate(content["shapes"], start=1):
            kind = shape.get("shape_type") or ""
            if kind not in _WITH_AREA:
                faults.add(BadSample(split, f"{image}, shape {number}", f"a {kind} has no area; excluded"))
            else:
                found.append((str(shape["label"]), _box(shape["points"], kind), int(bool(shape.get("difficult")))))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"{path} is not a LabelMe file ({type(error).__name__}: {error}): correct or remove it"
        ) from None
    return size, found


def _box(points: list[list[float]], kind: str) -> tuple[float, float, float, float]:
    if kind == "circle":  # its centre, and a point on it
        (x, y), (edge_x, edge_y) = points
        radius = math.hypot(edge_x - x, edge_y - y)
        return x - radius, y - radius, 2 * radius, 2 * radius
    xs, ys = [float(x) for x, _ in points], [float(y) for _, y in points]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
