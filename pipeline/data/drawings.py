"""Splits of format `shapes`: images that are drawn, not read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.annotations import Annotation, Annotations, Record, SplitSource
from refinedet.pipeline.data.clutter import CLUTTER, draw_clutter
from refinedet.pipeline.data.samples import Category
from refinedet.pipeline.data.shapes import SHAPES, Drawing, Shape, draw_shapes, encode_jpeg


class _Kind(NamedTuple):
    draw: Callable[[int, str, int, int], Drawing]
    classes: Mapping[int, Shape]


_KINDS = {"simple": _Kind(draw_shapes, SHAPES), "clutter": _Kind(draw_clutter, CLUTTER)}
"""by `data.drawing`"""


def read_drawings(data: Data, part: str, first: int, split: Split) -> SplitSource:
    """Draw the images of a split, about 10 kB each at 160 pixels, of which `first` precede it in its part."""
    kind = _KINDS[data.drawing]
    records = []
    for index in range(first, first + (split.count or 0)):
        drawing = kind.draw(data.seed, part, index, data.image_size)
        height, width, _ = drawing.image.shape
        content = encode_jpeg(drawing.image)
        annotations = Annotations(
            Annotation(index * 100 + at, entry["category_id"], tuple(entry["bbox"]), entry["area"], entry["iscrowd"])
            for at, entry in enumerate(drawing.annotations, start=1)
        )
        name = f"{part}-{index:06d}.jpg"
        records.append(Record(index + 1, name, partial(bytes, content), len(content), annotations, width, height))
    categories = tuple(Category(category_id, shape.name) for category_id, shape in kind.classes.items())
    return SplitSource(categories, tuple(records), "shapes", fixed_ids=True)
