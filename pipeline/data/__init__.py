"""Data sets, shards, the exact stream, augmentation. The only room that imports webdataset."""
