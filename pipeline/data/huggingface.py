"""Hugging Face data sets in a local directory, as parquet files or as `save_to_disk` writes them, and on the hub.

Rows hold `image` (bytes, or a path below the directory) and `objects` with `bbox`, COCO's x, y, width, height in
pixels, and `category` (or `label`, `category_id`): class numbers with names in the data set's features, or names.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any

from refinedet.pipeline.config.spec import Split
from refinedet.pipeline.data.annotations import Annotations, Record, SplitSource, number_classes
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.hub_data import find_hub_files, is_hub, local_copy
from refinedet.pipeline.data.remote import read_file
from refinedet.pipeline.runs.errors import UserError

_CLASS_KEYS = ("category", "label", "category_id", "labels", "categories", "class")
_BATCH = 64  # rows in memory at a time


def read_huggingface(root: str, split: Split, faults: FaultLog) -> SplitSource:
    """Records of a split, in the order of its files and rows; images are read again when they are written."""
    records, objects = [], []
    names: list[str] = []
    for path in find_files(root, split.set or ""):
        names = names or _class_names(path)
        for row, content in enumerate(_rows(path, ("image", "objects", "width", "height"))):
            found = content.get("objects") or {}
            records.append(_record(root, path, row, content, len(records) + 1))
            objects.append(_read_objects(found, names, f"{path}, row {row}"))
    return number_classes(split.set or "", records, objects, faults, names)


def huggingface_lists(root: str, split: Split) -> Iterator[tuple[str, str]]:
    """The files of a split; those of the hub as their copies on this node."""
    for path in find_files(root, split.set or ""):
        yield _relative(root, path), _local(path)


def find_files(root: str, split: str) -> list[str]:
    """Parquet or Arrow files of a split, sorted; UserError where there is none, or one of several configurations."""
    found = _list_files(root, split)
    if not found:
        raise UserError(
            f"{root} has no parquet or Arrow files of a split {split!r}: name one of its splits with `set`, or "
            "download the data set to a directory as parquet"
        )
    directories = sorted({_relative(root, path).partition("/")[0] for path in found})
    if len(directories) > 1 and f"/{split}" in _relative(root, found[0]):
        raise UserError(
            f"{root} has the split {split!r} in several configurations ({', '.join(directories[:8])}): name one with "
            f"`set`, as {directories[0]}/{split}"
        )
    return found


def _list_files(root: str, split: str) -> list[str]:
    patterns = (
        f"data/{split}-*.parquet",
        f"{split}-*.parquet",
        f"{split}.parquet",
        f"data/{split}.parquet",
        f"{split}/*.parquet",
        f"*/{split}/*.parquet",
        f"*/{split}-*.parquet",
        f"{split}/data-*.arrow",
    )
    if is_hub(root):
        return find_hub_files(root, patterns)
    for pattern in patterns:
        if found := sorted(glob.glob(os.path.join(glob.escape(root), pattern))):
            return found
    return []


def find_splits(root: str) -> list[str]:
    """Names of the splits to train on and of the first to validate on that have files."""
    found = []
    for split in ("train", "val", "validation", "valid", "test"):
        if _list_files(root, split):
            found.append(split)
        if len(found) > 1:  # of the hub, what is not used is not downloaded
            break
    return found


def _relative(root: str, path: str) -> str:
    return path.partition("@")[2].partition("/")[2] if is_hub(root) else os.path.relpath(path, root)


def _local(path: str) -> str:
    return local_copy(path) if is_hub(path) else path


def _open(path: str) -> Any:
    """A parquet file, or the stream of an Arrow file."""
    path = _local(path)
    if path.endswith(".parquet"):
        from pyarrow import parquet  # only here and below: it takes a second to load

        return parquet.ParquetFile(path)
    from pyarrow import ipc, memory_map

    return ipc.open_stream(memory_map(path))


def _rows(path: str, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    file = _open(path)
    if path.endswith(".parquet"):
        held = [name for name in columns if name in file.schema_arrow.names]
        batches = file.iter_batches(batch_size=_BATCH, columns=held)
    else:
        held = [name for name in columns if name in file.schema.names]
        batches = (batch.select(held) for batch in file)
    if not {"image", "objects"} <= set(held):
        raise UserError(f"{path} has no columns `image` and `objects`: it is no data set of objects in images")
    for batch in batches:
        yield from batch.to_pylist()


def _class_names(path: str) -> list[str]:
    """Names of the classes by number, from the features in the file's metadata; empty where it has none."""
    file = _open(path)
    schema = file.schema_arrow if path.endswith(".parquet") else file.schema
    features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})

    def names_in(value: Any) -> list[str]:
        if isinstance(value, dict):
            if value.get("_type") == "ClassLabel" and value.get("names"):
                return list(value["names"])
            return next((found for key in value for found in [names_in(value[key])] if found), [])
        return (
            next((found for item in value for found in [names_in(item)] if found), [])
            if isinstance(value, list)
            else []
        )

    return names_in(features.get("objects", {}))


def _record(root: str, path: str, row: int, content: dict[str, Any], image_id: int) -> Record:
    image = content["image"] or {}
    stored = image.get("bytes")
    name = os.path.basename(image.get("path") or f"{os.path.splitext(os.path.basename(path))[0]}-{row:06d}")
    if stored is not None:
        load = partial(_load_row, path, row)
        size = len(stored)
    else:
        file = os.path.join(root, image.get("path") or "")
        load = partial(read_file, file)
        size = os.path.getsize(file) if os.path.isfile(file) else 0
    return Record(image_id, name, load, size, Annotations(), content.get("width"), content.get("height"))


def _load_row(path: str, row: int) -> bytes:
    """The image of one row, out of its group of rows."""
    file = _open(path)
    if not path.endswith(".parquet"):
        for batch in file:
            if row < len(batch):
                return batch.column("image")[row].as_py()["bytes"]
            row -= len(batch)
        raise OSError(f"{path} has no such row")
    for group in range(file.num_row_groups):
        length = file.metadata.row_group(group).num_rows
        if row < length:
            return _images_of_group(path, group)[row].as_py()["bytes"]
        row -= length
    raise OSError(f"{path} has no such row")


@lru_cache(maxsize=2)  # rows are loaded one after another, in two threads
def _images_of_group(path: str, group: int) -> Any:
    return _open(path).read_row_group(group, columns=["image"]).column("image")


def _read_objects(found: Any, names: list[str], where: str) -> list[tuple[str, tuple[float, ...], int]]:
    """(class, box, difficult) of objects, given as lists by key, or as one dict an object."""
    if isinstance(found, list):
        found = {key: [entry.get(key) for entry in found] for key in (found[0] if found else {})}
    boxes = found.get("bbox") or []
    key = next((key for key in _CLASS_KEYS if key in found), None)
    if len(boxes) and key is None:
        raise UserError(f"{where}: objects have no {' or '.join(_CLASS_KEYS[:3])}, received {sorted(found)}")
    labels = found[key] if key else []
    objects = []
    for label, box in zip(labels, boxes, strict=True):
        if isinstance(label, int):
            if not names:
                names_hint = "the data set's features name no classes"
                raise UserError(f"{where}: class {label} has no name, {names_hint}: save it with ClassLabel features")
            if not 0 <= label < len(names):
                raise UserError(f"{where}: class {label} is none of the {len(names)} that are named")
        objects.append((names[label] if isinstance(label, int) else str(label), tuple(map(float, box)), 0))
    return objects
