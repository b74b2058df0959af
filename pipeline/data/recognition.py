"""Recognition of a data set in a local directory or on the hub: its format, and its splits for training and validation.

A format is one function and one entry in `RECOGNISERS`; the first that finds images to train on decides.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from refinedet.pipeline.config.spec import DataFormat, Split
from refinedet.pipeline.data.hub_data import is_hub
from refinedet.pipeline.data.huggingface import find_splits
from refinedet.pipeline.data.images import SUFFIXES
from refinedet.pipeline.data.yolo import NAMES_FILE, read_data_file
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

_VALIDATION = ("val", "validation", "valid", "minival", "test", "testing")
"""names of splits to validate on, the best first"""
_TRAINING = ("trainval", "train", "training")
_DEPTH = 4  # directories below the root that are looked into
_HEAD = 4 * 2**20  # bytes of a JSON or XML file that show its format
_STRING = r'("(?:[^"\\]|\\.)*")'
_YOLO_LINE = re.compile(r"\d+( [\d.e-]+){4,}\s*$", re.MULTILINE)
_COCO_ARRAY = re.compile(r'"(images|annotations|categories)"\s*:\s*\[')
_OTHER_COCO = ("captions", "keypoints", "panoptic", "stuff", "image_info", "densepose")


@dataclass(frozen=True)
class Recognised:
    """A data set: its format, root directory and splits; `val` is empty where it has no validation split."""

    format: DataFormat
    root: str
    train: tuple[Split, ...]
    val: tuple[Split, ...] = ()


def recognise(root: str) -> Recognised:
    """The data set in a directory or on the hub. Raises UserError where it is of no format that is known."""
    if is_hub(root):
        found = _huggingface(root)
        if found and found.train:
            return found
        raise UserError(f"{root} has no parquet files of a split train, val or test: download it to a directory")
    if not storage.is_local(root) or not os.path.isdir(root):
        raise UserError(f"{root} is no directory here: give the directory of a data set")
    root = os.path.abspath(root)
    for recogniser in RECOGNISERS.values():
        found = recogniser(root)
        if found and found.train:
            return found
    if label := next((path for path in _files(root, (".txt",)) if _YOLO_LINE.match(_read_head(path))), None):
        raise UserError(
            f"{root} has YOLO labels ({os.path.relpath(label, root)}) and no data.yaml or {NAMES_FILE}: write "
            f"{os.path.join(root, NAMES_FILE)} with the name of each class on a line, in the order of their numbers"
        )
    count = sum(1 for _ in _files(root, SUFFIXES))
    raise UserError(
        f"{root} has {count} image files and is no data set of a known format ({', '.join(RECOGNISERS)}): give the "
        "directory that holds the images and their annotations"
    )


def _yolo(root: str) -> Recognised | None:
    content = read_data_file(root)
    if content is not None and content.get("names"):
        keys = [key for key in content if content[key] and isinstance(content[key], str | list) and key != "names"]
        train, val = _choose({key: Split(set=key) for key in keys if key in (*_TRAINING, *_VALIDATION)})
        return Recognised("yolo", root, train, val)
    if not os.path.exists(os.path.join(root, NAMES_FILE)):
        return None
    images = ["."] if _holds(root, SUFFIXES) else []
    images = images or [name for name in _directories(root) if _holds(os.path.join(root, name), SUFFIXES)]
    return Recognised("yolo", root, *_choose({name: Split(images=name) for name in images}))


def _huggingface(root: str) -> Recognised | None:
    names = find_splits(root)
    return Recognised("huggingface", root, *_choose({name: Split(set=name) for name in names})) if names else None


def _voc(root: str) -> Recognised | None:
    found: dict[str, Split] = {}
    for name in _directories(root):
        lower = name.lower()
        directory, _, last = name.rpartition("/")
        if last.lower() != "main" or not lower.endswith("imagesets/main"):
            continue
        year = directory.rpartition("/")[0] if "/" in directory else ""
        for path in sorted(glob.glob(os.path.join(glob.escape(os.path.join(root, name)), "*.txt"))):
            stem = os.path.splitext(os.path.basename(path))[0]
            if "_" not in stem:  # aeroplane_train is VOC's list of one class
                found[f"{year}/{stem}".lstrip("/")] = Split(set=f"{year}/{stem}".lstrip("/"))
    if not found:
        return _voc_without_lists(root)
    # VOC2012/val names its year, and with it the metric: the root is the directory that holds the years.
    above = os.path.commonpath([os.path.dirname(os.path.dirname(name)) or "." for name in found])
    splits = {name: Split(set=os.path.relpath(name, above)) for name in found}
    return Recognised("voc", os.path.normpath(os.path.join(root, above)), *_choose(splits))


def _voc_without_lists(root: str) -> Recognised | None:
    """Directories of images with XML files of the same names beside them, or in another directory."""
    directories = [".", *_directories(root)]
    stems: dict[str, set[str]] = {}
    for name in directories:
        labels = [entry.name for entry in _entries(os.path.join(root, name)) if entry.name.endswith(".xml")]
        if labels and re.search(r"<annotation\b", _read_head(os.path.join(root, name, min(labels)))):
            stems[name] = {os.path.splitext(label)[0] for label in labels}
    found: dict[str, Split] = {}
    for name in directories if stems else ():
        files = [entry.name for entry in _entries(os.path.join(root, name))]
        images = {os.path.splitext(file)[0] for file in files if file.lower().endswith(SUFFIXES)}
        labels = max(stems, key=lambda other: (len(images & stems[other]), other == name))
        if images & stems[labels]:
            found[name] = Split(images=name, annotations=None if labels == name else labels)
    return Recognised("voc", root, *_choose(found)) if found else None


def _coco(root: str) -> Recognised | None:
    images = [".", *(name for name in _directories(root) if _holds(os.path.join(root, name), SUFFIXES))]
    found: dict[str, Split] = {}
    lvis = False
    for path in _files(root, (".json",)):
        head = _read_head(path)
        if any(word in os.path.basename(path) for word in _OTHER_COCO) or not _COCO_ARRAY.search(head):
            continue
        relative = os.path.relpath(path, root)
        if name := re.search(rf'"file_name"\s*:\s*{_STRING}', head):
            choices = (os.path.dirname(relative) or ".", *images)
        elif name := re.search(rf'"coco_url"\s*:\s*{_STRING}', head):  # LVIS: its last two parts name the file
            choices, lvis = (".", *_directories(root)), True
        else:
            continue
        file_name = "/".join(json.loads(name[1]).split("/")[-2:]) if lvis else json.loads(name[1])
        directory = next((each for each in choices if os.path.exists(os.path.join(root, each, file_name))), None)
        if directory:
            found[relative] = Split(images=directory, annotations=relative)
    return Recognised("lvis" if lvis else "coco", root, *_choose(found)) if found else None


def _cvat(root: str) -> Recognised | None:
    found: dict[str, Split] = {}
    for path in _files(root, (".xml",)):
        head = _read_head(path)
        name = re.search(r'<image\b[^>]*\bname="([^"]+)"', head)
        if "<annotations" not in head or not name:
            continue
        relative = os.path.relpath(path, root)
        beside = os.path.dirname(relative)
        for directory in ("", "images", beside, os.path.join(beside, "images")):
            if os.path.exists(os.path.join(root, directory, name[1])):
                found[relative] = Split(images=directory, annotations=relative)
                break
    return Recognised("cvat", root, *_choose(found)) if found else None


def _labelme(root: str) -> Recognised | None:
    found: dict[str, Split] = {}
    for name in (".", *_directories(root)):
        directory = os.path.join(root, name)
        labels = [entry for entry in sorted(os.listdir(directory)) if entry.endswith(".json")]
        images = {os.path.splitext(entry)[0] for entry in os.listdir(directory) if entry.lower().endswith(SUFFIXES)}
        own = [label for label in labels if os.path.splitext(label)[0] in images]
        if own and '"shapes"' in _read_head(os.path.join(directory, own[0])):
            found[name] = Split(images=name)
    return Recognised("labelme", root, *_choose(found)) if found else None


def _webdataset(root: str) -> Recognised | None:
    patterns = {}
    for path in _files(root, (".tar",)):
        relative = os.path.relpath(path, root)
        stem = re.sub(r"[-_]?\d+\.tar$", "", relative).removesuffix(".tar")
        patterns[stem or "*"] = Split(images=f"{stem}*.tar" if stem != relative.removesuffix(".tar") else relative)
    return Recognised("webdataset", root, *_choose(patterns)) if patterns else None


RECOGNISERS: dict[DataFormat, Callable[[str], Recognised | None]] = {
    "yolo": _yolo,
    "huggingface": _huggingface,
    "voc": _voc,
    "coco": _coco,
    "cvat": _cvat,
    "labelme": _labelme,
    "webdataset": _webdataset,
}


def _choose(splits: dict[str, Split]) -> tuple[tuple[Split, ...], tuple[Split, ...]]:
    """Splits to train and to validate on, by the words in their names; a name without either word is trained on.

    Of several that could be validated on, the best of `_VALIDATION` is; the others are excluded. `trainval` is the
    union of train and val: it is trained on where the only other list is test.
    """
    words = {name: re.split(r"[^a-z]+", name.lower()) for name in splits}
    training = [name for name, own in words.items() if "train" in own or "training" in own]
    union = [name for name, own in words.items() if "trainval" in own]
    held = [[name for name, own in words.items() if word in own and name not in training] for word in _VALIDATION]
    held = [names for names in held if names]
    validation = held[0] if held else []
    train = training or union or [name for name in splits if not any(name in names for names in held)]
    if not train and len(held) > 1:
        train, validation = held[0], held[1]
    return tuple(splits[name] for name in train), tuple(splits[name] for name in validation if name not in train)


def _directories(root: str) -> Iterator[str]:
    """Paths below `root` of the directories in it, hidden ones excluded, to a depth of `_DEPTH`."""
    for top, names, _ in os.walk(root):
        names[:] = sorted(name for name in names if not name.startswith("."))
        relative = os.path.relpath(top, root)
        if relative != ".":
            yield relative
        if relative.count(os.sep) >= _DEPTH - 1:
            names.clear()


def _files(root: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    for directory in (root, *(os.path.join(root, name) for name in _directories(root))):
        for entry in sorted(os.listdir(directory)):
            if entry.lower().endswith(suffixes):
                yield os.path.join(directory, entry)


def _holds(directory: str, suffixes: tuple[str, ...]) -> bool:
    return any(entry.name.lower().endswith(suffixes) for entry in _entries(directory))


def _entries(directory: str) -> Iterable[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        yield from entries


def _read_head(path: str) -> str:
    with open(path, "rb") as file:
        return file.read(_HEAD).decode("utf-8", "replace")
