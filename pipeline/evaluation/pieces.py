"""Pieces: the unit of an evaluation that is handed to a worker, committed, and never done again.

A piece is a file of two lines: what it is, with the digest of the second; and its COCO results rows. One that was cut
short, or that belongs to another evaluation, is named and done again.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs import storage

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Positions [start, stop) of a data set's samples; pieces are numbered from 0."""

    index: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return f"piece-{self.index:05d}.json"

    @property
    def positions(self) -> range:
        return range(self.start, self.stop)


def split_into_pieces(num_samples: int, images_per_piece: int) -> tuple[Piece, ...]:
    """Every sample in exactly one piece, in order; the last piece may be smaller."""
    starts = range(0, num_samples, images_per_piece)
    return tuple(Piece(index, start, min(start + images_per_piece, num_samples)) for index, start in enumerate(starts))


def write_piece(folder: str, piece: Piece, detections: DetectionTable, *, fingerprint: str = "") -> None:
    """Commit a finished piece to `folder`, whole or not at all.

    `fingerprint` names what was detected with what (weights, shards, settings); a piece of another is done again.
    """
    rows = json.dumps(detections.rows(), separators=(",", ":")).encode()
    header = _header(piece, fingerprint, storage.digest_bytes(rows))
    storage.write_bytes(storage.join(folder, piece.name), json.dumps(header).encode() + b"\n" + rows + b"\n")


def read_piece(folder: str, piece: Piece, *, fingerprint: str = "") -> DetectionTable | None:
    """A committed piece; None where there is none.

    None too, with a warning that names the file, where it is damaged or of another evaluation.
    """
    path = storage.join(folder, piece.name)
    try:
        content = storage.read_bytes(path)
    except FileNotFoundError:
        return None
    first, _, rows = content.partition(b"\n")
    rows = rows.removesuffix(b"\n")
    try:
        header = json.loads(first)
        sha256 = header["sha256"]
    except (ValueError, KeyError, TypeError):
        header, sha256 = {}, ""
    if storage.digest_bytes(rows) != sha256:
        logger.warning("%s is damaged (%d bytes do not match its digest); it is done again", path, len(content))
        return None
    if header != _header(piece, fingerprint, sha256):
        logger.warning("%s is of another evaluation (other weights, data or settings); it is done again", path)
        return None
    return DetectionTable.of(json.loads(rows))


def merge_pieces(tables: Iterable[DetectionTable], image_ids: Sequence[int] | None = None) -> DetectionTable:
    """All detections in the order of `image_ids` (default: ascending), best first within an image.

    The result does not depend on the order of the tables, as long as each image lies in one of them.
    """
    table = DetectionTable.concatenate(tables)
    if image_ids is None:
        place = table.image_id
    else:
        ids = np.asarray(image_ids, np.int64)
        unique, first = np.unique(ids, return_index=True)
        if len(unique) < len(ids) or not np.isin(table.image_id, unique).all():
            raise ValueError("image_ids must be unique and hold every image that has detections")
        place = first[np.searchsorted(unique, table.image_id)]
    return table.select(np.lexsort((-table.score, place)))


def _header(piece: Piece, fingerprint: str, sha256: str) -> dict[str, str | int]:
    return {"fingerprint": fingerprint, "start": piece.start, "stop": piece.stop, "sha256": sha256}
