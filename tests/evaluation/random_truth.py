"""Random ground truth and detections in COCO's formats, from a seed."""

from __future__ import annotations

from typing import Any

import numpy as np


def random_truth(
    seed: int, *, images: int, categories: int, objects: int = 8, detections: int = 100, ties: bool = True
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO instances dict and results rows: crowds, empty images and classes, sparse ids, near hits, tied scores.

    objects     of an image, on average; areas are those of masks, smaller than the boxes
    detections  of each image; about half near an object, with its category or another
    """
    rng = np.random.default_rng(seed)
    image_ids = rng.permutation(np.arange(1, 3 * images))[:images]
    category_ids = np.sort(rng.permutation(np.arange(1, 2 * categories + 1))[:categories])
    used = category_ids[: max(1, categories - categories // 4)]  # the others have no objects
    truth: dict[str, Any] = {
        "images": [{"id": int(i), "width": 640, "height": 480, "file_name": f"{i:06d}.jpg"} for i in image_ids],
        "categories": [{"id": int(c), "name": f"class {c}"} for c in category_ids],
        "annotations": [],
    }
    rows = []
    for image in image_ids.tolist():
        count = 0 if rng.random() < 0.1 else int(rng.poisson(objects))
        corners = rng.uniform(0, 500, (count, 2))
        sides = np.exp(rng.uniform(np.log(4), np.log(300), (count, 2)))
        boxes = np.concatenate([corners, sides], 1).round(2)
        labels = rng.choice(used, count)
        for box, label in zip(boxes.tolist(), labels.tolist(), strict=True):
            truth["annotations"].append(
                {
                    "id": len(truth["annotations"]) + 1,
                    "image_id": image,
                    "category_id": label,
                    "bbox": box,
                    "area": box[2] * box[3] * rng.uniform(0.4, 1),
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
        near = rng.random(detections) < 0.5 if count else np.zeros(detections, bool)
        source = rng.integers(0, max(count, 1), detections)
        found = np.concatenate([rng.uniform(0, 500, (detections, 2)), rng.uniform(0, 200, (detections, 2))], 1)
        found_labels = rng.choice(category_ids, detections)
        if count:
            jitter = rng.normal(0, 0.12, (detections, 4)) * boxes[source][:, [2, 3, 2, 3]]
            found = np.where(near[:, None], boxes[source] + jitter, found)
            found_labels = np.where(near & (rng.random(detections) < 0.8), labels[source], found_labels)
        exact = near & (rng.random(detections) < 0.2)
        found = np.where(exact[:, None], boxes[source] if count else found, found)
        found[:, 2:] = np.maximum(found[:, 2:], 0)
        scores = rng.random(detections).round(2 if ties else 12)
        rows += [
            {"image_id": image, "category_id": label, "bbox": box, "score": score}
            for label, box, score in zip(found_labels.tolist(), found.tolist(), scores.tolist(), strict=True)
        ]
    return truth, rows
