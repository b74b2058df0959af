"""Pictures, data sets and steps as a job logs them to MLflow, without Ray and without a store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refinedet.pipeline.cluster.result_pictures import ResultPictures
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.data.reading import write_coco_annotations
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.data.statistics import read_statistics
from refinedet.pipeline.evaluation.shown_images import keep_shown, read_shown, shown_ids
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.inference.weight_files import weights_step
from refinedet.pipeline.runs import storage
from safetensors.torch import save_file


class Tracker:
    """Takes what an MLflow run would."""

    def __init__(self) -> None:
        self.pictures: dict[tuple[str, int], np.ndarray] = {}

    def log_picture(self, key: str, step: int, image: np.ndarray) -> None:
        self.pictures[key, step] = image


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    values = {"name": "r", "runs": str(tmp_path_factory.mktemp("runs"))}
    data = {"format": "shapes", "image_size": 96, "train": [{"count": 2}], "val": [{"count": 9}]}
    run = Run(JobSpec.model_validate({**values, "data": data, "tracking": {"report_images": 3}}))
    shards = prepare_shards(run.spec.data, "val", f"{run.shards}/val")
    write_coco_annotations(shards, run.ground_truth("val"))
    return run


def test_the_same_images_are_shown_of_every_validation_and_evaluation(run: Run) -> None:
    truth = storage.read_json(run.ground_truth("val"))
    rows: list[dict[str, Any]] = [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": 0.9}
        for one in truth["annotations"]
    ]
    ids = shown_ids([row["image_id"] for row in rows], run.spec)
    assert len(ids) == 3
    table = DetectionTable.of(rows)
    for rank in range(2):  # each rank has its own images
        keep_shown(run, 4, rank, ids, table.select(table.image_id % 2 == rank))
    assert {row["image_id"] for row in read_shown(run, 4)} == set(ids)
    storage.write_json(run.file("detections", "single.json"), rows)
    tracker, pictures = Tracker(), ResultPictures(run)
    pictures.log_validation(tracker, 40, 4)  # type: ignore[arg-type]
    pictures.log_evaluation(tracker, "single", 50)  # type: ignore[arg-type]
    pictures.close()
    names = [image["file_name"] for image in truth["images"] if image["id"] in ids]
    assert set(tracker.pictures) == {
        (f"{what}/{name}", step) for name in names for what, step in (("validation", 40), ("single", 50))
    }
    assert all(image.dtype == np.uint8 and image.shape[1] <= 640 for image in tracker.pictures.values())


def test_a_fault_of_the_pictures_costs_nothing_else(run: Run) -> None:
    tracker, pictures = Tracker(), ResultPictures(run)
    pictures.log_evaluation(tracker, "nowhere", 1)  # type: ignore[arg-type]
    pictures.close()
    assert not tracker.pictures


def test_statistics_of_a_data_set_count_its_annotations(run: Run) -> None:
    from refinedet.pipeline.data.index import open_shards

    truth = storage.read_json(run.ground_truth("val"))
    counted = read_statistics(open_shards(f"{run.shards}/val"))
    objects = [one for one in truth["annotations"] if not one["iscrowd"]]
    assert counted["objects"] == len(objects) == sum(entry["objects"] for entry in counted["classes"].values())
    assert counted["objects_not_learnt"] == len(truth["annotations"]) - len(objects)
    assert sum(counted[size] for size in ("small", "medium", "large")) == len(objects)


def test_the_step_of_weights_is_in_their_file(tmp_path: Path) -> None:
    for metadata, step in (({"step": "372"}, 372), (None, 0)):
        save_file({"one": torch.zeros(3)}, tmp_path / "w.safetensors", metadata)
        assert weights_step(str(tmp_path / "w.safetensors")) == step
