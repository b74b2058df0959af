"""`refinedet init`: every format is recognised, and the job that is written reads the data set."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from refinedet.pipeline.cli.main import app
from refinedet.pipeline.config.spec import Split
from refinedet.pipeline.config.spec_checks import check_spec
from refinedet.pipeline.config.spec_files import load_spec, parse_spec
from refinedet.pipeline.data.recognition import recognise
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.planning.initial_job import Hardware, propose_job
from refinedet.pipeline.runs.errors import UserError
from typer.testing import CliRunner

from tests.data import test_formats as formats

CPU, GPUS = Hardware(0, 2), Hardware(8, 64)


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    return {name: cv2.imencode(f".{name.split('.')[1]}", picture)[1].tobytes() for name in formats.TRUTH}


@pytest.mark.parametrize("write", formats.WRITERS)
def test_the_job_of_every_format_reads_its_data(
    tmp_path: Path, images: dict[str, bytes], write: Callable[[Path, dict[str, bytes]], tuple[str, Split]]
) -> None:
    name, _ = write(tmp_path / "set", images)
    job = propose_job(recognise(str(tmp_path / "set")), CPU)
    spec = parse_spec(yaml.safe_load(job.text), source="init")
    check_spec(spec)
    assert spec.data.format == name
    assert spec.data.classes == ("fox", "owl")
    assert spec.model.num_classes == 2
    assert spec.training.global_batch == 3
    shards = prepare_shards(spec.data, "train", str(tmp_path / "shards"))
    assert shards.num_samples == 3
    assert [category.name for category in shards.categories] == ["fox", "owl"]


def test_splits_are_told_by_their_names(tmp_path: Path, images: dict[str, bytes]) -> None:
    for part in ("train", "valid", "test"):
        formats.write_images(tmp_path / "set" / part, images)
        (tmp_path / "set" / part / "_annotations.coco.json").write_text(formats.coco_of(names=True))
    found = recognise(str(tmp_path / "set"))
    assert [split.images for split in found.train] == ["train"]
    assert [split.images for split in found.val] == ["valid"]


def test_lists_of_voc_years_are_told_apart(tmp_path: Path, images: dict[str, bytes]) -> None:
    for year in ("VOC2007", "VOC2012"):
        formats.write_voc(tmp_path / "VOCdevkit" / year, images)
        lists = tmp_path / "VOCdevkit" / year / "ImageSets" / "Main"
        for name in ("train", "val", "trainval", "fox_train"):
            shutil.copy(lists / "all.txt", lists / f"{name}.txt")
        (lists / "all.txt").unlink()
    for root in (tmp_path, tmp_path / "VOCdevkit"):
        assert recognise(str(root)).root == str(tmp_path / "VOCdevkit")
    found = recognise(str(tmp_path))
    assert [split.set for split in found.train] == ["VOC2007/train", "VOC2012/train"]
    assert [split.set for split in found.val] == ["VOC2007/val", "VOC2012/val"]


def test_the_schedule_is_for_the_number_of_images(tmp_path: Path, images: dict[str, bytes]) -> None:
    formats.write_coco(tmp_path / "set", images)
    for hardware, workers in ((CPU, 2), (GPUS, 8)):
        spec = parse_spec(yaml.safe_load(propose_job(recognise(str(tmp_path / "set")), hardware).text), source="init")
        assert spec.cluster.max_workers == workers
        assert spec.training.decay_epochs[-1] < spec.training.epochs
        assert spec.training.warmup_epochs <= spec.training.epochs / 10


def test_init_writes_a_file_once(tmp_path: Path, images: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    formats.write_yolo(tmp_path / "my photos", images)
    done = CliRunner().invoke(app, ["init", "my photos"], catch_exceptions=False)
    assert "yolo: 3 images to train on with 3 objects of 2 classes" in done.output
    assert load_spec("my-photos.yaml").name == "my-photos"
    with pytest.raises(UserError, match=r"my-photos\.yaml exists"):
        CliRunner().invoke(app, ["init", "my photos"], catch_exceptions=False)


def test_a_tenth_is_held_out_where_there_is_no_validation_split(tmp_path: Path, images: dict[str, bytes]) -> None:
    for number in range(10):
        formats.write_labelme(tmp_path / "set" / f"{number}", images)
    job = propose_job(recognise(str(tmp_path / "set")), CPU)
    assert "to validate on (no validation split was found: every tenth image is held out)" in job.summary
    spec = parse_spec(yaml.safe_load(job.text), source="init")
    counts = [prepare_shards(spec.data, part, str(tmp_path / part)).num_samples for part in ("train", "val")]
    assert sum(counts) == 30
    assert 1 <= counts[1] <= 8  # ten directories, each divided by itself


def test_labels_without_names_of_classes_are_said(tmp_path: Path, images: dict[str, bytes]) -> None:
    formats.write_yolo_flat(tmp_path / "set", images)
    (tmp_path / "set" / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"has YOLO labels \(a\.txt\).*: write .*classes\.txt with the name of"):
        recognise(str(tmp_path / "set"))


def test_what_is_no_data_set_is_said(tmp_path: Path, images: dict[str, bytes]) -> None:
    formats.write_images(tmp_path / "photos", images)
    with pytest.raises(UserError, match="has 3 image files and is no data set of a known format"):
        recognise(str(tmp_path / "photos"))
    with pytest.raises(UserError, match="is no directory"):
        recognise(str(tmp_path / "nowhere"))
