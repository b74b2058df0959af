"""One shard: its tar, and the columns of its contents file."""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import cv2
import numpy as np
from refinedet.pipeline.config.spec import Data
from refinedet.pipeline.data.annotations import Annotation, Record, fault_of_box
from refinedet.pipeline.data.images import decode_image, encode_image, read_header, turn_upright
from refinedet.pipeline.data.index import contents_name, format_key
from refinedet.pipeline.data.remote import exists, reach, read_file, write_file
from refinedet.pipeline.data.samples import BadSample
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from webdataset.writer import TarWriter

_TYPES = {
    "keys": np.int64,
    "offsets": np.int64,
    "sizes": np.int64,
    "crc32": np.uint32,
    "objects_offsets": np.int64,
    "widths": np.int32,
    "heights": np.int32,
    "image_hashes": np.uint64,
    "orientations": np.uint8,
    "num_objects": np.int32,
    "category_ids": np.int64,
    "boxes": np.float32,
    "learnt": np.bool_,
}


class _Columns:
    """The columns of a contents file as they grow."""

    def __init__(self) -> None:
        self.lists: dict[str, list[Any]] = {name: [] for name in _TYPES}

    def add(self, **values: Any) -> None:
        for name, value in values.items():
            self.lists[name].append(value)

    def encode(self, metadata: dict[str, Any]) -> bytes:
        """An npz file, the same bytes for the same values; without pickles."""
        arrays = {name: np.asarray(values, _TYPES[name]) for name, values in self.lists.items()}
        arrays["boxes"] = arrays["boxes"].reshape(-1, 4)
        arrays["metadata"] = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
        return file.getvalue()


class ShardWork(NamedTuple):
    """One shard that is to be written; another process may do it.

    start    key of its first sample
    request  digest of all that decides what the shards hold
    """

    data: Data
    destination: str
    number: int
    start: int
    records: Sequence[Record]
    request: str


class WrittenShard(NamedTuple):
    """Result of a shard: its line of the index, and the faults of its images."""

    number: int
    line: dict[str, Any]
    faults: tuple[BadSample, ...]


def write_shard(work: ShardWork) -> WrittenShard:
    """Write one shard, or find it written."""
    data, records = work.data, work.records
    name = f"shard-{work.number:06d}.tar"
    path, contents_path = storage.join(work.destination, name), storage.join(work.destination, contents_name(name))
    asked = storage.digest_json(
        [work.request, [(r.image_id, r.file_name, r.num_bytes, list(r.annotations)) for r in records]]
    )
    written = _find_shard(path, contents_path, asked)
    if written:
        return WrittenShard(work.number, written["line"], tuple(BadSample(**fault) for fault in written["faults"]))
    columns, found, kept = _Columns(), list[BadSample](), list[bool]()
    buffer = io.BytesIO()
    turned = []
    with TarWriter(buffer, encoder=False, mtime=0) as writer:
        for key, record in enumerate(records, start=work.start):
            sample = _encode_sample(format_key(key), record, name, data, found, columns)
            kept.append(sample is not None)
            if sample is None:
                continue
            if columns.lists["orientations"][-1] != 1:
                turned.append(record.file_name)
            offset = writer.tarstream.offset
            writer.write(sample)
            size = writer.tarstream.offset - offset
            objects_offset = size - 512 - _padded(len(sample["json"]))
            columns.add(keys=key, offsets=offset, sizes=size, objects_offsets=objects_offset)
    content = buffer.getvalue()
    for offset, size in zip(columns.lists["offsets"], columns.lists["sizes"], strict=True):
        columns.add(crc32=zlib.crc32(memoryview(content)[offset : offset + size]))
    metadata = {
        "asked": asked,
        "faults": [asdict(fault) for fault in found],
        "num_samples": sum(kept),
        "bytes": len(content),
        "sha256": storage.digest_bytes(content),
        "kept": kept,
        "turned": turned,
    }
    encoded = columns.encode(metadata)
    try:
        write_file(path, content)
        write_file(contents_path, encoded)
    except OSError as error:
        if error.errno not in storage.NO_ROOM:
            raise
        raise UserError(
            f"shard {path} of {len(content)} bytes could not be written ({error.strerror}): make room; "
            "the shards that are complete are kept, run the same command again to resume"
        ) from error
    return WrittenShard(work.number, _line(name, metadata, encoded), tuple(found))


def _find_shard(path: str, contents_path: str, asked: str) -> dict[str, Any] | None:
    """A shard of an earlier call that was cut off, where it is whole and what is wanted now."""
    if not exists(contents_path):
        return None
    encoded = read_file(contents_path)
    try:
        with np.load(io.BytesIO(encoded), allow_pickle=False) as columns:
            metadata = json.loads(columns["metadata"].tobytes())
    except (ValueError, KeyError, OSError):
        return None
    fs, inner = storage.filesystem(path)
    if metadata["asked"] != asked or not exists(path) or reach(lambda: fs.size(inner), path) != metadata["bytes"]:
        return None
    return {"faults": metadata["faults"], "line": _line(posixpath.basename(path), metadata, encoded)}


def _line(name: str, metadata: dict[str, Any], encoded: bytes) -> dict[str, Any]:
    kept = {key: metadata[key] for key in ("num_samples", "bytes", "sha256", "kept", "turned")}
    return {"name": name, "contents_sha256": storage.digest_bytes(encoded), **kept}


def _encode_sample(
    key: str, record: Record, shard: str, data: Data, found: list[BadSample], columns: _Columns
) -> dict[str, Any] | None:
    """The tar members of one image, or None where it cannot be used; what is wrong with it is added to `found`."""

    def fault(reason: str) -> None:
        found.append(BadSample(shard, f"{key} ({record.file_name})", f"{reason}; excluded"))

    try:
        original = content = record.load()
    except OSError as error:
        return fault(f"cannot be read ({error.strerror or error})")
    header = read_header(content)
    image, reason = decode_image(content)
    if header is None or image is None:
        return fault(reason or "not an image")
    size = header.displayed if data.exif == "displayed" else (header.width, header.height)
    stated = (record.width or size[0], record.height or size[1])
    if stated != size:
        other = header.displayed if data.exif == "stored" else (header.width, header.height)
        hint = ""
        if stated == other:
            meant = "displayed" if data.exif == "stored" else "stored"
            hint = f", which is the {meant} picture of its EXIF rotation (data.exif={meant})"
        return fault(f"is {size[0]} x {size[1]} pixels, its annotations have {stated[0]} x {stated[1]}{hint}")
    extension, annotations = header.extension, list(record.annotations)
    turned = header.orientation != 1 and data.exif == "displayed"
    scale = min(1.0, data.max_side / max(size)) if data.max_side else 1.0
    if turned or scale < 1:
        image = turn_upright(image, header.orientation) if turned else image
        size = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
        annotations = [_scale(annotation, size[0] / stated[0], size[1] / stated[1]) for annotation in annotations]
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA) if scale < 1 else image
        content, extension = encode_image(image), "jpg"
    facts = {
        "image_id": record.image_id,
        "file_name": record.file_name,
        "width": size[0],
        "height": size[1],
        "objects": [annotation._asdict() for annotation in annotations],
    }
    columns.add(
        widths=size[0],
        heights=size[1],
        image_hashes=int.from_bytes(hashlib.sha256(original).digest()[:8], "big"),
        orientations=header.orientation,
        num_objects=len(annotations),
    )
    for annotation in annotations:
        learnt = not annotation.iscrowd and fault_of_box(annotation.bbox, *size) is None
        columns.add(category_ids=annotation.category_id, boxes=annotation.bbox, learnt=learnt)
    return {"__key__": key, extension: content, "json": json.dumps(facts, separators=(",", ":")).encode()}


def _scale(annotation: Annotation, x: float, y: float) -> Annotation:
    left, top, width, height = annotation.bbox
    return annotation._replace(bbox=(left * x, top * y, width * x, height * y), area=annotation.area * x * y)


def _padded(size: int) -> int:
    return -(-size // 512) * 512
