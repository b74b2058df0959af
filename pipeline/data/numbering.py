"""Ids of images and annotations, unique in a part of a data set."""

from __future__ import annotations

from typing import Any

import numpy as np
from refinedet.pipeline.data.annotations import SplitSource
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.samples import BadSample
from refinedet.pipeline.runs.errors import UserError


class Numbering:
    """Keeps ids unique in a part, and those of annotations positive: COCO's code takes id 0 for "unmatched".

    A data set's own image ids must be unique; where a format has none, they follow the split before. Files number
    their annotations each from 1: an id that another split has taken is given a new one, and no fault.
    """

    def __init__(self, faults: FaultLog, part: str) -> None:
        self.faults = faults
        self.part = part
        self.source = SplitSource((), ())
        self.names: dict[int, str] = {}
        self.number = 0
        self.images: dict[int, str] = {}
        self.annotations: dict[int, int] = {}  # id -> the last split that had it; empty while ids are `plain`
        self.plain: dict[int, np.ndarray] = {}
        """ids of each split, by its number, as long as all are positive and none occurs twice: 8 bytes each"""
        self.free = 2**40
        self.offset = self.last = self.last_annotation = 0
        self.simple = False

    def next_source(self, source: SplitSource) -> None:
        self.source = source
        self.names = {category.id: category.name for category in source.categories}
        self.number += 1
        self.offset = 0 if source.fixed_ids else self.last
        self.simple = source.fixed_ids and not self.annotations and self._take_all(source)
        if not self.simple:
            for split, ids in self.plain.items():
                self.annotations |= dict.fromkeys(ids.tolist(), split)
            self.plain.clear()

    def _take_all(self, source: SplitSource) -> bool:
        """Note the ids of a split at once; False where one of them needs attention."""
        ids = np.concatenate([np.zeros(0, np.int64), *(record.annotations.ids() for record in source.records)])
        every = np.sort(np.concatenate([*self.plain.values(), ids]))
        if len(every) and (every[0] <= 0 or (every[1:] == every[:-1]).any()):
            return False
        self.plain[self.number] = ids
        return True

    def take_image(self, image_id: int) -> int:
        image_id += self.offset
        if image_id in self.images:
            raise UserError(
                f"image id {image_id} of {self.source.name} is already taken in {self.images[image_id]}: "
                "image ids must be unique in data.train and in data.val"
            )
        self.images[image_id] = self.source.name
        self.last = max(self.last, image_id)
        return image_id

    def take_annotation(self, received: Any, source: SplitSource) -> int:
        if self.simple:
            return received
        if not source.fixed_ids:
            self.last_annotation += 1
            received = self.last_annotation
        number = type(received) is int and 0 < received < 2**63
        before = self.annotations.get(received) if number else None  # type: ignore[arg-type]
        if number:
            self.annotations[received] = self.number  # type: ignore[index]
            if before is None:
                return received  # type: ignore[return-value]
        self.free += 1
        if not number or before == self.number:
            why = "occurs twice" if number else "is not a positive number"
            key = f"annotation {received!r}"
            self.faults.add(BadSample(source.name, key, f"its id {why}; it becomes {self.free}"))
        return self.free
