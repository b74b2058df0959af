"""Reading samples out of shards: bytes, checks, decoding; and the exact reader that evaluation uses."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from refinedet.pipeline.data.annotations import are_learnable, single_precision_corners
from refinedet.pipeline.data.augmentation import MEAN_RGB
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.cache import ShardCache
from refinedet.pipeline.data.images import EXTENSIONS, decode_image
from refinedet.pipeline.data.index import SampleEntry, ShardSet
from refinedet.pipeline.data.remote import exists, read_json, read_range, write_json
from refinedet.pipeline.data.samples import BadSample, Sample
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

_BLOCK = 512  # bytes, a tar's
_DECODING_THREADS = 2
_READING_THREADS = 4


class DamagedError(ValueError):
    """Error for a sample whose bytes differ from those that were written."""


class SampleReader:
    """Reads and decodes samples of a set of shards, through `cache` where they are remote; safe for several threads."""

    def __init__(self, shards: ShardSet, cache: ShardCache | None = None) -> None:
        self.shards = shards
        self.cache = cache
        self._folder = None if shards.remote else storage.filesystem(shards.url)[1]

    def read(self, position: int) -> Sample:
        """The sample at a position of the data set; where it is broken, a grey one without objects, and its fault.

        A store or disk that cannot be read is an error: nothing is known then of the samples.
        """
        entry = self.shards.entry(position)
        shard = self.shards.names[entry.shard]
        try:
            content = self.read_bytes(entry)
        except FileNotFoundError:
            raise UserError(f"{self.shards.shard_url(entry.shard)} is gone: write the shards again") from None
        except PermissionError:
            url = self.shards.shard_url(entry.shard)
            raise UserError(f"{url} may not be read: give the workers access to it") from None
        except DamagedError as error:
            return _broken(entry, shard, str(error))
        members = expand_tar(content)
        if members.get("__key__") != entry.key:
            return _broken(entry, shard, f"the tar holds {members.get('__key__')!r} where this key should be")
        return decode_sample(members, self.shards, shard)

    def read_bytes(self, entry: SampleEntry) -> bytes:
        """A sample's part of its shard, checked: a tar of its own. DamagedError where it is not what was written.

        A copy in the cache may be damaged where the shard is not: it is discarded then, and the store is asked.
        """
        if self._folder is not None:
            content = _read_local(os.path.join(self._folder, self.shards.names[entry.shard]), entry.offset, entry.size)
        elif self.cache:
            content = self.cache.read(entry.shard, entry.offset, entry.size)
            if reason := _damage(content, entry):
                self.cache.discard(entry.shard, reason)
                content = read_range(self.shards.shard_url(entry.shard), entry.offset, entry.size)
        else:
            content = read_range(self.shards.shard_url(entry.shard), entry.offset, entry.size)
        if reason := _damage(content, entry):
            raise DamagedError(reason)
        return content


def _damage(content: bytes, entry: SampleEntry) -> str | None:
    """Return why these are not the bytes of a sample, or None."""
    if len(content) != entry.size:
        return f"the shard ends early: {len(content)} of its {entry.size} bytes exist"
    if zlib.crc32(content) != entry.crc32:
        return "its bytes are not those that were written (checksum)"
    return None


def _read_local(path: str, offset: int, size: int) -> bytes:
    handle = os.open(path, os.O_RDONLY)
    try:
        return os.pread(handle, size, offset)
    finally:
        os.close(handle)


def expand_tar(content: bytes) -> dict[str, Any]:
    """The members of one sample, as webdataset names them: `__key__`, and bytes by extension.

    Its part of a shard is plain ustar headers and contents; `tarfile` takes a tenth of a sample's time for them.
    """
    members: dict[str, Any] = {}
    at = 0
    while at + _BLOCK <= len(content) and content[at]:
        name = content[at : at + 100].partition(b"\0")[0].decode("ascii", "replace")
        size = int(content[at + 124 : at + 135] or b"0", 8)
        directory, slash, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        key = directory + slash + stem
        if members.setdefault("__key__", key) != key:
            break
        at += _BLOCK
        members[extension] = content[at : at + size]
        at += -(-size // _BLOCK) * _BLOCK
    return members


def decode_sample(members: dict[str, Any], shards: ShardSet, shard: str) -> Sample:
    """Decode the members that `expand_tar` gave."""
    key = members["__key__"]
    facts = json.loads(members["json"])
    encoded = next((members[extension] for extension in EXTENSIONS if extension in members), b"")
    image, reason = decode_image(encoded)
    fault = BadSample(shard, key, f"{facts['file_name']}: {reason}") if reason else None
    if image is not None and image.shape[:2] != (facts["height"], facts["width"]):
        image, fault = None, BadSample(shard, key, f"{facts['file_name']}: not of the size that was recorded")
    if image is None:
        image = np.full((facts["height"], facts["width"], 3), MEAN_RGB, np.uint8)
        objects = []
    else:
        objects = facts["objects"]
    width, height = facts["width"], facts["height"]
    boxes = np.array([entry["bbox"] for entry in objects], np.float64).reshape(-1, 4)
    kept = are_learnable(boxes, width, height)
    objects = [entry for entry, learnable in zip(objects, kept.tolist(), strict=True) if learnable]
    boxes = single_precision_corners(boxes[kept], width, height)
    return Sample(
        key=key,
        image=image,
        boxes=boxes,
        labels=np.array([shards.label(entry["category_id"]) for entry in objects], np.int64),
        crowd=np.array([entry["iscrowd"] for entry in objects], bool),
        difficult=np.array([entry["difficult"] for entry in objects], bool),
        image_id=facts["image_id"],
        file_name=facts["file_name"],
        fault=fault,
    )


def grey_sample(key: str = "", fault: BadSample | None = None) -> Sample:
    """A plain image without objects, which adds nothing to the loss."""
    none = np.zeros(0, bool)
    image = np.full((64, 64, 3), MEAN_RGB, np.uint8)
    boxes, labels = np.zeros((0, 4), np.float32), np.zeros(0, np.int64)
    return Sample(key, image, boxes, labels, none, none, -1, fault=fault)


def _broken(entry: SampleEntry, shard: str, reason: str) -> Sample:
    return grey_sample(entry.key, BadSample(shard, entry.key, reason))


class EvaluationSamples:
    """Samples at given positions of the data set, in that order, each exactly once; decoded ahead in threads.

    `sample.boxes` and its flags are the ground truth, in pixels of the original image. A sample whose image cannot be
    decoded comes as plain grey of its recorded size, so that it still counts as an image without detections.
    """

    def __init__(
        self,
        shards: ShardSet,
        positions: Sequence[int] | None = None,
        *,
        max_bad_samples: int = 10,
    ) -> None:
        self.shards = shards
        self.positions = range(shards.num_samples) if positions is None else positions
        self._faults = FaultLog(max_bad_samples, f"shards {shards.url}")

    def __len__(self) -> int:
        return len(self.positions)

    def __iter__(self) -> Iterator[Sample]:
        reader = SampleReader(self.shards)
        pool = ThreadPoolExecutor(max_workers=_DECODING_THREADS)
        pending: list[Future[Sample]] = []
        try:
            for position in self.positions:
                pending.append(pool.submit(reader.read, position))
                if len(pending) > 2 * _DECODING_THREADS:
                    yield self._checked(pending.pop(0).result())
            while pending:
                yield self._checked(pending.pop(0).result())
        finally:
            pool.shutdown(cancel_futures=True)

    def _checked(self, sample: Sample) -> Sample:
        if sample.fault:
            if sample.image_id < 0:
                raise UserError(f"an image cannot be evaluated, its shard is damaged: {sample.fault}")
            self._faults.add(sample.fault)
        return sample


def read_facts(shards: ShardSet, positions: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the metadata of each image, in order: image_id, file_name, width, height, objects.

    positions  of the images; None: all of them
    """
    wanted = range(shards.num_samples) if positions is None else positions
    reader = SampleReader(shards)

    def facts(position: int) -> dict[str, Any]:
        entry = shards.entry(position)
        try:
            return json.loads(expand_tar(reader.read_bytes(entry))["json"])
        except (FileNotFoundError, DamagedError, KeyError) as error:
            raise UserError(
                f"the objects of sample {entry.key} in {shards.shard_url(entry.shard)} cannot be read ({error}): "
                "write the shards again"
            ) from error

    with ThreadPoolExecutor(max_workers=_READING_THREADS) as pool:
        for start in range(0, len(wanted), 1024):
            yield from pool.map(facts, wanted[start : start + 1024])


def write_coco_annotations(shards: ShardSet, path: str) -> None:
    """Write the ground truth of the shards as a COCO instances file, unless it exists; its `info` names the shards.

    Category and image ids are the data set's own. Masks are not in the shards, so there are no segmentations; areas are
    those of the masks all the same.
    """
    if exists(path) and read_json(path).get("info", {}).get("shards") == shards.digest:
        return
    images, annotations = [], []
    for facts in read_facts(shards):
        images.append({"id": facts["image_id"], **{name: facts[name] for name in ("file_name", "width", "height")}})
        annotations.extend({"image_id": facts["image_id"], **entry} for entry in facts["objects"])
    categories = [{"id": category.id, "name": category.name} for category in shards.categories]
    truth = {"info": {"shards": shards.digest}, "images": images, "annotations": annotations, "categories": categories}
    write_json(path, truth)
