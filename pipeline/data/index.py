"""A set of shards: plain webdataset tars, and the index that finds any sample in them.

`index.json` names the shards with their sizes and digests; it is written last, so shards without it do not exist.
Beside each `shard-000000.tar` lies `shard-000000.npz`: columns with the place, checksum and statistics of its samples,
read only when one of them is wanted. An index of ten million samples opens as fast as one of ten.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import threading
from collections import OrderedDict
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from refinedet.pipeline.data.remote import exists, read_file, read_file_cached
from refinedet.pipeline.data.samples import Category
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

FORMAT_VERSION = 2
INDEX = "index.json"
_KEPT_SAMPLES = 2**20  # whose places a process keeps: 40 MB


class SampleEntry(NamedTuple):
    """Place of one sample: bytes [offset, offset + size) of a shard are a tar of its own."""

    shard: int
    key: str
    offset: int
    size: int
    crc32: int
    objects_offset: int
    """where, from `offset`, the tar member of the objects begins"""


@dataclass(frozen=True)
class ShardContents:
    """Places of the samples of one shard; columns of equal length."""

    keys: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    crc32: np.ndarray
    objects_offsets: np.ndarray


PLACES = tuple(field.name for field in fields(ShardContents))


class ShardSet:
    """Shards of one part of a data set, and what is in them. Pickles small; contents are read on demand."""

    def __init__(self, url: str, index: dict[str, Any]) -> None:
        table = index["shards"]
        self.url = url
        self.format: str = index["format"]
        self.part: str = index["part"]
        self.sets: tuple[str, ...] = tuple(index.get("sets", ()))
        """voc: the lists they were written from, as VOC2007/test"""
        self.split_sizes: tuple[int, ...] = tuple(index.get("split_sizes", ()))
        """samples of each split, in the order of the data set"""
        self.facts: dict[str, Any] = index.get("facts", {})
        """what was met as they were written: `exif_turned`, `dropped` objects by class"""
        self.digest: str = index["digest"]
        self.categories = tuple(Category(entry["id"], entry["name"]) for entry in index["categories"])
        self.names: list[str] = table["names"]
        self.num_bytes: list[int] = table["bytes"]
        self.sha256: list[str] = table["sha256"]
        self.contents_sha256: list[str] = table["contents_sha256"]
        self.sizes = np.asarray(table["num_samples"], dtype=np.int64)
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])
        self._labels = {category.id: label for label, category in enumerate(self.categories, start=1)}
        self._contents: OrderedDict[int, ShardContents] = OrderedDict()
        self._lock = threading.Lock()
        self.copies: str | None = None
        """directory on the node's disk where contents of remote shards are kept"""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_contents": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"_lock": threading.Lock()}

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.names)

    @property
    def remote(self) -> bool:
        return not storage.is_local(self.url)

    @property
    def num_samples(self) -> int:
        return int(self.first[-1])

    @property
    def num_classes(self) -> int:
        return len(self.categories)

    def label(self, category_id: int) -> int:
        """1..C of one of the data set's own category ids."""
        return self._labels[category_id]

    def category_id(self, label: int) -> int:
        """The data set's own id of a label 1..C."""
        return self.categories[label - 1].id

    def shard_url(self, shard: int) -> str:
        return storage.join(self.url, self.names[shard])

    def read_columns(self, shard: int, *names: str) -> dict[str, np.ndarray]:
        """Columns of a shard's contents file; remote ones are retried, and kept in `copies`.

        `keys`, `offsets`, `sizes`, `crc32`, `objects_offsets` [n] are places. `widths`, `heights` are pixels,
        `image_hashes` 64 bits of a digest of the image as the data set holds it, `orientations` EXIF's, and
        `num_objects` [n] the counts of `category_ids` [G], `boxes` [G, 4] as COCO's, and `learnt` [G]: no crowd, and
        no bad box.
        """
        name = contents_name(self.names[shard])
        path, sha256 = storage.join(self.url, name), self.contents_sha256[shard]
        if self.remote and self.copies:
            raw = read_file_cached(path, os.path.join(self.copies, self.digest[:16], name), sha256)
        else:
            raw = read_file(path)
        if storage.digest_bytes(raw) != sha256:
            raise UserError(f"{path} does not match {INDEX}: remove the shards and write them again")
        with np.load(io.BytesIO(raw), allow_pickle=False) as columns:
            return {name: columns[name] for name in names}

    def contents(self, shard: int) -> ShardContents:
        """Places of a shard's samples; safe for several threads, which may read a file twice."""
        found = self._contents.get(shard)
        if found is None:
            found = ShardContents(**self.read_columns(shard, *PLACES))
            with self._lock:
                self._contents[shard] = found
                while len(self._contents) > 1 and self._kept() > _KEPT_SAMPLES:
                    self._contents.popitem(last=False)
        return found

    def _kept(self) -> int:
        return sum(len(contents.keys) for contents in self._contents.values())

    def entry(self, position: int) -> SampleEntry:
        """Return the place of the sample at a position 0 .. num_samples - 1 of the data set."""
        shard = int(np.searchsorted(self.first, position, side="right")) - 1
        at = position - int(self.first[shard])
        contents = self.contents(shard)
        return SampleEntry(
            shard,
            format_key(int(contents.keys[at])),
            int(contents.offsets[at]),
            int(contents.sizes[at]),
            int(contents.crc32[at]),
            int(contents.objects_offsets[at]),
        )

    def key(self, position: int) -> str:
        return self.entry(position).key


def contents_name(shard_name: str) -> str:
    return shard_name.removesuffix(".tar") + ".npz"


def format_key(number: int) -> str:
    """A sample's key in its tar."""
    return f"{number:08d}"


def check_same_categories(first: ShardSet, second: ShardSet) -> None:
    """UserError unless each label stands for the same name in both: a detector holds labels, not names or ids."""
    for label, (one, other) in enumerate(itertools.zip_longest(first.categories, second.categories), start=1):
        if one is None or other is None or one.name != other.name:
            names = [repr(category.name) if category else "missing" for category in (one, other)]
            raise UserError(
                f"{first.url} and {second.url} differ in their categories: label {label} (the categories by ascending "
                f"id) is {names[0]} in the first and {names[1]} in the second; give both data sets the same category "
                "names in the order of their ids"
            )


def open_shards(url: str) -> ShardSet:
    """Open the shards in a directory or at an fsspec URI."""
    path = storage.join(url, INDEX)
    try:
        index = json.loads(read_file(path))
    except FileNotFoundError:
        raise UserError(f"{url} holds no shards ({INDEX} is missing): write them with `refinedet shard`") from None
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): remove the shards and write them again") from None
    version = index.get("format_version") if isinstance(index, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version!r}, this release reads {FORMAT_VERSION}: write them again")
    return ShardSet(url, index)


def find_parts(shards: str) -> dict[str, ShardSet]:
    """The parts "train" and "val" whose shards exist below a job's directory or URI of shards."""
    urls = {part: storage.join(shards, part) for part in ("train", "val")}
    return {part: open_shards(url) for part, url in urls.items() if exists(storage.join(url, INDEX))}
