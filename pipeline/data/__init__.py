"""Data sets, shards, the exact stream, augmentation. The only part that imports webdataset."""

from __future__ import annotations

from typing import TYPE_CHECKING

from refinedet.pipeline.lazy import import_when_asked

if TYPE_CHECKING:
    from refinedet.pipeline.data.images import resize_image, stack_images
    from refinedet.pipeline.data.index import ShardSet, check_same_categories, open_shards
    from refinedet.pipeline.data.inspection import CheckReport, check_shards, show_samples
    from refinedet.pipeline.data.reading import EvaluationSamples, write_coco_annotations
    from refinedet.pipeline.data.samples import BadSample, Batch, Category, Cursor, Sample
    from refinedet.pipeline.data.shards import prepare_shards
    from refinedet.pipeline.data.stream import TrainingStream

__all__ = [
    "BadSample",
    "Batch",
    "Category",
    "CheckReport",
    "Cursor",
    "EvaluationSamples",
    "Sample",
    "ShardSet",
    "TrainingStream",
    "check_same_categories",
    "check_shards",
    "open_shards",
    "prepare_shards",
    "resize_image",
    "show_samples",
    "stack_images",
    "write_coco_annotations",
]

__getattr__ = import_when_asked(
    __name__,
    {
        "images": ("resize_image", "stack_images"),
        "index": ("ShardSet", "check_same_categories", "open_shards"),
        "inspection": ("CheckReport", "check_shards", "show_samples"),
        "reading": ("EvaluationSamples", "write_coco_annotations"),
        "samples": ("BadSample", "Batch", "Category", "Cursor", "Sample"),
        "shards": ("prepare_shards",),
        "stream": ("TrainingStream",),
    },
)
