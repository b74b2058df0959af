"""Pascal VOC data sets: VOC 2007 and 2012, and any other in their layout with its own classes.

VOC counts pixels from 1 and includes both corners; boxes are kept continuous, (xmin - 1, ymin - 1, xmax, ymax).
An image's id is its place in the lists, from 1; its file name keeps VOC's own name.
"""

from __future__ import annotations

import os
from functools import partial
from xml.etree import ElementTree

from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.faults import FaultLog
from refinedet.pipeline.data.records import Annotation, Record, Source, fault_of_box
from refinedet.pipeline.data.samples import BadSample, Category
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class _Object:
    """One `object` element, before the classes are known."""

    def __init__(self, element: ElementTree.Element) -> None:
        box = element.find("bndbox")
        if box is None:
            raise ValueError("an object without a box")
        x1, y1, x2, y2 = (float(box.findtext(corner) or "nan") for corner in ("xmin", "ymin", "xmax", "ymax"))
        self.bbox = (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1)
        self.name = (element.findtext("name") or "").strip()
        self.difficult = int(element.findtext("difficult") or 0)


def read_voc(data: Data, part: str, splits: tuple[Split, ...], faults: FaultLog) -> Source:
    """Records of the lists of `splits`, one after the other."""
    assert data.root
    found = [item for split in splits for item in _list_images(data.root, split)]
    # The classes of all parts: training and validation must number them alike.
    others = [
        item for split in (*data.train, *data.val) if split not in splits for item in _list_images(data.root, split)
    ]
    parsed = {xml: _parse(xml) for _, xml in {*found, *others}}
    names = {entry.name for annotation in parsed.values() if annotation for entry in annotation[1]}
    ordered = VOC_CLASSES if names <= set(VOC_CLASSES) else tuple(sorted(names - {""}))
    ids = {name: number for number, name in enumerate(ordered, start=1)}
    annotated = any(parsed[xml] for _, xml in found)
    records, next_id = [], 1
    for image_id, (image, xml) in enumerate(found, start=1):
        name = os.path.basename(image)
        if not storage.exists(image):
            faults.add(BadSample(part, name, f"{image} does not exist; left out"))
            continue
        annotation = parsed[xml]
        if annotated and annotation is None:
            faults.add(BadSample(part, name, f"{xml} does not exist, while others do; left out"))
            continue
        size, objects = annotation or ((None, None), [])
        annotations = []
        for entry in objects:
            fault = fault_of_box(entry.bbox, *(side or float("inf") for side in size))
            if entry.name not in ids:
                fault = "an object without a class name"
            if fault:
                faults.add(BadSample(part, name, f"{fault}; it is not learnt from"))
            if entry.name in ids and all(value == value for value in entry.bbox):
                area = entry.bbox[2] * entry.bbox[3]
                annotations.append(Annotation(next_id, ids[entry.name], entry.bbox, area, 0, entry.difficult))
                next_id += 1
        load = partial(storage.read_bytes, image)
        fs, path = storage.filesystem(image)
        records.append(Record(image_id, name, load, fs.size(path) or 0, tuple(annotations), *size))
    return Source(tuple(Category(number, name) for name, number in ids.items()), tuple(records))


def list_path(root: str, split: Split) -> str:
    """The file that lists the images of a split such as VOC2007/trainval."""
    year, _, name = (split.set or "").rpartition("/")
    return storage.join(root, year, "ImageSets", "Main", f"{name}.txt")


def _list_images(root: str, split: Split) -> list[tuple[str, str]]:
    """(image, annotation) paths of a split."""
    year = (split.set or "").rpartition("/")[0]
    folder = storage.join(root, year)
    path = list_path(root, split)
    if not storage.exists(path):
        raise UserError(f"VOC list {path} does not exist: set data.root to the folder that holds {year or 'the year'}")
    stems = [line.split()[0] for line in storage.read_bytes(path).decode().splitlines() if line.strip()]
    return [
        (storage.join(folder, "JPEGImages", f"{stem}.jpg"), storage.join(folder, "Annotations", f"{stem}.xml"))
        for stem in stems
    ]


def _parse(path: str) -> tuple[tuple[int | None, int | None], list[_Object]] | None:
    """((width, height), objects) of an annotation file; None where there is none, as for VOC 2012's test set."""
    if not storage.exists(path):
        return None
    try:
        root = ElementTree.fromstring(storage.read_bytes(path))
        sides = [int(float(root.findtext(f"size/{side}") or 0)) or None for side in ("width", "height")]
        return (sides[0], sides[1]), [_Object(element) for element in root.iter("object")]
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path} is not a VOC annotation ({error}): mend it, or take it off the list") from None
