"""Data sets and shards for the tests of the data part."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.index import ShardSet
from refinedet.pipeline.data.shards import prepare_shards

NUM_SHAPES = 200


@pytest.fixture(scope="session")
def shapes_shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """200 small drawn images in about a dozen shards."""
    data = Data(format="shapes", image_size=64, train=(Split(count=NUM_SHAPES),), shard_bytes=80_000)
    shards = prepare_shards(data, "train", str(tmp_path_factory.mktemp("shapes")))
    assert len(shards) > 5
    return shards


def make_index(sizes: Sequence[int]) -> ShardSet:
    """An index of shards of the given numbers of samples, without the shards."""
    digests = ["0" * 64] * len(sizes)
    table = {
        "names": [f"shard-{number:06d}.tar" for number in range(len(sizes))],
        "bytes": [size * 1000 for size in sizes],
        "sha256": digests,
        "contents_sha256": digests,
        "num_samples": list(sizes),
    }
    categories = [{"id": 1, "name": "thing"}]
    index = {"format": "coco", "part": "train", "digest": "0" * 64, "categories": categories, "shards": table}
    return ShardSet("nowhere", index)


@pytest.fixture(scope="session")
def jpeg() -> Callable[..., bytes]:
    """Encode a picture of soft colours: `jpeg(height, width, *encoder_options)`."""

    def encode(height: int = 48, width: int = 64, *options: int) -> bytes:
        coarse = np.random.default_rng(height * width).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90, *options])[1].tobytes()

    return encode


@pytest.fixture
def coco_folder(tmp_path: Path, jpeg: Callable[..., bytes]) -> Callable[..., Data]:
    """Write a COCO data set of small images and return its `Data`: `coco_folder(count, edit=None, **settings)`.

    `edit(content)` changes the annotation file before it is written.
    """

    def write(count: int = 6, edit: Callable[[dict[str, Any]], None] | None = None, **settings: Any) -> Data:
        (tmp_path / "images").mkdir(exist_ok=True)
        images, annotations = [], []
        for number in range(1, count + 1):
            (tmp_path / "images" / f"{number}.jpg").write_bytes(jpeg(48, 64))
            images.append({"id": number, "file_name": f"{number}.jpg", "width": 64, "height": 48})
            annotations.append(
                {"id": number, "image_id": number, "category_id": 7, "bbox": [4, 6, 20, 10], "area": 150, "iscrowd": 0}
            )
        categories = [{"id": 90, "name": "brush"}, {"id": 7, "name": "train"}]
        content = {"images": images, "annotations": annotations, "categories": categories}
        if edit:
            edit(content)
        (tmp_path / "instances.json").write_text(json.dumps(content))
        split = Split(images="images", annotations="instances.json")
        return Data(format="coco", root=str(tmp_path), train=(split,), val=(split,), **settings)

    return write
