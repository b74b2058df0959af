"""Data sets, shards, the exact stream, augmentation. The only part that imports webdataset."""

from pipeline.data.images import resize_image, stack_images
from pipeline.data.index import ShardSet, open_shards
from pipeline.data.inspection import CheckReport, check_shards, show_samples
from pipeline.data.reading import EvaluationSamples, write_coco_annotations
from pipeline.data.samples import BadSample, Batch, Category, Cursor, Sample
from pipeline.data.shards import prepare_shards
from pipeline.data.stream import TrainingStream

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
    "check_shards",
    "open_shards",
    "prepare_shards",
    "resize_image",
    "show_samples",
    "stack_images",
    "write_coco_annotations",
]
