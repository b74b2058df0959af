"""Multi-scale recipes as data: those the RefineDet release's test code holds, and the one we derive for 1024.

Sides are pixels; the rectangle is for landscape images, swapped for portrait ones, and for square ones as in the
release (`h < w`). The paper gives no sizes and no limits, only results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from refinedet.model.config import RefineDetConfig
from refinedet.pipeline.config.spec import MergeRule, Multiscale, Pass, Selection
from refinedet.pipeline.runs.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """Passes for models of one input size, what each view keeps, and how the boxes are merged.

    source  where the numbers are from: the release, the paper or this project
    """

    input_size: int
    passes: tuple[Pass, ...]
    merge: MergeRule
    selection: Selection
    source: str


def _small(*sizes_and_sides: tuple[int, int]) -> tuple[Pass, ...]:
    """Enlarged passes: (size, keep boxes whose shorter side is below this)."""
    return tuple(Pass(size=size, min_side_below=side) for size, side in sizes_and_sides)


_VOTE = MergeRule(method="vote", iou=0.45, plus_one=True, max_detections=500)
_SOFT_VOTE = MergeRule(method="soft_vote", iou=0.45, plus_one=True, max_detections=500)

# The release's deploy net for evaluation. The paper's 400 candidates and 200 detections an image are for its speeds.
_RELEASE = Selection(score_threshold=0.01, pre_nms_top_k=1000, pre_nms_scope="class", nms_iou=0.45, max_detections=500)
_OF_RELEASE = (
    "sizes, limits of sides and merging of the release's test code; 1000 candidates a class and 500 detections in each "
    "view, of its deploy net for one size (its own net for several was edited by hand, and is not published)"
)
_OURS = (
    "ours: no recipe is published for this size. Sizes and limits of sides are those of coco512, doubled; merging and "
    "selection are the release's"
)

_PASSES_320 = (Pass(size=320), Pass(size=192, max_side_above=32), Pass(size=(192, 320)))
_PASSES_512 = (Pass(size=512), Pass(size=256), Pass(size=384), Pass(size=(384, 512)))
_PASSES_1024 = (Pass(size=1024), Pass(size=512), Pass(size=768), Pass(size=(768, 1024)))
_SMALL_320 = ((384, 160), (448, 128), (512, 96), (576, 64), (704, 32))
_SMALL_512 = ((768, 192), (896, 128))

RECIPES: dict[str, Recipe] = {
    "voc320": Recipe(320, _PASSES_320 + _small(*_SMALL_320), _VOTE, _RELEASE, _OF_RELEASE),
    "coco320": Recipe(320, _PASSES_320 + _small(*_SMALL_320, (640, 48)), _SOFT_VOTE, _RELEASE, _OF_RELEASE),
    "voc512": Recipe(512, _PASSES_512 + _small(*_SMALL_512), _VOTE, _RELEASE, _OF_RELEASE),
    "coco512": Recipe(
        512, _PASSES_512 + _small((640, 224), *_SMALL_512, (1024, 96), (1152, 64)), _SOFT_VOTE, _RELEASE, _OF_RELEASE
    ),
    # All sizes are multiples of the stride 128.
    "coco1024": Recipe(
        1024,
        _PASSES_1024 + _small((1280, 448), (1536, 384), (1792, 256), (2048, 192), (2304, 128)),
        _SOFT_VOTE,
        _RELEASE,
        _OURS,
    ),
}

MERGE_RULES: dict[str, MergeRule] = {
    "NMS 0.45": MergeRule(method="nms"),
    "soft-NMS, linear": MergeRule(method="soft_nms_linear"),
    "soft-NMS, Gaussian": MergeRule(method="soft_nms_gaussian"),
    "box voting": MergeRule(method="vote"),
    "soft box voting": MergeRule(method="soft_vote"),
    "soft box voting, +1": MergeRule(method="soft_vote", plus_one=True),
    "weighted box fusion": MergeRule(method="wbf"),
}


def resolve_passes(multiscale: Multiscale, config: RefineDetConfig) -> tuple[Pass, ...]:
    """The passes of the recipe or the job's own; UserError where they are not for the model's size or strides."""
    recipe = _recipe(multiscale)
    if recipe and recipe.input_size != config.input_size:
        fitting = [name for name, one in RECIPES.items() if one.input_size == config.input_size]
        remedy = f"take {' or '.join(fitting)}" if fitting else f"give passes such as [{{size: {config.input_size}}}]"
        raise UserError(
            f"multiscale.recipe {multiscale.recipe} is for models of input size {recipe.input_size}, received "
            f"model.input_size {config.input_size}; {remedy}"
        )
    passes = recipe.passes if recipe else multiscale.passes
    if not passes:
        raise UserError(
            "multiscale has neither `recipe` nor `passes`: give a recipe "
            f"({', '.join(sorted(RECIPES))}) or passes such as [{{size: {config.input_size}}}]"
        )
    stride = config.coarsest_stride
    for one in passes:
        if any(side % stride for side in sides_of(one)):
            raise UserError(
                f"multiscale: a pass's size must be a multiple of the model's coarsest stride {stride}, received "
                f"{one.size}; take {max(stride, round(max(sides_of(one)) / stride) * stride)} for the longer side"
            )
    return passes


def resolve_merge(multiscale: Multiscale) -> MergeRule:
    """The job's merge rule, or the recipe's: vote in VOC's, soft voting in COCO's; soft voting for own passes."""
    recipe = _recipe(multiscale)
    return multiscale.merge or (recipe.merge if recipe else MergeRule(method="soft_vote"))


def resolve_selection(multiscale: Multiscale, config: RefineDetConfig) -> RefineDetConfig:
    """The model's configuration with the selection of each view: the job's own, or the recipe's."""
    recipe = _recipe(multiscale)
    chosen = multiscale.selection or (recipe.selection if recipe else Selection())
    return replace(config, **chosen.model_dump(exclude_none=True))


def resolved_settings(multiscale: Multiscale, config: RefineDetConfig) -> dict[str, Any]:
    """All that a multi-scale test's detections depend on besides the model, whatever the recipes are next year."""
    selected = resolve_selection(multiscale, config)
    return {
        "passes": [one.model_dump(mode="json") for one in resolve_passes(multiscale, config)],
        "merge": resolve_merge(multiscale).model_dump(mode="json"),
        "selection": {name: getattr(selected, name) for name in Selection.model_fields},
    }


def describe_source(multiscale: Multiscale) -> str:
    """Source of the recipe's numbers, in one line."""
    recipe = _recipe(multiscale)
    if recipe is None:
        return "multi-scale: the job's own passes"
    changed = [name for name in ("merge", "selection") if getattr(multiscale, name) is not None]
    own = f"; {' and '.join(changed)} of the job" if changed else ""
    return f"{multiscale.recipe}: {recipe.source}{own}"


def estimate_cost(passes: Sequence[Pass], *, input_size: int, num_images: int) -> dict[str, float]:
    """Estimate the cost of multi-scale testing: {"views", "relative", "images"}.

    views     forward passes per image
    relative  pixels relative to one view at the input size, roughly the ratio of times
    images    views of all images
    """
    views = sum(1 + one.flip for one in passes)
    pixels = sum((1 + one.flip) * sides_of(one)[0] * sides_of(one)[1] for one in passes)
    return {"views": views, "relative": pixels / input_size**2, "images": views * num_images}


def describe_cost(passes: Sequence[Pass], *, input_size: int, num_images: int) -> str:
    """`estimate_cost` in one line, to print before it starts."""
    cost = estimate_cost(passes, input_size=input_size, num_images=num_images)
    return (
        f"multi-scale: {len(passes)} passes, {cost['views']:.0f} views of each of {num_images} images "
        f"({cost['images']:.0f} in all), about {cost['relative']:.1f} times the single-scale time"
    )


def rules_to_compare(multiscale: Multiscale) -> dict[str, MergeRule]:
    """MERGE_RULES with the job's own score threshold and number of detections."""
    own = resolve_merge(multiscale)
    limits = {"score_threshold": own.score_threshold, "max_detections": own.max_detections}
    return {name: rule.model_copy(update=limits) for name, rule in MERGE_RULES.items()}


def sides_of(one: Pass) -> tuple[int, int]:
    """Height and width for images that are wider than high."""
    return one.size if isinstance(one.size, tuple) else (one.size, one.size)


def _recipe(multiscale: Multiscale) -> Recipe | None:
    if multiscale.recipe is None:
        return None
    if multiscale.recipe not in RECIPES:
        raise UserError(f"multiscale.recipe must be one of {', '.join(sorted(RECIPES))}, received {multiscale.recipe}")
    return RECIPES[multiscale.recipe]
