"""The synthetic data set as files, for tests of a user's own data."""

from __future__ import annotations

import json
import os

from refinedet.pipeline.data.shapes import SHAPES, draw_shapes, encode_jpeg


def write_shapes(folder: str, count: int, *, seed: int = 0, part: str = "train", image_size: int = 160) -> None:
    """Write a COCO-format data set: `<part>/*.jpg` and `annotations/instances_<part>.json`."""
    os.makedirs(os.path.join(folder, part), exist_ok=True)
    os.makedirs(os.path.join(folder, "annotations"), exist_ok=True)
    images, annotations = [], []
    for index in range(count):
        name = f"{part}-{index:06d}.jpg"
        drawing = draw_shapes(seed, part, index, image_size)
        height, width, _ = drawing.image.shape
        with open(os.path.join(folder, part, name), "wb") as file:
            file.write(encode_jpeg(drawing.image))
        images.append({"id": index + 1, "file_name": name, "width": width, "height": height})
        for position, annotation in enumerate(drawing.annotations):
            annotations.append({"id": index * 100 + position + 1, "image_id": index + 1, **annotation})
    categories = [{"id": category_id, "name": shape.name} for category_id, shape in SHAPES.items()]
    with open(os.path.join(folder, "annotations", f"instances_{part}.json"), "w") as file:
        json.dump({"images": images, "annotations": annotations, "categories": categories}, file)
