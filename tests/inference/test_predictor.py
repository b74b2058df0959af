"""The predictor: weights of a whole detector, images of any size, the same boxes whatever the batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from refinedet.model import RefineDet
from refinedet.model.hub import detector_metadata
from refinedet.pipeline.config.spec import JobSpec, Multiscale
from refinedet.pipeline.inference.exporting import export_weights
from refinedet.pipeline.inference.predictor import Predictor
from refinedet.pipeline.runs.errors import UserError
from safetensors.torch import save_file

SPEC = JobSpec.model_validate(
    {
        "name": "tiny",
        "data": {"format": "shapes", "train": [{"count": 4}]},
        "model": {"backbone": "resnet18", "input_size": 128, "num_classes": 2, "score_threshold": 0.0, "theta": 1.0},
    }
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    detector = RefineDet(SPEC.model, categories=("disc", "ring"))
    save_file(detector.state_dict(), directory / "weights.safetensors", detector_metadata(detector))
    return directory


def photos() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), np.uint8) for size in ((90, 160), (200, 64), (128, 128))]


def without(directory: Path, prefix: str) -> Path:
    """A run whose weights lack the tensors of a part."""
    detector = RefineDet(SPEC.model)
    state = {name: value for name, value in detector.state_dict().items() if not name.startswith(prefix)}
    save_file(state, directory / "weights.safetensors", detector_metadata(detector))
    return directory


def test_boxes_do_not_depend_on_the_batch_and_lie_in_their_images(run: Path) -> None:
    images = photos()
    together = list(Predictor.load(str(run), device="cpu", precision="fp32", batch_size=3).predict(images))
    apart = list(Predictor.load(str(run), device="cpu", precision="fp32", batch_size=1).predict(images))
    assert len(together) == len(apart) == 3
    for image, one, other in zip(images, together, apart, strict=True):
        assert len(one.scores)
        torch.testing.assert_close(one.scores, other.scores, atol=1e-5, rtol=0)
        height, width = image.shape[:2]
        assert (one.boxes >= 0).all()
        assert (one.boxes <= torch.tensor([width, height] * 2)).all()


def test_several_views_are_merged(run: Path) -> None:
    multiscale = Multiscale.model_validate({"passes": [{"size": 128}, {"size": 64, "flip": False}]})
    predictor = Predictor.load(str(run), device="cpu", precision="fp32", multiscale=multiscale)
    assert all(len(found.scores) for found in predictor.predict(photos()))


@pytest.mark.parametrize("part", ["backbone.", "adm.", "arm."])
def test_weights_that_leave_a_part_unset_are_refused(tmp_path: Path, part: str) -> None:
    with pytest.raises(UserError, match=rf'Missing key\(s\) in state_dict: "{part}'):
        Predictor.load(str(without(tmp_path, part)), device="cpu")


def test_weights_without_the_detectors_config_are_refused(tmp_path: Path) -> None:
    save_file(RefineDet(SPEC.model).state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="must carry the detector's config"):
        Predictor.load(str(tmp_path), device="cpu")


def test_the_file_names_the_categories(run: Path) -> None:
    assert Predictor.load(f"{run}/weights.safetensors", device="cpu").names == ("disc", "ring")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "onnx"])
def test_an_exported_graph_computes_what_the_detector_does(run: Path, tmp_path: Path, kind: Any) -> None:
    told = export_weights(str(run), tmp_path / "graph", kind)
    assert "images [B, 3, 128, 128] uint8 RGB -> boxes [B, 1020, 4], scores [B, 1020, 2]" in told
    assert (tmp_path / "graph").stat().st_size > 10e6


def test_an_export_that_cannot_be_is_refused_in_a_sentence(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be multiples of 64, received 100 and 128"):
        export_weights(str(run), tmp_path / "graph.onnx", "onnx", height=100)


def test_the_command_draws_the_images_of_a_directory_and_refuses_half_a_model(run: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for number, image in enumerate(photos()):
        cv2.imwrite(str(pictures / f"{number}.png"), image)
    half = tmp_path / "half"
    half.mkdir()
    without(half, "backbone.")
    command = [sys.executable, "-m", "refinedet.pipeline.cli", "predict"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    done = subprocess.run([*command, str(run), str(pictures), "--output", "seen"], **options)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {"0.jpg", "1.jpg", "2.jpg", "detections.jsonl"}
    assert len((tmp_path / "seen" / "detections.jsonl").read_text().splitlines()) == 3
    (pictures / "bad.png").write_bytes(b"no image")
    done = subprocess.run([*command, str(run), "-", "--output", "again"], input=f"{pictures}/bad.png\n", **options)
    assert done.returncode == 1
    assert "bad.png: not a JPEG, PNG or WebP image (8 bytes); passed over" in done.stdout
    assert done.stderr == "refinedet: 1 of 1 images could not be read.\n"
    done = subprocess.run([*command, str(half), str(pictures), "--output", "unseen"], **options)
    assert done.returncode == 2
    assert 'Missing key(s) in state_dict: "backbone.' in done.stderr
    assert not (tmp_path / "unseen").exists()


def test_limits_of_the_selection_can_be_set(run: Path) -> None:
    predictor = Predictor.load(str(run), device="cpu", precision="fp32")
    (whole,), (few,), (apart,) = (
        list(one.predict(photos()[:1]))
        for one in (predictor, predictor.selecting(max_detections=3), predictor.selecting(nms_iou=1.0))
    )
    assert predictor.selecting(nms_iou=None) is predictor
    assert len(few.scores) == 3 < len(whole.scores)
    assert torch.equal(few.scores.sort().values, whole.scores.sort().values[-3:])
    assert len(apart.scores) > len(whole.scores), "nothing is suppressed"


def test_boxes_of_all_classes_suppress_each_other_where_wanted(run: Path) -> None:
    predictor = Predictor.load(str(run), device="cpu", precision="fp32").selecting(nms_iou=0.3, max_detections=50)
    agnostic = predictor.selecting(nms_iou=0.3, class_agnostic=True, max_detections=50)
    by_class = list(predictor.predict(photos()))
    over_all = list(agnostic.predict(photos()))
    assert any(highest_overlap(found.boxes) > 0.3 for found in by_class), "of different classes"
    for one, other in zip(by_class, over_all, strict=True):
        assert highest_overlap(other.boxes) <= 0.3
        assert 0 < len(other.scores) <= 50
        assert other.scores.max() == one.scores.max()
    assert {1, 2} == {int(label) for found in over_all for label in found.labels}


def highest_overlap(boxes: torch.Tensor) -> float:
    low, high = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    shared = (high - low).clamp(min=0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return float((shared / (area[:, None] + area - shared)).fill_diagonal_(0).max())


@pytest.mark.filterwarnings("error")
def test_views_of_arrays_are_images_too(run: Path) -> None:
    predictor = Predictor.load(str(run), device="cpu", precision="fp32")
    image = photos()[0]
    turned = image[::-1, :, ::-1]
    turned.flags.writeable = False
    whole, view = predictor.predict([turned.copy(), turned])
    assert torch.equal(whole.boxes, view.boxes)
