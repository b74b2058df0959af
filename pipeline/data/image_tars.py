"""A user's own webdataset tars: per sample an image and a JSON file of the same key.

The JSON holds `objects` (or is their list), each with a class name, `label`, `category` or `class`, and `bbox`, COCO's
x, y, width, height in pixels.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from functools import partial
from typing import Any

from refinedet.pipeline.config.spec import Split
from refinedet.pipeline.data.annotations import Record, SplitSource, number_classes
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.images import SUFFIXES
from refinedet.pipeline.data.samples import BadSample
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

_CLASS_KEYS = ("label", "category", "class", "name")


def read_image_tars(root: str, split: Split, faults: FaultLog) -> SplitSource:
    """Records in the order of the tars and of their samples."""
    records, objects = [], []
    for _, path in image_tar_lists(root, split):
        images: dict[str, tarfile.TarInfo] = {}
        labels: dict[str, Any] = {}
        try:
            fs, inner = storage.filesystem(path)
            with fs.open(inner, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:  # type: ignore[arg-type]
                for member in tar:
                    key, _, extension = member.name.rpartition(".")
                    if f".{extension.lower()}" in SUFFIXES:
                        images[key] = member
                    elif extension == "json":
                        content = tar.extractfile(member)
                        labels[key] = json.loads(content.read()) if content else None
        except (tarfile.TarError, ValueError) as error:
            raise UserError(f"{path} is not a tar of images and JSON ({error}): correct or remove it") from None
        for key, member in images.items():
            if key not in labels:
                faults.add(BadSample(path, key, "no JSON file has this key; excluded"))
                continue
            load = partial(_load, path, member.offset_data, member.size)
            records.append(Record(len(records) + 1, member.name, load, member.size))
            objects.append(_read_objects(labels[key], f"{path}, {key}"))
    return number_classes(split.images, records, objects, faults)


def image_tar_lists(root: str, split: Split) -> Iterator[tuple[str, str]]:
    """The tars that match the pattern, sorted; UserError where none does."""
    fs, inner = storage.filesystem(storage.join(root, split.images))
    found: list[str] = sorted(map(str, fs.glob(inner)))
    if not found:
        raise UserError(f"no file matches {split.images!r} in {root}: check data.root and the split's `images`")
    for path in found:
        yield path.rsplit("/", 1)[-1], str(fs.unstrip_protocol(path)) if not storage.is_local(root) else path


def _load(path: str, offset: int, size: int) -> bytes:
    fs, inner = storage.filesystem(path)
    content: Any = fs.cat_file(inner, start=offset, end=offset + size)
    return content


def _read_objects(content: Any, where: str) -> list[tuple[str, tuple[float, ...], int]]:
    entries = content.get("objects", content.get("annotations")) if isinstance(content, dict) else content
    if not isinstance(entries, list):
        raise UserError(f"{where}: the JSON has no list `objects`, received {content!r:.80}")
    found = []
    for entry in entries:
        key = next((key for key in _CLASS_KEYS if isinstance(entry, dict) and key in entry), None)
        box = entry.get("bbox") if isinstance(entry, dict) else None
        if key is None or not isinstance(box, list):
            raise UserError(f"{where}: an object needs a class (`label`) and a `bbox`, received {entry!r:.120}")
        found.append((str(entry[key]), tuple(map(float, box)), int(bool(entry.get("difficult")))))
    return found
