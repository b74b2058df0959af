"""YOLO data sets: a text file per image, one object a line: class number, centre x, centre y, width, height in 0..1.

`set` names a key of `data.yaml` (train, val, test) with a directory, a list file, or several; `images` is a directory
itself. Labels lie where `images` in the path is replaced by `labels`, or else beside the image. An image without a
label file, or with an empty one, has no objects. Five numbers are a box; longer lines are the outline of a mask, whose
extent is the box.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import yaml
from refinedet.pipeline.config.spec import Split
from refinedet.pipeline.data.annotations import Annotations, Record, SplitSource, number_classes
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.image_files import list_sizes
from refinedet.pipeline.data.images import SUFFIXES, read_header
from refinedet.pipeline.data.remote import read_file
from refinedet.pipeline.data.samples import BadSample
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

DATA_FILES = ("data.yaml", "data.yml", "dataset.yaml")
NAMES_FILE = "classes.txt"


def read_yolo(root: str, split: Split, faults: FaultLog) -> SplitSource:
    """Records of a split, in the order of their paths."""
    names = _class_names(root)
    name = split.set or split.images
    records, objects = [], []
    sizes: dict[str, dict[str, int]] = {}
    for image_id, path in enumerate(_image_paths(root, split), start=1):
        directory, file = os.path.split(path)
        if directory not in sizes:
            sizes[directory] = list_sizes(directory)
        if file not in sizes[directory]:
            faults.add(BadSample(name, file, f"{path} does not exist; excluded"))
            continue
        load = partial(read_file, path)
        labels = _label_path(path)
        found: list[tuple[str, tuple[float, ...], int]] = []
        size: tuple[int | None, int | None] = (None, None)
        if labels:
            header = read_header(load())
            if header is not None:
                size = (header.width, header.height)
                found = _read_labels(labels, names, size)
        file_name = os.path.relpath(path, root) if storage.is_local(root) else file
        records.append(Record(image_id, file_name, load, sizes[directory][file], Annotations(), *size))
        objects.append(found)
    return number_classes(name, records, objects, faults, names)


def yolo_lists(root: str, split: Split) -> Iterator[tuple[str, str]]:
    """data.yaml or classes.txt, and the label file of every image of a split."""
    for file in (*DATA_FILES, NAMES_FILE):
        if storage.exists(storage.join(root, file)):
            yield file, storage.join(root, file)
    for path in _image_paths(root, split):
        labels = _label_path(path)
        yield (path[len(root) :], labels) if labels else (path[len(root) :], os.devnull)


def read_data_file(root: str) -> dict[str, Any] | None:
    """The content of data.yaml, where there is one."""
    for file in DATA_FILES:
        path = storage.join(root, file)
        if storage.exists(path):
            try:
                content = yaml.safe_load(storage.read_bytes(path))
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                raise UserError(f"{path} is not YAML ({' '.join(str(error).split()):.120}): correct it") from None
            if not isinstance(content, dict):
                raise UserError(f"{path} is no YOLO data file, received {type(content).__name__}: it needs `names`")
            return content
    return None


def _class_names(root: str) -> list[str]:
    content = read_data_file(root)
    if content is not None:
        names = content.get("names")
        if isinstance(names, dict) and all(isinstance(number, int) for number in names):
            names = [str(names[number]) if number in names else "" for number in range(max(names, default=-1) + 1)]
        if not isinstance(names, list) or not names:
            raise UserError(f"data.yaml in {root} has no `names`: list the classes in the order of their numbers")
        return [str(name) for name in names]
    path = storage.join(root, NAMES_FILE)
    if storage.exists(path):
        return [line.strip() for line in storage.read_bytes(path).decode().splitlines() if line.strip()]
    raise UserError(f"{root} has neither data.yaml nor classes.txt: the numbers of YOLO labels need the classes' names")


def _image_paths(root: str, split: Split) -> list[str]:
    """Paths of the images of a split, sorted within each directory or list file."""
    if split.images:
        entries = [storage.join(root, split.images)]
    else:
        content = read_data_file(root) or {}
        value = content.get(split.set or "")
        if not value:
            raise UserError(f"data.yaml in {root} has no {split.set!r}; it has {', '.join(map(str, content))}")
        base = str(content.get("path") or "")
        entries = [_resolve(root, base, str(entry)) for entry in (value if isinstance(value, list) else [value])]
    paths: list[str] = []
    for entry in entries:
        if entry.endswith(".txt"):
            listed = storage.read_bytes(entry).decode().splitlines()
            paths += [_resolve(root, os.path.dirname(entry), line.strip()) for line in listed if line.strip()]
        elif not storage.exists(entry):
            raise UserError(f"{entry} does not exist: check data.root, and the paths in data.yaml")
        else:
            files = list_sizes(entry)
            paths += [storage.join(entry, name) for name in files if name.lower().endswith(SUFFIXES)]
    return paths


def _resolve(root: str, base: str, entry: str) -> str:
    """A path of data.yaml: as it is, below its `path`, or below the directory of the file, whichever exists.

    Exports write `../train/images` for what lies beside data.yaml.
    """
    plain = entry.removeprefix("./")
    choices = [storage.join(root, base, plain), storage.join(root, plain), storage.join(root, plain.lstrip("./"))]
    if os.path.isabs(plain):
        choices.insert(0, plain)
    return next((os.path.normpath(path) if "://" not in path else path for path in choices if storage.exists(path)),
                choices[0])  # fmt: skip


def _label_path(image: str) -> str | None:
    """The label file of an image, or None where it has none."""
    directory, name = os.path.split(image)
    stem = f"{os.path.splitext(name)[0]}.txt"
    parts = directory.split("/")
    for at in range(len(parts) - 1, -1, -1):
        if parts[at] == "images":
            path = "/".join([*parts[:at], "labels", *parts[at + 1 :], stem])
            if storage.exists(path):
                return path
            break
    beside = storage.join(directory, stem)
    return beside if storage.exists(beside) else None


def _read_labels(path: str, names: list[str], size: tuple[int, int]) -> list[tuple[str, tuple[float, ...], int]]:
    found = []
    for number, line in enumerate(storage.read_bytes(path).decode().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            label, *values = map(float, line.split())
        except ValueError:
            raise UserError(f"{path}, line {number}: {line.strip()!r:.80} is not numbers: correct it") from None
        if not label.is_integer() or not 0 <= label < len(names):
            raise UserError(f"{path}, line {number}: class {label:g} is none of the {len(names)} that are named")
        found.append((names[int(label)], _box(values, *size, f"{path}, line {number}"), 0))
    return found


def _box(values: list[float], width: int, height: int, where: str) -> tuple[float, float, float, float]:
    """COCO box in pixels of normalised numbers."""
    if len(values) == 4:
        x, y, w, h = values
        return (x - w / 2) * width, (y - h / 2) * height, w * width, h * height
    if len(values) < 6 or len(values) % 2:
        raise UserError(f"{where}: an object needs a class and 4 numbers, or the outline of a mask: correct it")
    left, top = min(values[::2]), min(values[1::2])
    return left * width, top * height, (max(values[::2]) - left) * width, (max(values[1::2]) - top) * height
