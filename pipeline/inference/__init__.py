"""Detections in original pixels, from images of any size: batches, multi-scale views, merging."""
