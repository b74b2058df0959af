"""Detections as columns, and as the rows of a COCO results file.

N detections. Boxes here are COCO's xywh, in pixels of the original image; category ids are the data set's own
(sparse) ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

BOX_DECIMALS = 3
SCORE_DECIMALS = 6


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
    def of(detections: DetectionTable | Sequence[Mapping[str, Any]]) -> DetectionTable:
        """The table of COCO results rows; a table is returned as it is. Raises UserError on rows that are not."""
        raise NotImplementedError

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
