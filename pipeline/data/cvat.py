"""CVAT data sets: "CVAT for images", one XML file for all images, with shapes in pixels.

Boxes, polygons and masks' boxes become objects; a rotated box becomes its extent. Points and polylines are excluded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from xml.etree import ElementTree

from refinedet.pipeline.config.spec import Split
from refinedet.pipeline.data.annotations import Annotations, Record, SplitSource, number_classes
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.image_files import list_images
from refinedet.pipeline.data.remote import read_file
from refinedet.pipeline.data.samples import BadSample
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError


def read_cvat(root: str, split: Split, faults: FaultLog) -> SplitSource:
    """Records of the images that the XML file lists, in its order."""
    file = split.annotations or ""
    path = storage.join(root, file)
    try:
        document = ElementTree.fromstring(storage.read_bytes(path))
        listed = [(element, *_read_image(element)) for element in document.iter("image")]
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check data.root and the split's `annotations`") from None
    except (ElementTree.ParseError, ValueError, KeyError) as error:
        raise UserError(
            f"{path} is not a CVAT file for images ({type(error).__name__}: {error}): export again"
        ) from None
    if not listed:
        raise UserError(f"{path} lists no image: export as `CVAT for images`, not as a video")
    directory = storage.join(root, split.images) if split.images else root
    sizes = list_images(directory)
    records, objects = [], []
    for image_id, (element, name, size, found) in enumerate(listed, start=1):
        if name not in sizes:
            faults.add(BadSample(file, name, f"no such image exists in {directory}; excluded"))
            continue
        load = partial(read_file, storage.join(directory, name))
        records.append(Record(image_id, name, load, sizes[name], Annotations(), *size))
        objects.append(found)
        for kind in ("points", "polyline"):
            for _ in element.iter(kind):
                faults.add(BadSample(file, name, f"{kind} have no area; excluded"))
    names = [label.text or "" for label in document.findall("./meta//labels/label/name")]
    return number_classes(file, records, objects, faults, names)


def cvat_lists(root: str, split: Split) -> Iterator[tuple[str, str]]:
    """The XML file."""
    yield split.annotations or "", storage.join(root, split.annotations or "")


def _read_image(
    element: ElementTree.Element,
) -> tuple[str, tuple[int, int], list[tuple[str, tuple[float, ...], int]]]:
    found = []
    for shape in element:
        if shape.tag == "box":
            x1, y1, x2, y2 = (float(shape.attrib[key]) for key in ("xtl", "ytl", "xbr", "ybr"))
            box = _extent(x1, y1, x2, y2, float(shape.get("rotation") or 0))
        elif shape.tag == "polygon":
            points = [tuple(map(float, pair.split(","))) for pair in shape.attrib["points"].split(";")]
            xs, ys = [x for x, _ in points], [y for _, y in points]
            box = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
        elif shape.tag == "mask":
            box = (*(float(shape.attrib[key]) for key in ("left", "top", "width", "height")),)
        else:
            continue
        found.append((shape.attrib["label"], box, 0))
    return element.attrib["name"], (int(element.attrib["width"]), int(element.attrib["height"])), found


def _extent(x1: float, y1: float, x2: float, y2: float, degrees: float) -> tuple[float, ...]:
    """COCO box around a box that is turned about its centre."""
    angle = math.radians(degrees)
    w, h = x2 - x1, y2 - y1
    wide = abs(w * math.cos(angle)) + abs(h * math.sin(angle))
    high = abs(w * math.sin(angle)) + abs(h * math.cos(angle))
    return ((x1 + x2 - wide) / 2, (y1 + y2 - high) / 2, wide, high) if degrees else (x1, y1, w, h)
