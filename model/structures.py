"""What goes into the detector and what comes out of it.

B images, A anchors an image, G boxes in one image, C classes with background, N rows that the ADM computed
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class Matches:
    """Which box every anchor answers for; `matching.match_anchors` makes it.

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
    index      [N]        image * A + anchor of each ADM row, ascending; None: every anchor (N = B * A)
    adm_class  [N, C]     logits, background first
    adm_box    [N, 4]     deltas to `refined`
    matches    ADM matches, where the forward pass had to make them to choose its rows
    """

    anchors: Tensor
    refined: Tensor
    arm_class: Tensor | None
    arm_box: Tensor | None
    index: Tensor | None
    adm_class: Tensor
    adm_box: Tensor
    matches: Matches | None = None


@dataclass(frozen=True)
class Losses:
    """The four sums of equation 1, each already divided by its positives; scalars."""

    arm_class: Tensor
    arm_box: Tensor
    adm_class: Tensor
    adm_box: Tensor

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


@dataclass(frozen=True)
class Detections:
    """What was found in one image, most confident first.

    boxes   [N, 4]  xyxy, pixels of the network input, fp32, not clipped to the image
    scores  [N]     descending, fp32
    labels  [N]     1..num_classes, int64
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
