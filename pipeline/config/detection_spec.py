"""The spec's sections `evaluation` and `multiscale`: views, their selection, merging, the metric."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator
from refinedet.pipeline.config.section import (
    Fraction,
    FractionBelowOne,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

MergeMethod = Literal["nms", "soft_nms_linear", "soft_nms_gaussian", "vote", "soft_vote", "wbf"]


class MergeRule(Section):
    """Merging of the boxes of one class in one image."""

    method: MergeMethod = "nms"
    """how boxes of one object are merged"""
    iou: Fraction | None = None
    """overlap from which boxes meet; default: soft_nms 0.30, wbf 0.55, else 0.45"""
    sigma: PositiveFloat = 0.5
    """soft_nms_gaussian: width of the decay"""
    score_threshold: FractionBelowOne = 0.01
    """merged boxes below are dropped"""
    plus_one: bool = False
    """inclusive pixel corners: width = x2 - x1 + 1, as the authors' test code counts"""
    max_detections: PositiveInt = 200
    """boxes kept per image"""


MetricName = Literal["coco", "voc2007", "voc2012", "lvis", "openimages", "crowdhuman"]


class Evaluation(Section):
    batch_size: PositiveInt = 8
    """images that a worker detects in at once"""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """of detection, in validation too; auto: bf16 where the device computes in it natively, else fp32"""
    images_per_chunk: PositiveInt = 256
    """a chunk is the unit that is handed to a worker and committed"""
    merge: MergeRule | None = None
    """default: the model's own inference (section IV-H)"""
    metric: MetricName | None = None
    """default: coco, and for voc the year's"""
    ious: tuple[Fraction, ...] | None = None
    """overlaps from which a detection finds an object, ascending; default: the metric's"""
    max_detections: tuple[PositiveInt, ...] | None = None
    """detections that count, of one category in one image (lvis: of one image), ascending; default: the metric's"""
    areas: dict[str, tuple[NonNegativeFloat, PositiveFloat]] | None = None
    """area ranges beside all objects, name -> (low, high), square pixels; default: the metric's"""
    diagnose: bool = True
    """also find what the errors are and cost: `diagnosis` in metrics.json"""
    trace_images: NonNegativeInt = 500
    """images whose objects the diagnosis follows through the detector, spread over the data set; they are detected on
    once more"""
    validation_timeout_s: PositiveFloat = 3600
    """limit of one validation during training, on each rank"""


class Pass(Section):
    """One view of every image in multi-scale testing, and its mirror image."""

    size: PositiveInt | tuple[PositiveInt, PositiveInt]
    """side of the square, or (height, width) for landscape images, swapped for portrait and square ones; pixels"""
    flip: bool = True
    """detect in the mirror image too"""
    min_side_below: PositiveFloat | None = None
    """keep boxes whose shorter side, in original pixels, is below this"""
    max_side_above: PositiveFloat | None = None
    """keep boxes whose longer side, in original pixels, is above this"""


class Selection(Section):
    """Limits of each view's detections before the views are merged; None: as the model's own inference."""

    score_threshold: FractionBelowOne | None = None
    """detections below are dropped"""
    pre_nms_top_k: PositiveInt | None = None
    """candidates before NMS"""
    pre_nms_scope: Literal["image", "class"] | None = None
    """whether that count is by image or by class"""
    nms_iou: Fraction | None = None
    """overlap from which NMS drops the less confident of two boxes of a class"""
    max_detections: PositiveInt | None = None
    """detections of an image that are kept"""


class Multiscale(Section):
    recipe: str | None = None
    """of the release's test code: voc320, coco320, voc512, coco512; ours, derived from coco512: coco1024"""
    passes: tuple[Pass, ...] = ()
    """own passes instead of a recipe's"""
    selection: Selection | None = None
    """default: the recipe's, which is the release's; for own `passes` the model's own inference"""
    merge: MergeRule | None = None
    """default: the recipe's, vote in voc's and soft_vote in coco's; soft_vote for own `passes`"""
    compare_rules: bool = False
    """also measure the merge methods of `recipes.MERGE_RULES`, on the same passes: `merge_rules` in metrics.json"""
    batch_size: PositiveInt = 8
    """views that a worker detects in at once"""

    @model_validator(mode="after")
    def _one_source(self) -> Multiscale:
        if self.recipe and self.passes:
            raise ValueError("multiscale takes either `recipe` or `passes`, received both")
        return self
