"""Inputs and outputs of the detector.

B images, A anchors per image, G boxes in one image, C classes with background, N rows that the ADM computed
"""

# torch's `tolist` is typed in part; targets come from callers that no type checker reads.
# pyright: reportUnknownMemberType=false, reportUnnecessaryIsInstance=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """The objects of one image.

    boxes   [G, 4]  xyxy, pixels of the network input, fp32
    labels  [G]     1..num_classes, int64
    """

    boxes: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return Targets(
            self.boxes.to(device, non_blocking=non_blocking), self.labels.to(device, non_blocking=non_blocking)
        )


AnyTargets = Targets | Mapping[str, Tensor]
"""Targets of one image: ours, or torchvision's dict with `boxes` and `labels`"""


def as_targets(targets: Sequence[AnyTargets], num_classes: int, *, batch: int, validate: bool = True) -> list[Targets]:
    """Targets of a batch from either form; a ValueError names the image and the box that cannot be meant.

    batch     number of images, each of which needs targets
    validate  check labels and coordinates; waits once for the device that holds them
    """
    if len(targets) != batch:
        raise ValueError(f"every image needs targets, received {len(targets)} targets for {batch} images.")
    ours = [_as_target(target, image) for image, target in enumerate(targets)]
    if not validate or not any(len(target.labels) for target in ours):
        return ours
    boxes, labels = torch.cat([target.boxes for target in ours]), torch.cat([target.labels for target in ours])
    wrong = (
        ~boxes.isfinite().all(1) | (boxes[:, 2:] < boxes[:, :2]).any(1) | (labels < 1) | (labels > num_classes)
    ).nonzero()
    if not len(wrong):
        return ours
    row = int(wrong[0])
    ends = list(accumulate(len(target.labels) for target in ours))
    image = next(image for image, end in enumerate(ends) if row < end)
    box, label = cast(list[float], boxes[row].tolist()), int(labels[row])
    name = f"box {row - ends[image] + len(ours[image].labels)} of image {image}"
    if not 1 <= label <= num_classes:
        raise ValueError(f"{name} must have a label in 1..{num_classes} (0 is background), received {label}.")
    raise ValueError(f"{name} must be finite xyxy pixels with x1 <= x2 and y1 <= y2, received {box}.")


def _as_target(target: AnyTargets, image: int) -> Targets:
    if isinstance(target, Targets):
        boxes, labels = target.boxes, target.labels
    elif isinstance(target, Mapping) and {"boxes", "labels"} <= target.keys():
        boxes, labels = target["boxes"], target["labels"]
    else:
        raise ValueError(
            f"the targets of image {image} must be Targets or a dict with boxes and labels, received "
            f"{sorted(target) if isinstance(target, Mapping) else type(target).__name__}."
        )
    if boxes.dim() != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
        raise ValueError(
            f"the boxes of image {image} must be [G, 4] and its labels [G], received {list(boxes.shape)} and "
            f"{list(labels.shape)}."
        )
    if labels.is_floating_point():
        raise ValueError(f"the labels of image {image} must be integers, received {labels.dtype}.")
    return Targets(boxes.float(), labels.long())


@dataclass(frozen=True)
class Matches:
    """Assignment of every anchor to a box, made by `matching.match_anchors`.

    labels  [B, A]  class of the matched box, 0: negative, -1: neither (its IoU lies between the thresholds)
    boxes   [B, A]  index of the matched box in its image's targets; only meaningful where labels > 0
    """

    labels: Tensor
    boxes: Tensor


@dataclass(frozen=True)
class Predictions:
    """Both modules' outputs, before any loss or selection. Logits and deltas are fp32.

    anchors    [A, 4]     tiled anchors, xyxy pixels
    refined    [B, A, 4]  anchors after the ARM (the tiled ones without a cascade); carry no gradient
    arm_class  [B, A, 2]  logits (background, object); None without an ARM
    arm_box    [B, A, 4]  deltas to `anchors`; None without an ARM
    index      [N]        image * A + anchor of each ADM row, in the order of `anchors.order_rows`; None: every anchor
                          in their own order (N = B * A)
    adm_class  [N, C]     logits, background first
    adm_box    [N, 4]     deltas to `row_boxes`
    row_boxes  [N, 4]     the refined anchor of each row
    matches    ADM matches, where the forward pass had to make them to choose its rows
    level_anchors  anchors of each level in one image; they sum to A
    filtered   the rows are those of the anchors that survive the negative filter, and no others
    padded     the number of rows is fixed; the index of an empty row is B * A
    """

    anchors: Tensor
    refined: Tensor
    arm_class: Tensor | None
    arm_box: Tensor | None
    index: Tensor | None
    adm_class: Tensor
    adm_box: Tensor
    row_boxes: Tensor
    matches: Matches | None = None
    level_anchors: tuple[int, ...] = ()
    filtered: bool = False
    padded: bool = False


@dataclass(frozen=True)
class Losses:
    """The four terms of equation 1, each divided by its positives; scalars.

    survivors  [levels] share of each level's anchors that pass the negative filter; None without an ARM
    rows       share of all anchors that the ADM computed: survivors of images with objects, and positives
    """

    arm_class: Tensor
    arm_box: Tensor
    adm_class: Tensor
    adm_box: Tensor
    survivors: Tensor | None = None
    rows: Tensor | None = None

    @property
    def total(self) -> Tensor:
        return self.arm_class + self.arm_box + self.adm_class + self.adm_box

    def parts(self) -> dict[str, Tensor]:
        return {
            "arm_class": self.arm_class,
            "arm_box": self.arm_box,
            "adm_class": self.adm_class,
            "adm_box": self.adm_box,
        }

    def shares(self) -> dict[str, Tensor]:
        """Shares of the anchors: `survivors_1` of the finest level and so on, and the ADM's `rows`."""
        levels = () if self.survivors is None else self.survivors.unbind()
        shares = {f"survivors_{number}": share for number, share in enumerate(levels, start=1)}
        return shares if self.rows is None else {**shares, "rows": self.rows}


@dataclass(frozen=True)
class LossSums:
    """The four sums of equation 1 before division; scalars, fp32.

    positives  [2] positive anchors of the ARM and of the ADM, fp32, without gradient; they add up over the parts of a
               global batch
    survivors, rows  as in `Losses`
    """

    arm_class: Tensor
    arm_box: Tensor
    adm_class: Tensor
    adm_box: Tensor
    positives: Tensor
    survivors: Tensor | None = None
    rows: Tensor | None = None

    def divide(self, positives: Tensor | None = None) -> Losses:
        """Divide by the positives [2] of the whole global batch (default: these), of which 0 counts as 1."""
        arm, adm = (self.positives if positives is None else positives).clamp(min=1).unbind()
        return Losses(
            self.arm_class / arm,
            self.arm_box / arm,
            self.adm_class / adm,
            self.adm_box / adm,
            self.survivors,
            self.rows,
        )


@dataclass(frozen=True)
class Detections:
    """Detections of one image, most confident first.

    boxes   [N, 4]  xyxy, pixels of the network input, fp32, not clipped to the image
    scores  [N]     descending, fp32
    labels  [N]     1..num_classes, int64
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class DetectionBatch:
    """The detections of a batch in tensors of fixed shapes, most confident first; zeros beyond each image's count.

    boxes   [B, D, 4]  as in `Detections`
    scores  [B, D]
    labels  [B, D]
    counts  [B]        detections of each image, int64
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    counts: Tensor

    def split(self) -> list[Detections]:
        """Detections of each image; waits for the device once."""
        capacity = self.scores.shape[1]
        counts = cast(list[int], self.counts.tolist())
        sizes = [size for count in counts for size in (count, capacity - count)]
        columns = (torch.split(part.flatten(0, 1), sizes)[::2] for part in (self.boxes, self.scores, self.labels))
        return [Detections(*found) for found in zip(*columns, strict=True)]


@dataclass(frozen=True)
class Rows:
    """Anchors that the ADM computes.

    place   [N]  ascending place in `anchors.order_rows`; B * A for an empty row
    anchor  [N]  image * A + anchor; B * A for an empty row
    """

    place: Tensor
    anchor: Tensor
