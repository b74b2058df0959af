"""The predictor: weights of a whole detector, images of any size, the same boxes whatever the batch."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from refinedet.model import RefineDet
from refinedet.pipeline.config.files import dump_spec
from refinedet.pipeline.config.spec import JobSpec, Multiscale
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
    save_file(RefineDet(SPEC.model).state_dict(), directory / "weights.safetensors")
    (directory / "spec.yaml").write_text(dump_spec(SPEC))
    return directory


def photos() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 256, (*size, 3), np.uint8) for size in ((90, 160), (200, 64), (128, 128))]


def without(run: Path, directory: Path, prefix: str) -> Path:
    """A copy of the run whose weights lack the tensors of a part."""
    state = {name: value for name, value in RefineDet(SPEC.model).state_dict().items() if not name.startswith(prefix)}
    save_file(state, directory / "weights.safetensors")
    (directory / "spec.yaml").write_bytes((run / "spec.yaml").read_bytes())
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
def test_weights_that_leave_a_part_unset_are_refused(run: Path, tmp_path: Path, part: str) -> None:
    with pytest.raises(UserError, match=rf"of its tensors are not there in that shape, such as {part}"):
        Predictor.load(str(without(run, tmp_path, part)), device="cpu")


def test_weights_of_other_classes_are_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes((run / "weights.safetensors").read_bytes())
    other = SPEC.model_copy(update={"model": dataclasses.replace(SPEC.model, num_classes=5)})
    (tmp_path / "spec.yaml").write_text(dump_spec(other))
    with pytest.raises(UserError, match="5 classes"):
        Predictor.load(str(tmp_path), device="cpu")


def test_the_command_draws_the_images_of_a_directory_and_refuses_half_a_model(run: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "photos"
    pictures.mkdir()
    for number, image in enumerate(photos()):
        cv2.imwrite(str(pictures / f"{number}.png"), image)
    half = tmp_path / "half"
    half.mkdir()
    without(run, half, "backbone.")
    command = [sys.executable, "-m", "refinedet.pipeline.cli", "predict"]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
    done = subprocess.run([*command, str(run), str(pictures), "--output", "seen"], **options)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "seen").iterdir()} == {"0.png", "1.png", "2.png", "detections.json"}
    assert len(json.loads((tmp_path / "seen" / "detections.json").read_text())) == 3
    done = subprocess.run([*command, str(half), str(pictures), "--output", "unseen"], **options)
    assert done.returncode == 2
    assert "of its tensors are not there in that shape, such as backbone." in done.stderr
    assert not (tmp_path / "unseen").exists()
