"""Pieces: the unit of an evaluation that is handed to a worker, committed, and never done again.

A piece is a file of COCO results rows with its digest inside. One that was cut short is named, and done again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pipeline.evaluation.detections import DetectionTable


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
    raise NotImplementedError


def write_piece(folder: str, piece: Piece, detections: DetectionTable, *, fingerprint: str = "") -> None:
    """Commit a finished piece to `folder`, whole or not at all.

    `fingerprint` names what was detected with what (weights, shards, settings); a piece of another is done again.
    """
    raise NotImplementedError


def read_piece(folder: str, piece: Piece, *, fingerprint: str = "") -> DetectionTable | None:
    """A committed piece; None, with a warning that names the file, where it is damaged or of another fingerprint.

    None without a warning where there is none.
    """
    raise NotImplementedError


def missing_pieces(folder: str, pieces: Sequence[Piece], *, fingerprint: str = "") -> tuple[Piece, ...]:
    """Those of `pieces` that are still to be done."""
    raise NotImplementedError


def merge_pieces(tables: Iterable[DetectionTable], image_ids: Sequence[int]) -> DetectionTable:
    """All detections in the order of `image_ids` (the data set's), every image once, best first within an image."""
    raise NotImplementedError
