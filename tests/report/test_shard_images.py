from __future__ import annotations

import numpy as np
from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.reading import EvaluationSamples, write_coco_annotations
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.report.shard_images import ShardImages
from refinedet.pipeline.runs import storage


def test_images_come_back_by_their_id_in_any_order(tmp_path):
    url = str(tmp_path / "val")
    data = Data(format="shapes", image_size=64, train=(Split(count=1),), val=(Split(count=6),), shard_bytes=20_000)
    shards = prepare_shards(data, "val", url)
    write_coco_annotations(shards, str(tmp_path / "ground_truth.json"))
    truth = storage.read_json(str(tmp_path / "ground_truth.json"))
    ids = [image["id"] for image in truth["images"]]
    images = {sample.image_id: sample.image for sample in EvaluationSamples(shards)}
    found = ShardImages(url, ids)([ids[4], ids[0], 10**9])
    assert set(found) == {ids[4], ids[0]}
    assert all(np.array_equal(found[image_id], images[image_id]) for image_id in found)
