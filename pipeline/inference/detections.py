"""Detections as columns, and as the rows of a COCO results file.

N detections. Boxes here are COCO's xywh, in pixels of the original image; category ids are the data set's own
(sparse) ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from refinedet.pipeline.data.annotations import as_number, whole_number
from refinedet.pipeline.runs.errors import UserError


@dataclass(frozen=True)
class DetectionTable:
    """Detections of any number of images.

    image_id     [N] int64
    category_id  [N] int64, the data set's ids
    bbox         [N, 4] float64, xywh, pixels of the original image
    score        [N] float64
    """

    image_id: np.ndarray
    category_id: np.ndarray
    bbox: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        return len(self.score)

    def select(self, index: np.ndarray) -> DetectionTable:
        """Rows by index or mask."""
        return DetectionTable(self.image_id[index], self.category_id[index], self.bbox[index], self.score[index])

    def rows(self) -> list[dict[str, Any]]:
        """Rows of a COCO results file."""
        columns = (self.image_id.tolist(), self.category_id.tolist(), self.bbox.tolist(), self.score.tolist())
        return [
            {"image_id": image, "category_id": category, "bbox": box, "score": score}
            for image, category, box, score in zip(*columns, strict=True)
        ]

    @staticmethod
    def of(detections: DetectionTable | Sequence[Mapping[str, Any]], *, first_row: int = 0) -> DetectionTable:
        """The table of COCO results rows, in their order; a table is returned as it is.

        first_row  number of the first row in its file, for errors
        Raises UserError, naming the row, where a row lacks a field, an id is no whole number, a number is not finite
        or a box has a negative side.
        """
        if isinstance(detections, DetectionTable):
            return detections
        if not isinstance(detections, Sequence) or isinstance(detections, str):
            raise UserError(
                f"detections must be a list of COCO results rows, received {type(detections).__name__}: "
                "write them as [{image_id, category_id, bbox, score}, ...]"
            )
        try:
            table = DetectionTable(
                np.array([row["image_id"] for row in detections]),
                np.array([row["category_id"] for row in detections]),
                np.array([row["bbox"] for row in detections]).reshape(-1, 4),
                np.array([row["score"] for row in detections]),
            )
            whole = not len(table) or (
                all(ids.dtype.kind == "i" for ids in (table.image_id, table.category_id))
                and all(numbers.dtype.kind in "iuf" for numbers in (table.bbox, table.score))
            )
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole or len(table.bbox) != len(detections):
            for index, row in enumerate(detections):
                _check_row(first_row + index, row)
            table = DetectionTable(  # whole numbers written as floats
                np.array([int(row["image_id"]) for row in detections], np.int64),
                np.array([int(row["category_id"]) for row in detections], np.int64),
                np.array([row["bbox"] for row in detections], np.float64).reshape(-1, 4),
                np.array([row["score"] for row in detections], np.float64),
            )
        table = DetectionTable(
            table.image_id.astype(np.int64),
            table.category_id.astype(np.int64),
            table.bbox.astype(np.float64),
            table.score.astype(np.float64),
        )
        faulty = ~(np.isfinite(table.bbox).all(1) & np.isfinite(table.score) & (table.bbox[:, 2:] >= 0).all(1))
        if faulty.any():
            index = int(faulty.argmax())
            _check_row(first_row + index, detections[index])
        return table

    @staticmethod
    def empty() -> DetectionTable:
        whole = np.zeros(0, np.int64)
        return DetectionTable(whole, whole, np.zeros((0, 4)), np.zeros(0))

    @staticmethod
    def concatenate(tables: Iterable[DetectionTable]) -> DetectionTable:
        tables = [DetectionTable.empty(), *tables]
        return DetectionTable(
            np.concatenate([table.image_id for table in tables]),
            np.concatenate([table.category_id for table in tables]),
            np.concatenate([table.bbox for table in tables]),
            np.concatenate([table.score for table in tables]),
        )


def _check_row(index: int, row: Any) -> None:
    """Raise UserError where one row is not a COCO detection."""
    remedy = "a row is {image_id: int, category_id: int, bbox: [x, y, width, height], score: number}"
    where = f"detections, row {index}"
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: received {row!r:.80}; {remedy}")
    for field in ("image_id", "category_id", "bbox", "score"):
        if field not in row:
            raise UserError(f"{where} has no {field}; {remedy}")
    for field in ("image_id", "category_id"):
        if whole_number(row[field]) is None:
            raise UserError(f"{where}: {field} must be a whole number, received {row[field]!r:.80}; {remedy}")
    try:
        box = np.asarray(row["bbox"])
    except ValueError:  # of uneven lists
        box = np.zeros(0)
    if box.shape != (4,) or box.dtype.kind not in "iuf":
        raise UserError(f"{where}: bbox must be four numbers, received {row['bbox']!r:.80}; {remedy}")
    score = as_number(row["score"])
    if score is None:
        raise UserError(f"{where}: score must be a number, received {row['score']!r:.80}; {remedy}")
    if not (np.isfinite(box).all() and np.isfinite(score)):
        raise UserError(
            f"{where} (image {row['image_id']}) is not finite: bbox {box.tolist()}, score {score}; drop such rows, "
            "and look for what made them"
        )
    if (box[2:] < 0).any():
        raise UserError(
            f"{where} (image {row['image_id']}) has a negative side: bbox {box.tolist()}; COCO boxes are "
            "[x, y, width, height], not two corners"
        )
