"""Ground truth of a COCO instances file, as columns.

G objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class GroundTruth:
    """Objects of a COCO instances file.

    image_ids     [I] int64, ascending, unique
    category_ids  [K] int64, ascending, unique
    names         K category names
    image_id, category_id, annotation_id  [G] int64
    bbox          [G, 4] float64 xywh
    area          [G] float64: the annotation's own (of its mask), not the box's
    crowd         [G] bool
    """

    image_ids: np.ndarray
    category_ids: np.ndarray
    names: tuple[str, ...]
    image_id: np.ndarray
    category_id: np.ndarray
    annotation_id: np.ndarray
    bbox: np.ndarray
    area: np.ndarray
    crowd: np.ndarray

    @staticmethod
    def of(source: GroundTruth | Mapping[str, Any] | str) -> GroundTruth:
        """From a COCO instances dict or its file; UserError where it is not one."""
        raise NotImplementedError
