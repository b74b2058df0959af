"""Data sets, shards, the exact stream, augmentation. The only part that imports webdataset."""

from pipeline.data.samples import BadSample, Batch, Category, Cursor, Sample

__all__ = ["BadSample", "Batch", "Category", "Cursor", "Sample"]
