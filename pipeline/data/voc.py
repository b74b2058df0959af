"""Pascal VOC data sets: VOC 2007 and 2012, and any other in their layout with its own classes.

VOC counts pixels from 1 and includes both corners; boxes are kept continuous, (xmin - 1, ymin - 1, xmax, ymax).
An image's id is its place in the lists, from 1; its file name keeps VOC's own name. Directory names are found whatever
their case, images whatever their suffix. Where there are no lists, as annotation tools export it, a split's `images`
and `annotations` name the directories, and every image is in it.
"""

from __future__ import annotations

import os
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


def read_voc(root: str, split: Split, faults: FaultLog) -> SplitSource:
    """Records of the list of a split, or of its directory of images."""
    name = split.set or split.images
    pictures, folder = _directories(root, split)
    images = list_images(pictures)
    by_stem = {os.path.splitext(image)[0]: image for image in images}
    annotations = {entry for entry in storage.list_folder(folder) if entry.endswith(".xml")} if folder else set()
    records, objects = [], []
    for image_id, stem in enumerate(_stems(root, split), start=1):
        image = by_stem.get(stem)
        if image is None:
            faults.add(BadSample(name, stem, f"no image of this name exists in {pictures}; excluded"))
            continue
        if annotations and f"{stem}.xml" not in annotations:
            faults.add(BadSample(name, stem, f"{stem}.xml does not exist, while others do; excluded"))
            continue
        size, found = _parse(storage.join(folder, f"{stem}.xml")) if folder and annotations else ((None, None), [])
        load = partial(read_file, storage.join(pictures, image))
        records.append(Record(image_id, image, load, images[image], Annotations(), *size))
        objects.append(found)
    return number_classes(name, records, objects, faults)


def voc_lists(root: str, split: Split) -> Iterator[tuple[str, str]]:
    """The list of a split, where it has one, and the annotation files of its images."""
    if split.set:
        yield split.set, _list_path(root, split)
    folder = _directories(root, split)[1]
    for stem in _stems(root, split) if folder else ():
        path = storage.join(folder or "", f"{stem}.xml")
        if storage.exists(path):
            yield f"{split.set or split.images}/{stem}.xml", path


def _directories(root: str, split: Split) -> tuple[str, str | None]:
    """The directory of the images, and that of the annotations, or None where there is none."""
    if split.set:
        directory = _directory(root, split)
        return _child(directory, "JPEGImages"), _find_child(directory, "Annotations")
    pictures = storage.join(root, split.images)
    folder = pictures if split.annotations is None else storage.join(root, split.annotations)
    for path in (pictures, folder):
        if not storage.exists(path):
            raise UserError(f"{path} does not exist: check data.root, and the split's `images` and `annotations`")
    return pictures, folder


def _directory(root: str, split: Split) -> str:
    return storage.join(root, (split.set or "").rpartition("/")[0])


def _find_child(directory: str, name: str) -> str | None:
    """A directory of this name, or of one that differs in upper and lower case alone."""
    found = [entry for entry in storage.list_folder(directory) if entry.lower() == name.lower()]
    if not found:
        return None
    return storage.join(directory, name if name in found else found[0])


def _child(directory: str, name: str) -> str:
    found = _find_child(directory, name)
    if found is None:
        raise UserError(f"{directory} has no directory {name}: set data.root to the directory that holds a VOC year")
    return found


def _list_path(root: str, split: Split) -> str:
    """The file that lists the images of a split such as VOC2007/trainval."""
    directory, name = _directory(root, split), (split.set or "").rpartition("/")[2]
    sets = _find_child(directory, "ImageSets") or storage.join(directory, "ImageSets")
    main = _find_child(sets, "Main") or storage.join(sets, "Main")
    return storage.join(main, f"{name}.txt")


def _stems(root: str, split: Split) -> list[str]:
    """Names, without their suffix, of the images of a split."""
    if not split.set:
        return [os.path.splitext(image)[0] for image in list_images(storage.join(root, split.images))]
    path = _list_path(root, split)
    if not storage.exists(path):
        raise UserError(f"VOC list {path} does not exist: set data.root to the directory that holds {split.set}")
    return [line.split()[0] for line in storage.read_bytes(path).decode().splitlines() if line.strip()]


def _parse(path: str) -> tuple[tuple[int | None, int | None], list[tuple[str, tuple[float, ...], int]]]:
    """((width, height), (class, box, difficult) of each object) of an annotation file."""
    try:
        root = ElementTree.fromstring(storage.read_bytes(path))
        sides = [int(float(root.findtext(f"size/{side}") or 0)) or None for side in ("width", "height")]
        return (sides[0], sides[1]), [_read_object(element) for element in root.iter("object")]
    except (ElementTree.ParseError, ValueError) as error:
        raise UserError(f"{path} is not a VOC annotation ({error}): correct it, or take it off the list") from None


def _read_object(element: ElementTree.Element) -> tuple[str, tuple[float, ...], int]:
    box = element.find("bndbox")
    if box is None:
        raise ValueError("an object without a box")
    x1, y1, x2, y2 = (float(box.findtext(corner) or "nan") for corner in ("xmin", "ymin", "xmax", "ymax"))
    return (
        element.findtext("name") or "",
        (x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1),
        int(element.findtext("difficult") or 0),
    )
