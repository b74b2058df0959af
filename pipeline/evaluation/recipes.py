"""Published multi-scale recipes, as data (the RefineDet release's test code), and the one we derive for 1024.

Sides are pixels; the rectangle is for landscape images, swapped for portrait ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.spec import MergeRule, Pass


@dataclass(frozen=True)
class Recipe:
    input_size: int
    passes: tuple[Pass, ...]
    merge: MergeRule


def _small(*sizes_and_sides: tuple[int, int]) -> tuple[Pass, ...]:
    """Enlarged passes: (size, keep boxes whose shorter side is below this)."""
    return tuple(Pass(size=size, min_side_below=side) for size, side in sizes_and_sides)


_VOTE = MergeRule(method="vote", iou=0.45, plus_one=True, max_detections=500)
_SOFT_VOTE = MergeRule(method="soft_vote", iou=0.45, plus_one=True, max_detections=500)

_PASSES_320 = (Pass(size=320), Pass(size=192, max_side_above=32), Pass(size=(192, 320)))
_PASSES_512 = (Pass(size=512), Pass(size=256), Pass(size=384), Pass(size=(384, 512)))
_PASSES_1024 = (Pass(size=1024), Pass(size=512), Pass(size=768), Pass(size=(768, 1024)))
_SMALL_320 = ((384, 160), (448, 128), (512, 96), (576, 64), (704, 32))
_SMALL_512 = ((768, 192), (896, 128))

RECIPES: dict[str, Recipe] = {
    "voc320": Recipe(320, _PASSES_320 + _small(*_SMALL_320), _VOTE),
    "coco320": Recipe(320, _PASSES_320 + _small(*_SMALL_320, (640, 48)), _SOFT_VOTE),
    "voc512": Recipe(512, _PASSES_512 + _small(*_SMALL_512), _VOTE),
    "coco512": Recipe(512, _PASSES_512 + _small((640, 224), *_SMALL_512, (1024, 96), (1152, 64)), _SOFT_VOTE),
    # Not published: coco512's sizes and limits, doubled; all sizes are multiples of the stride 128.
    "coco1024": Recipe(
        1024,
        _PASSES_1024 + _small((1280, 448), (1536, 384), (1792, 256), (2048, 192), (2304, 128)),
        _SOFT_VOTE,
    ),
}
