"""Statistics of the shards of one part: classes, boxes, image sizes, duplicates, EXIF; and its objects and the anchors.

`statistics.json` lies beside the shards and is written with them. It needs no image: all of it is in the columns.

N images, G objects to train on
"""

from __future__ import annotations

from typing import Any

import numpy as np
from refinedet.model.anchors import ASPECTS, SCALE
from refinedet.model.config import RefineDetConfig
from refinedet.pipeline.data.index import ShardSet, format_key
from refinedet.pipeline.data.remote import exists, read_json
from refinedet.pipeline.runs import storage

STATISTICS = "statistics.json"
_SMALL, _LARGE = 32**2, 96**2  # COCO's area ranges, square pixels
_EXAMPLES = 5
ELONGATED = 3.0
"""longer side over shorter one from which a box counts as elongated"""


def read_statistics(shards: ShardSet) -> dict[str, Any]:
    """The statistics beside the shards; computed where there are none, as of shards of an earlier release."""
    path = storage.join(shards.url, STATISTICS)
    if exists(path):
        found = read_json(path)
        if found.get("digest") == shards.digest:
            return found
    return part_statistics(shards)


def part_statistics(shards: ShardSet) -> dict[str, Any]:
    """Statistics as JSON values; boxes are measured in pixels of the images as the shards hold them."""
    num_classes = shards.num_classes
    objects, images = np.zeros(num_classes + 1, np.int64), np.zeros(num_classes + 1, np.int64)
    sides, aspects, widths, heights, orientations, keys = [], [], [], [], [], []
    without, ignored = 0, 0
    for shard in range(len(shards)):
        columns = shards.read_columns(
            shard, "keys", "widths", "heights", "orientations", "num_objects", "category_ids", "boxes", "learnt"
        )
        sample, label, boxes = _objects(shards, columns)
        objects += np.bincount(label, minlength=num_classes + 1)
        images += np.bincount(np.unique(np.stack([sample, label]), axis=1)[1], minlength=num_classes + 1)
        without += len(columns["widths"]) - len(np.unique(sample))
        ignored += len(columns["learnt"]) - len(label)
        width, height = (boxes[:, 2:] - boxes[:, :2]).T
        sides.append(np.sqrt(width * height))
        aspects.append(width / height)
        widths.append(columns["widths"])
        heights.append(columns["heights"])
        orientations.append(columns["orientations"])
        keys.append(columns["keys"])
    side = np.concatenate(sides)
    return {
        "digest": shards.digest,
        "images": shards.num_samples,
        "images_without_objects": without,
        "objects": len(side),
        "objects_not_learnt": ignored,
        "classes": {
            category.name: {"objects": int(objects[label]), "images": int(images[label])}
            for label, category in enumerate(shards.categories, start=1)
        },
        "box_side": _quantiles(side),
        "box_aspect": _quantiles(np.concatenate(aspects)),
        "small": int((side**2 < _SMALL).sum()),
        "medium": int(((side**2 >= _SMALL) & (side**2 < _LARGE)).sum()),
        "large": int((side**2 >= _LARGE).sum()),
        "image_width": _quantiles(np.concatenate(widths)),
        "image_height": _quantiles(np.concatenate(heights)),
        "exif_turned": int((np.concatenate(orientations) > 1).sum()),
        "duplicates": _duplicates(image_hashes(shards), np.concatenate(keys)),
    }


def image_hashes(shards: ShardSet) -> np.ndarray:
    """64 bits of the digest of each image file of the data set; uint64 [N]."""
    return np.concatenate([shards.read_columns(shard, "image_hashes")["image_hashes"] for shard in range(len(shards))])


def anchor_reach(shards: ShardSet, model: RefineDetConfig) -> dict[str, Any]:
    """The objects that no anchor overlaps by the ARM's positive IoU, in the plain view of the model's input size.

    Such an object is learned through its one best anchor alone, by bipartite matching (section IV-D).
    """
    total, missed = np.zeros(shards.num_classes + 1, np.int64), np.zeros(shards.num_classes + 1, np.int64)
    reasons = dict.fromkeys(("small", "elongated", "other"), 0)
    smallest = (SCALE * model.strides[0]) ** 2
    for shard in range(len(shards)):
        columns = shards.read_columns(shard, "widths", "heights", "num_objects", "category_ids", "boxes", "learnt")
        sample, label, boxes = _objects(shards, columns)
        size = np.stack([columns["widths"], columns["heights"]] * 2, 1)[sample]
        boxes = boxes * (model.input_size / size)
        unreached = best_overlaps(boxes, model) < model.arm_iou[1]
        total += np.bincount(label, minlength=len(total))
        missed += np.bincount(label[unreached], minlength=len(total))
        width, height = (boxes[unreached, 2:] - boxes[unreached, :2]).T
        small = width * height < model.arm_iou[1] * smallest
        elongated = ~small & (np.maximum(width / height, height / width) >= ELONGATED)
        reasons["small"] += int(small.sum())
        reasons["elongated"] += int(elongated.sum())
        reasons["other"] += int((~small & ~elongated).sum())
    return {
        "input_size": model.input_size,
        "iou": model.arm_iou[1],
        "objects": int(total.sum()),
        "unreached": int(missed.sum()),
        "unreached_because": reasons,
        "unreached_by_class": {
            category.name: int(missed[label])
            for label, category in enumerate(shards.categories, start=1)
            if missed[label]
        },
    }


def best_overlaps(boxes: np.ndarray, model: RefineDetConfig) -> np.ndarray:
    """IoU of each box with the anchor that overlaps it best; float64 [G].

    boxes  [G, 4]  xyxy, pixels of the network input
    Of the anchors of one shape, the one with the nearest centre overlaps most: only it is compared.
    """
    centre, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    best = np.zeros(len(boxes))
    for stride in model.strides:
        cell = np.clip(centre // stride, 0, model.input_size // stride - 1)
        at = (cell + 0.5) * stride
        for aspect in ASPECTS:
            anchor = SCALE * stride * np.array([aspect**0.5, aspect**-0.5])
            low = np.maximum(centre - extent / 2, at - anchor / 2)
            high = np.minimum(centre + extent / 2, at + anchor / 2)
            inside = np.maximum(high - low, 0).prod(1)
            best = np.maximum(best, inside / (extent.prod(1) + anchor.prod() - inside))
    return best


def _objects(shards: ShardSet, columns: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sample within the shard [G], label [G] and xyxy box [G, 4], clipped to its image, of the objects to train on."""
    learnt = columns["learnt"]
    sample = np.repeat(np.arange(len(columns["widths"])), columns["num_objects"])[learnt]
    label = np.searchsorted([category.id for category in shards.categories], columns["category_ids"][learnt]) + 1
    boxes = columns["boxes"][learnt].astype(np.float64)
    boxes[:, 2:] += boxes[:, :2]
    size = np.stack([columns["widths"], columns["heights"]] * 2, 1)[sample]
    return sample, label, np.clip(boxes, 0, size)


def _quantiles(values: np.ndarray) -> dict[str, float]:
    if not len(values):
        return {}
    found = np.quantile(values, (0, 0.05, 0.5, 0.95, 1))
    return {name: float(f"{value:.4g}") for name, value in zip(("min", "5%", "50%", "95%", "max"), found, strict=True)}


def _duplicates(hashes: np.ndarray, keys: np.ndarray) -> dict[str, Any]:
    """Images whose file equals an earlier one's, and the first groups of equal ones by key."""
    order = np.argsort(hashes, kind="stable")
    _, starts, counts = np.unique(hashes[order], return_index=True, return_counts=True)
    groups = [order[start : start + count] for start, count in zip(starts, counts, strict=True) if count > 1]
    groups.sort(key=lambda group: int(group[0]))
    examples = [[format_key(int(keys[at])) for at in group[:_EXAMPLES]] for group in groups[:_EXAMPLES]]
    return {"images": int((counts - 1).sum()), "examples": examples}
