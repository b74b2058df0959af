"""Writing shards: plain webdataset tars, the same bytes for the same input, in parallel, resumable.

A sample is `<key>.jpg`, the original bytes, and `<key>.json`, its objects. The order of the data set is kept. A shard
and its contents file are each written whole or not at all, and `index.json` last; the same call after a crash writes
only what is missing. Another data set's shards in the same place are an error, never mixed or written over.
"""

from __future__ import annotations

import io
import itertools
import json
import logging
import posixpath
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from typing import Any

from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.coco import read_coco
from refinedet.pipeline.data.faults import FaultLog
from refinedet.pipeline.data.images import read_header
from refinedet.pipeline.data.index import FORMAT_VERSION, INDEX, ShardSet, contents_name, open_shards
from refinedet.pipeline.data.records import Record, Source
from refinedet.pipeline.data.samples import BadSample
from refinedet.pipeline.data.shapes import read_shapes
from refinedet.pipeline.data.voc import list_path, read_voc
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError
from webdataset.writer import TarWriter

logger = logging.getLogger(__name__)

REQUEST = "request.json"
_READERS = {"coco": read_coco, "voc": read_voc, "shapes": read_shapes}
_MAX_PIXELS = 2**28  # of an image: a header that claims more is not believed, and must not take a worker's memory
_OVERHEAD = 2048  # bytes of a sample beside its image: tar headers and objects, about


def prepare_shards(
    data: Data,
    part: str,
    destination: str,
    *,
    threads: int = 2,
    on_progress: Callable[[int, int], None] | None = None,
) -> ShardSet:
    """Write `part` ("train" or "val") of a data set as shards into `destination`; return at once where they are there.

    destination  folder or fsspec URI
    on_progress  called with (samples done, samples in all) as shards are finished
    """
    splits: tuple[Split, ...] = {"train": data.train, "val": data.val}[part]
    if not splits:
        raise UserError(f"data.{part} is empty: name at least one split")
    lists = _list_digests(data, part, splits, destination)
    request, complete = _find_request(destination, _requests(data, part, splits, lists))
    if complete:
        return open_shards(destination)
    faults = FaultLog(data.max_bad_samples, f"data.{part}")
    source = _READERS[data.format](data, part, splits, faults)
    if not source.records:
        raise UserError(f"data.{part} has no images left: check its files, and the ids that select them")
    storage.write_json(storage.join(destination, REQUEST), {"request": request})
    groups = _cut(source.records, data.shard_bytes)
    starts = [0, *itertools.accumulate(len(group) for group in groups)]
    done, shards = 0, {}
    with ThreadPoolExecutor(max_workers=threads) as pool:
        pending = {
            pool.submit(_write_shard, destination, number, starts[number], group, request, faults): number
            for number, group in enumerate(groups)
        }
        try:
            for future in as_completed(pending):
                number = pending[future]
                shards[number] = future.result()
                done += len(groups[number])
                if on_progress:
                    on_progress(done, len(source.records))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    entries = [shards[number] for number in range(len(groups)) if shards[number]["num_samples"]]
    sets = [split.set for split in splits if split.set] if data.format == "voc" else []
    _write_index(destination, data.format, part, sets, request, lists, source, entries, faults)
    return open_shards(destination)


def _list_digests(data: Data, part: str, splits: tuple[Split, ...], destination: str) -> dict[str, str]:
    """SHA-256 of every file that says which images there are.

    Complete shards remember those they were written from: where they are used, the data set need not be.
    """
    root = data.root or ""
    names = {name for split in splits for name in (split.annotations, split.image_info, split.ids) if name}
    paths = {name: storage.join(root, name) for name in names}
    paths |= {split.set: list_path(root, split) for split in splits if split.set}
    found = {name: storage.digest_file(path).sha256 for name, path in paths.items() if storage.exists(path)}
    missing = [name for name in paths if name not in found]
    index = storage.join(destination, INDEX)
    remembered = storage.read_json(index).get("lists", {}) if missing and storage.exists(index) else {}
    for name in missing:
        if name not in remembered:
            raise UserError(f"{paths[name]} does not exist: check data.root and the files that data.{part} names")
        found[name] = remembered[name]
    return found


def _requests(data: Data, part: str, splits: tuple[Split, ...], lists: Mapping[str, str]) -> tuple[str, ...]:
    """Digests of what was asked for; the same request finds its shards without reading the data set again.

    The first is today's. The second, of earlier releases, held what means nothing for files: the number of images that
    the plan reckons with, and how shapes are drawn.
    """

    def digest(of_split: set[str], of_data: set[str]) -> str:
        asked = {
            "version": FORMAT_VERSION,
            "part": part,
            "splits": [split.model_dump(exclude=of_split) for split in splits],
            "lists": lists,
            "data": data.model_dump(include={"format", "seed", "image_size", "shard_bytes"} - of_data),
        }
        return storage.digest_json(asked)

    everything = digest(set(), set())
    return (everything,) if data.format == "shapes" else (digest({"count"}, {"seed", "image_size"}), everything)


def _find_request(destination: str, requests: tuple[str, ...]) -> tuple[str, bool]:
    """Which of the requests was written there (the first where none was), and whether it is complete.

    An error where another data set's shards are.
    """
    for name, complete in ((INDEX, True), (REQUEST, False)):
        path = storage.join(destination, name)
        if storage.exists(path):
            found = storage.read_json(path).get("request")
            if found not in requests:
                raise UserError(
                    f"{destination} holds shards of another data set, or of other settings: "
                    "remove it, or choose another folder with data.shards"
                )
            return found, complete
    return requests[0], False


def _cut(records: Sequence[Record], shard_bytes: int) -> list[list[Record]]:
    """Split records, in order, into shards that are closed once they hold `shard_bytes`."""
    groups: list[list[Record]] = [[]]
    size = 0
    for record in records:
        if size >= shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(record)
        size += record.num_bytes + _OVERHEAD
    return groups


def _write_shard(
    destination: str, number: int, start: int, records: list[Record], request: str, faults: FaultLog
) -> dict[str, Any]:
    """Write one shard, or find it written; returns its line of the index."""
    name = f"shard-{number:06d}.tar"
    path, contents_path = storage.join(destination, name), storage.join(destination, contents_name(name))
    asked = storage.digest_json([request, [(r.image_id, r.file_name, r.num_bytes, r.annotations) for r in records]])
    written = _find_shard(path, contents_path, asked)
    if written:
        for fault in written["faults"]:
            faults.add(BadSample(**fault))
        return written["line"]
    columns: dict[str, list] = {"keys": [], "offsets": [], "sizes": [], "crc32": [], "objects_offsets": []}
    found: list[BadSample] = []
    buffer = io.BytesIO()
    with TarWriter(buffer, encoder=False, mtime=0) as writer:
        for key, record in enumerate(records, start=start):
            known = len(found)
            sample = _encode_sample(f"{key:08d}", record, name, found)
            for fault in found[known:]:
                faults.add(fault)
            if sample is None:
                continue
            offset = writer.tarstream.offset
            writer.write(sample)
            size = writer.tarstream.offset - offset
            columns["keys"].append(sample["__key__"])
            columns["offsets"].append(offset)
            columns["sizes"].append(size)
            columns["objects_offsets"].append(size - 512 - _padded(len(sample["json"])))
    content = buffer.getvalue()
    for offset, size in zip(columns["offsets"], columns["sizes"], strict=True):
        columns["crc32"].append(zlib.crc32(memoryview(content)[offset : offset + size]))
    contents = {
        "asked": asked,
        "num_bytes": len(content),
        "sha256": storage.digest_bytes(content),
        "faults": [asdict(fault) for fault in found],
        "samples": columns,
    }
    encoded = json.dumps(contents, separators=(",", ":")).encode()
    try:
        storage.write_bytes(path, content)
        storage.write_bytes(contents_path, encoded)
    except OSError as error:
        raise UserError(
            f"shard {path} of {len(content)} bytes could not be written ({error.strerror or error}): make room; "
            "the shards that are complete are kept, and the same command goes on from them"
        ) from error
    return _line(name, contents, encoded)


def _find_shard(path: str, contents_path: str, asked: str) -> dict[str, Any] | None:
    """A shard of an earlier call that was cut off, where it is whole and what is wanted now."""
    if not storage.exists(contents_path):
        return None
    encoded = storage.read_bytes(contents_path)
    contents = json.loads(encoded)
    fs, inner = storage.filesystem(path)
    if contents["asked"] != asked or not fs.exists(inner) or fs.size(inner) != contents["num_bytes"]:
        return None
    return {"faults": contents["faults"], "line": _line(posixpath.basename(path), contents, encoded)}


def _line(name: str, contents: dict[str, Any], encoded: bytes) -> dict[str, Any]:
    return {
        "name": name,
        "num_samples": len(contents["samples"]["keys"]),
        "bytes": contents["num_bytes"],
        "sha256": contents["sha256"],
        "contents_sha256": storage.digest_bytes(encoded),
    }


def _encode_sample(key: str, record: Record, shard: str, found: list[BadSample]) -> dict[str, Any] | None:
    """The tar members of one image, or None where it cannot be used; what is wrong with it is added to `found`."""

    def fault(reason: str) -> None:
        found.append(BadSample(shard, f"{key} ({record.file_name})", reason))

    try:
        content = record.load()
    except OSError as error:
        return fault(f"cannot be read ({error.strerror or error}); left out")
    header = read_header(content)
    if header is None:
        return fault(f"is no JPEG or PNG image ({len(content)} bytes); left out")
    if not 0 < header.width * header.height <= _MAX_PIXELS:
        return fault(f"claims to have {header.width} x {header.height} pixels; left out")
    said = (record.width or header.width, record.height or header.height)
    if said != (header.width, header.height):
        return fault(f"is {header.width} x {header.height} pixels, its annotations say {said[0]} x {said[1]}; left out")
    if not header.complete:
        fault("has no end marker; kept")
    facts = {
        "image_id": record.image_id,
        "file_name": record.file_name,
        "width": header.width,
        "height": header.height,
        "objects": [annotation._asdict() for annotation in record.annotations],
    }
    return {"__key__": key, header.extension: content, "json": json.dumps(facts, separators=(",", ":")).encode()}


def _padded(size: int) -> int:
    return -(-size // 512) * 512


def _write_index(
    destination: str,
    data_format: str,
    part: str,
    sets: Sequence[str],
    request: str,
    lists: Mapping[str, str],
    source: Source,
    lines: list[dict[str, Any]],
    faults: FaultLog,
) -> None:
    names = ("num_samples", "bytes", "sha256", "contents_sha256")
    table = {"names": [line["name"] for line in lines], **{name: [line[name] for line in lines] for name in names}}
    categories = [asdict(category) for category in source.categories]
    index = {
        "format_version": FORMAT_VERSION,
        "format": data_format,
        "part": part,
        "sets": list(sets),
        "request": request,
        "lists": dict(lists),
        "digest": storage.digest_json([categories, table["sha256"], table["num_samples"]]),
        "num_samples": sum(table["num_samples"]),
        "categories": categories,
        "faults": [asdict(fault) for fault in faults.faults],
        "shards": table,
    }
    storage.write_json(storage.join(destination, INDEX), index)
