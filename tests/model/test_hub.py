"""A detector written and read back, and what is refused instead of loaded."""

from __future__ import annotations

import json

import pytest
import torch
from refinedet.model import RefineDet
from safetensors import safe_open
from safetensors.torch import save_file

from tests.model.cases import random_images

NAMES = ("cat", "dog", "bird")


def make(build, **options):
    torch.manual_seed(0)
    return RefineDet(build(theta=0.6, arm_iou=(0.3, 0.7), **options).config, NAMES).eval()


def test_a_detector_comes_back_whole(build, tmp_path):
    detector = make(build)
    path = detector.save_pretrained(tmp_path / "new" / "detector")
    images = random_images(torch.Generator().manual_seed(0), 2)
    for source in (path, str(path), path.parent, f"file://{path}", f"file://{path.parent}"):
        loaded = RefineDet.from_pretrained(source)
        assert loaded.config == detector.config
        assert loaded.categories == NAMES
        assert not loaded.training
        for ours, theirs in zip(loaded.detect(images), detector.detect(images), strict=True):
            assert torch.equal(ours.boxes, theirs.boxes)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["categories"]) == list(NAMES)
    assert json.loads(metadata["config"])["input_size"] == 64
    assert json.loads(metadata["preprocessing"])["resize"] == [64, 64]
    assert json.loads(metadata["preprocessing"])["exif"] == loaded.exif == "stored"


def test_files_that_are_no_whole_detector_are_refused(build, tmp_path):
    detector = make(build)
    path = detector.save_pretrained(tmp_path / "whole")
    with safe_open(path, "pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    broken = dict(state)
    broken["adm.cls.0.bias"] = torch.full_like(broken["adm.cls.0.bias"], float("nan"))
    few = {name: value for name, value in state.items() if not name.startswith("arm.")}
    for tensors, facts, message in (
        (broken, metadata, "received NaN or infinity in 'adm.cls.0.bias'"),
        (few, metadata, "(?s)must fit the detector of their config, .*arm.cls.0.weight"),
        (state, None, "must carry the detector's config"),
    ):
        save_file(tensors, tmp_path / "bad.safetensors", facts)
        with pytest.raises(ValueError, match=message):
            RefineDet.from_pretrained(tmp_path / "bad.safetensors")
    (tmp_path / "text.safetensors").write_text("no weights")
    (tmp_path / "empty").mkdir()
    for source, message in (
        (tmp_path / "text.safetensors", "must be a safetensors file"),
        (tmp_path / "empty", "must hold model.safetensors"),
        (tmp_path / "absent.safetensors", "must be a file, a directory, a URI or the hub's owner/name"),
        (f"file://{tmp_path}/absent.safetensors", "must exist"),
    ):
        with pytest.raises(ValueError, match=message):
            RefineDet.from_pretrained(source)
    with pytest.raises(ValueError, match="categories must name 3 classes, received 1 names"):
        RefineDet(detector.config, ["cat"])


def test_predict_gives_boxes_in_the_images_own_pixels(build):
    detector = make(build)
    whole = random_images(torch.Generator().manual_seed(0), 1)[0]
    wide = torch.nn.functional.interpolate(whole[None].float(), (64, 192), mode="nearest")[0]
    (ours, stretched) = detector.predict([whole, wide])
    (plain,) = detector.detect(whole[None])
    assert torch.equal(ours.scores, plain.scores)
    assert torch.allclose(ours.boxes, plain.boxes.clamp(0, 64), atol=1e-4)
    assert stretched.boxes[:, 0::2].max() > 64
    assert (stretched.boxes >= 0).all()
    assert (stretched.boxes[:, 0::2] <= 192).all()
    assert (stretched.boxes[:, 1::2] <= 64).all()
    assert detector.predict([]) == []
    with pytest.raises(ValueError, match=r"image 1 must be \[3, H, W\], RGB, received \[64, 64, 3\]"):
        detector.predict([whole, whole.permute(1, 2, 0)])
    with pytest.raises(RuntimeError, match="training mode"):
        detector.train().predict([whole])
