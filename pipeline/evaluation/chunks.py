"""Chunks: the unit of an evaluation that is handed to a worker, committed, and never done again.

A chunk is a file of two lines: a header with the digest of the second line, and its COCO results rows. A file that was
cut short, or that belongs to another evaluation, is named in a warning and done again.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from refinedet.pipeline.evaluation.unreadable import UnreadableImage
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs import storage

logger = logging.getLogger(__name__)

_SMALLEST_CHUNK = 8


@dataclass(frozen=True)
class Chunk:
    """Positions [start, stop) of a data set's samples; chunks are numbered from 0."""

    index: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"chunk-{self.index:05d}.json"

    @property
    def trace_name(self) -> str:
        """Name of the file with the objects that the diagnosis followed through the detector."""
        return f"trace-{self.index:05d}.json"

    @property
    def positions(self) -> range:
        return range(self.start, self.stop)

    def spread(self, num_samples: int, count: int) -> list[int]:
        """Those of `count` positions, spread evenly over a data set of `num_samples`, that lie in this chunk."""
        count = min(count, num_samples)
        chosen = (int((number + 0.5) * num_samples / count) for number in range(count))
        return [position for position in chosen if self.start <= position < self.stop]


@dataclass(frozen=True)
class ChunkResult:
    """Detections of a chunk.

    detections  by image in the data set's order, best first
    unreadable  images that could not be decoded; they have no detections
    """

    detections: DetectionTable
    unreadable: tuple[UnreadableImage, ...] = ()


def split_into_chunks(num_samples: int, images_per_chunk: int, workers: int = 1) -> tuple[Chunk, ...]:
    """Every sample in exactly one chunk, in order; chunks get smaller towards the end, so that workers end together.

    images_per_chunk  images of the largest chunk
    workers           a chunk is at most half of each worker's share of what is left
    """
    smallest = min(_SMALLEST_CHUNK, images_per_chunk)
    chunks: list[Chunk] = []
    start = 0
    while start < num_samples:
        share = -(-(num_samples - start) // (2 * workers))
        stop = min(start + max(smallest, min(share, images_per_chunk)), num_samples)
        chunks.append(Chunk(len(chunks), start, stop))
        start = stop
    return tuple(chunks)


def write_chunk(folder: str, chunk: Chunk, result: ChunkResult, *, fingerprint: str = "") -> None:
    """Commit a finished chunk to `folder`, whole or not at all.

    fingerprint  digest of what was detected with what (weights, shards, settings)
    """
    rows = json.dumps(result.detections.rows(), separators=(",", ":")).encode()
    header = _header(chunk, fingerprint, storage.digest_bytes(rows))
    header["count"] = len(result.detections)
    header["unreadable"] = [image.to_json() for image in result.unreadable]
    storage.write_bytes(storage.join(folder, chunk.name), json.dumps(header).encode() + b"\n" + rows + b"\n")


def read_chunk(folder: str, chunk: Chunk, *, fingerprint: str = "") -> ChunkResult | None:
    """A committed chunk; None where there is none.

    None too, with a warning that names the file, where it is damaged or of another evaluation.
    """
    committed = read_rows(folder, chunk, fingerprint=fingerprint)
    if committed is None:
        return None
    return ChunkResult(DetectionTable.of(json.loads(committed.rows)), committed.unreadable)


@dataclass(frozen=True)
class CommittedRows:
    """A committed chunk as its file has it.

    rows   JSON of COCO results rows, a list
    count  of the rows
    """

    rows: bytes
    count: int
    unreadable: tuple[UnreadableImage, ...]


def read_rows(folder: str, chunk: Chunk, *, fingerprint: str = "") -> CommittedRows | None:
    """Like `read_chunk`, with the rows as they were written."""
    path = storage.join(folder, chunk.name)
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        return None
    first, _, rows = content.partition(b"\n")
    rows = rows.removesuffix(b"\n")
    try:
        header = json.loads(first)
        sha256, count = header["sha256"], header.pop("count")
        unreadable = tuple(UnreadableImage(**image) for image in header.pop("unreadable"))
    except (ValueError, KeyError, TypeError):
        header, sha256, count, unreadable = {}, "", 0, ()
    if storage.digest_bytes(rows) != sha256:
        logger.warning("%s is damaged (%d bytes do not match its digest); it is done again", path, len(content))
        return None
    if header != _header(chunk, fingerprint, sha256):
        logger.warning("%s is of another evaluation (other weights, data or settings); it is done again", path)
        return None
    return CommittedRows(rows, count, unreadable)


def write_trace(folder: str, chunk: Chunk, counts: np.ndarray, *, fingerprint: str) -> None:
    """Commit the [L, S] counts of `trace_chunk`; `fingerprint` also of the positions that were traced."""
    storage.write_json(storage.join(folder, chunk.trace_name), {"fingerprint": fingerprint, "counts": counts.tolist()})


def read_trace(folder: str, chunk: Chunk, *, fingerprint: str) -> np.ndarray | None:
    """The committed counts; None where there are none, or those of another evaluation."""
    path = storage.join(folder, chunk.trace_name)
    try:
        known = storage.read_json(path) if storage.exists(path) else {}
        return np.array(known["counts"], np.int64) if known.get("fingerprint") == fingerprint else None
    except (ValueError, KeyError, AttributeError):
        logger.warning("%s is damaged; it is done again", path)
        return None


def _header(chunk: Chunk, fingerprint: str, sha256: str) -> dict[str, Any]:
    return {"fingerprint": fingerprint, "start": chunk.start, "stop": chunk.stop, "sha256": sha256}
