"""Several validation splits are one ground truth: their files number annotations each from 1."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.reading import write_coco_annotations
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.evaluation.metrics import evaluate
from refinedet.pipeline.runs.errors import UserError

from tests.data.shape_files import write_shapes

from .judges import judge_by_pycocotools


def write_split(root: Path, name: str, *, seed: int, first_image_id: int) -> Split:
    """Eight drawn images in COCO's layout; annotations are numbered from 1 whatever the name."""
    write_shapes(str(root / name), 8, seed=seed, part="val", image_size=96)
    path = root / name / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["id"] += first_image_id - 1
    for number, annotation in enumerate(content["annotations"], start=1):
        annotation["image_id"] += first_image_id - 1
        annotation["id"] = number
    path.write_text(json.dumps(content))
    return Split(images=f"{name}/val", annotations=f"{name}/annotations/instances_val.json")


def test_annotation_ids_of_two_splits_stay_unique(tmp_path: Path) -> None:
    splits = tuple(
        write_split(tmp_path, name, seed=seed, first_image_id=1 + 100 * seed) for seed, name in enumerate("ab")
    )
    data = Data(format="coco", root=str(tmp_path), val=splits, max_bad_samples=0)
    shards = prepare_shards(data, "val", str(tmp_path / "shards"))
    assert json.loads((tmp_path / "shards" / "index.json").read_text())["faults"] == []
    write_coco_annotations(shards, str(tmp_path / "truth.json"))
    truth = json.loads((tmp_path / "truth.json").read_text())
    files = [json.loads((tmp_path / split.annotations).read_text()) for split in splits if split.annotations]
    assert len(truth["annotations"]) == sum(len(file["annotations"]) for file in files) > 20
    ids = [annotation["id"] for annotation in truth["annotations"]]
    assert len(set(ids)) == len(ids)
    assert min(ids) > 0
    rows = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 0.9}
        for one in truth["annotations"]
        if not one["iscrowd"]
    ]
    values = evaluate("coco", truth, rows).values
    assert values == judge_by_pycocotools(truth, rows)
    assert values["AP"] == pytest.approx(1)


def test_an_image_id_in_two_splits_is_refused(tmp_path: Path) -> None:
    splits = tuple(write_split(tmp_path, name, seed=seed, first_image_id=1) for seed, name in enumerate("ab"))
    with pytest.raises(UserError, match=r"image id 1 of b/.* is already taken in a/"):
        prepare_shards(Data(format="coco", root=str(tmp_path), val=splits), "val", str(tmp_path / "shards"))
