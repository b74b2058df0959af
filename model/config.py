"""Description of a detector; everything in `model/` is built from it.

Free of torch, so that a job spec can be read and checked without loading it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

VGG16_REDUCED = "vgg16_reduced"

MapNorm = Literal["batch", "l2", "none"]


@dataclass(frozen=True)
class RefineDetConfig:
    """A RefineDet++ detector. Defaults are the paper's (P); `C` marks the Caffe release's value.

    num_classes               foreground classes; class 0, background, comes on top
    input_size                side of the square input, pixels; a multiple of the coarsest stride
    backbone                  "vgg16_reduced", or any timm model that supports `features_only`
    num_levels                detection levels; None: 4 below 1024 pixels, 5 from there on (section V-C)
    head                      the ADM's predictor: AlignConv (III-D), deformable or vanilla convolution
    kernel_size               of that predictor (table III)
    theta                     anchors with a negative confidence above it are filtered (III-B, table IV)
    filter_negatives          where theta applies: "always", or in "training" only
    cascade                   False: the ADM starts from the tiled anchors (table II, column 4)
    tcb                       False: no transfer connection blocks and no ARM, like SSD (table II, column 5)
    tcb_channels              width of the TCBs and of the ADM's input
    norm                      batch normalisation: per-worker "batch" (C), "sync" over the workers, or "frozen": the
                              backbone keeps its imported statistics, new blocks are synchronised
    normalization             of the input: "backbone", what the torchvision or timm weights expect, or "caffe":
                              BGR minus (104, 117, 123), for weights that came from Caffe (C)
    map_norm                  of the backbone's maps, which the ARM and the TCBs read: "batch", or "l2", every cell's
                              vector scaled to a learned length; None: "l2" for VGG's finest two (P), else "batch"
    prediction_block          a bottleneck, 256-256-1024, before every ARM and ADM predictor; P does not mention it, C
                              has it for ResNet; None: on for all but VGG
    tcb_norm                  BN in the TCBs; None: on for all but VGG (C)
    arm_iou, adm_iou          (negative below, positive from); P (0.5, 0.5), later advice for the ARM (0.3, 0.7)
    negatives_per_positive    hard negative mining ratio (IV-E)
    loss_normalization        "per_module": ARM and ADM by their own positives (equation 1); "arm": both by the ARM's
    activation_checkpointing  recompute the backbone's blocks in backward; for 1024 inputs
    score_threshold           detections below are dropped
    pre_nms_top_k             most confident detections kept before NMS: 400 per image (P), 1000 per class (C)
    pre_nms_scope             whether that count is by "image" (P) or by "class" (C)
    nms_iou                   IoU of the per-class NMS
    max_detections            kept per image: 200 (P), 500 (C)
    """

    num_classes: int = 80
    input_size: int = 320
    backbone: str = "resnet101"
    num_levels: int | None = None
    head: Literal["align", "deform", "vanilla"] = "align"
    kernel_size: Literal[3, 5, 7] = 3
    theta: float = 0.99
    filter_negatives: Literal["always", "training"] = "always"
    cascade: bool = True
    tcb: bool = True
    tcb_channels: int = 256
    norm: Literal["batch", "frozen", "sync"] = "batch"
    normalization: Literal["backbone", "caffe"] = "backbone"
    map_norm: MapNorm | None = None
    prediction_block: bool | None = None
    tcb_norm: bool | None = None
    arm_iou: tuple[float, float] = (0.5, 0.5)
    adm_iou: tuple[float, float] = (0.5, 0.5)
    negatives_per_positive: float = 3.0
    loss_normalization: Literal["per_module", "arm"] = "per_module"
    activation_checkpointing: bool = False
    score_threshold: float = 0.01
    pre_nms_top_k: int = 400
    pre_nms_scope: Literal["image", "class"] = "image"
    nms_iou: float = 0.45
    max_detections: int = 200

    # Read by pydantic where a job spec holds this class; a plain dict, so that pydantic is not needed here.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        for name, values in _literals().items():
            if getattr(self, name) not in values:
                allowed = ", ".join(map(repr, values[:-1])) + f" or {values[-1]!r}"
                raise ValueError(f"{name} must be {allowed}, received {getattr(self, name)!r}.")
        for name in ("num_classes", "tcb_channels", "pre_nms_top_k", "max_detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, received {getattr(self, name)}.")
        if not 0.0 <= self.score_threshold < 1.0:
            raise ValueError(f"score_threshold must lie in [0, 1), received {self.score_threshold}.")
        if not 0.0 <= self.nms_iou <= 1.0:
            raise ValueError(f"nms_iou must lie in [0, 1], received {self.nms_iou}.")
        if not 0.0 < self.negatives_per_positive < math.inf:
            raise ValueError(
                f"negatives_per_positive must be a number above 0, received {self.negatives_per_positive}."
            )
        if self.num_levels not in (None, 4, 5):
            raise ValueError(f"num_levels must be 4 or 5, received {self.num_levels}.")
        if self.input_size < self.coarsest_stride or self.input_size % self.coarsest_stride:
            raise ValueError(
                f"input_size must be a multiple of {self.coarsest_stride} with {self.levels} levels, "
                f"received {self.input_size}."
            )
        if not 0.0 < self.theta <= 1.0:
            raise ValueError(f"theta must lie in (0, 1], received {self.theta}.")
        for name in ("arm_iou", "adm_iou"):
            low, high = getattr(self, name)
            if not 0.0 <= low <= high <= 1.0:
                raise ValueError(f"{name} must be (low, high) with 0 <= low <= high <= 1, received {(low, high)}.")
        if not self.tcb and (self.cascade or self.head == "align"):
            raise ValueError(
                "tcb: false removes the ARM, so nothing refines the anchors; set cascade: false and head: vanilla too."
            )

    @property
    def levels(self) -> int:
        """Number of detection levels, resolved."""
        return self.num_levels or (5 if self.input_size >= 1024 else 4)

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each detection level, pixels: 8, 16, 32, 64 (, 128)."""
        return tuple(8 * 2**level for level in range(self.levels))

    @property
    def coarsest_stride(self) -> int:
        return self.strides[-1]


@functools.cache
def _literals() -> dict[str, tuple[Any, ...]]:
    """The values of every field that has a fixed set of them."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, hint in get_type_hints(RefineDetConfig).items():
        parts = [hint] if get_origin(hint) is Literal else get_args(hint)
        if any(get_origin(part) is Literal for part in parts):
            found[name] = tuple(
                value for part in parts for value in (get_args(part) if get_origin(part) is Literal else (None,))
            )
    return found
