"""Numbers of a data set from the contents of its shards; no image and no tar is read."""

from __future__ import annotations

from typing import Any

import numpy as np
from refinedet.pipeline.data.index import ShardSet

_SMALL, _LARGE = 32**2, 96**2  # pixels of a box, as COCO's area ranges


def count_objects(shards: ShardSet) -> dict[str, Any]:
    """Images, objects, their sizes by the area of their boxes, and objects of each class, as JSON values."""
    without = objects = skipped = 0
    by_class = np.zeros(shards.num_classes, np.int64)
    by_size = np.zeros(3, np.int64)
    ids = np.array([category.id for category in shards.categories], np.int64)
    for shard in range(len(shards)):
        columns = shards.read_columns(shard, "num_objects", "category_ids", "boxes", "learnt")
        learnt = columns["learnt"]
        boxes = columns["boxes"][learnt].astype(float)
        without += int((columns["num_objects"] == 0).sum())
        objects += len(boxes)
        skipped += int((~learnt).sum())
        by_class += np.bincount(np.searchsorted(ids, columns["category_ids"][learnt]), minlength=len(ids))
        by_size += np.bincount(np.digitize(boxes[:, 2] * boxes[:, 3], (_SMALL, _LARGE)), minlength=3)
    names = [category.name for category in shards.categories]
    return {
        "num_classes": shards.num_classes,
        "num_objects": objects,
        "crowds_and_bad_boxes": skipped,
        "images_without_objects": without,
        "small_objects": int(by_size[0]),
        "medium_objects": int(by_size[1]),
        "large_objects": int(by_size[2]),
        "objects_by_class": dict(zip(names, by_class.tolist(), strict=True)),
    }
