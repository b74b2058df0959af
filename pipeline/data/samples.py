"""Samples, batches, and the cursor of a stream.

G objects in one image, B images in a batch, H W S pixels. Boxes are xyxy pixels, continuous: the image's corner is
(0, 0), pixel i covers [i, i + 1). Labels are 1..C, in the order of ascending category id; 0 is background.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from refinedet.model.structures import Targets
    from torch import Tensor


@dataclass(frozen=True, order=True)
class Category:
    """A class of the data set; `id` is the data set's own, sparse as COCO's 1..90."""

    id: int
    name: str


class Cursor(NamedTuple):
    """The next global batch of a stream: everything before it was delivered, nothing from it on."""

    epoch: int = 0
    batch: int = 0


@dataclass(frozen=True)
class BadSample:
    """A sample or object that could not be used as it is: where it is, and why."""

    shard: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.shard}, {self.key}: {self.reason}"


@dataclass(frozen=True)
class Sample:
    """One image and its objects.

    image      uint8   [H, W, 3]  RGB
    boxes      float32 [G, 4]     pixels of `image`, inside it, of positive area
    labels     int64   [G]        1..C
    crowd      bool    [G]        a region of many objects, not one object to train on
    difficult  bool    [G]        VOC's flag
    """

    key: str
    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    difficult: np.ndarray
    image_id: int
    file_name: str = ""
    fault: BadSample | None = None
    """why the image could not be decoded (it is plain grey then) or was decoded in part"""

    def keep(self, mask: np.ndarray) -> Sample:
        """The same image with the objects of `mask` [G] only."""
        return replace(
            self,
            boxes=self.boxes[mask],
            labels=self.labels[mask],
            crowd=self.crowd[mask],
            difficult=self.difficult[mask],
        )


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank.

    images   uint8 [B, 3, S, S]  RGB, channels-last, pinned where CUDA is available
    targets  B of them; crowds are excluded
    keys     of the samples; "" for a blank, which fills up a batch
    index    of the global batch within the epoch
    part     of this rank's share of that global batch, 0 .. accumulation - 1
    faults   samples of this micro-batch that could not be decoded: grey images without objects in their place
    """

    images: Tensor
    targets: tuple[Targets, ...]
    keys: tuple[str, ...]
    image_ids: tuple[int, ...]
    epoch: int
    index: int
    part: int = 0
    faults: Sequence[BadSample] = ()

    def __len__(self) -> int:
        return len(self.keys)
