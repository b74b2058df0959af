"""Data that contradicts its description: refused, or counted and logged, never silent."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data import lock as lock_module
from refinedet.pipeline.data.index import ShardSet, open_shards
from refinedet.pipeline.data.inspection import check_shards
from refinedet.pipeline.data.lock import writer_lock
from refinedet.pipeline.data.reading import EvaluationSamples
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.runs.errors import JobError, UserError

from tests.data.streams import PLAIN, open_stream

Write = Callable[..., Data]
XML = (
    "<annotation><size><width>64</width><height>48</height></size><object><name>{}</name>"
    "<bndbox><xmin>5</xmin><ymin>5</ymin><xmax>30</xmax><ymax>30</ymax></bndbox></object></annotation>"
)


def write_voc(
    root: Path, jpeg: Callable[..., bytes], names: list[str], folder: str = "Annotations", **more: Any
) -> Data:
    for name in ("JPEGImages", folder, "ImageSets/Main"):
        (root / "VOC2012" / name).mkdir(parents=True)
    for number, name in enumerate(names):
        (root / "VOC2012/JPEGImages" / f"{number}.jpg").write_bytes(jpeg(48, 64))
        (root / "VOC2012" / folder / f"{number}.xml").write_text(XML.format(name))
    (root / "VOC2012/ImageSets/Main/train.txt").write_text("\n".join(map(str, range(len(names)))))
    split = Split(set="VOC2012/train")
    return Data(format="voc", root=str(root), train=(split,), val=(split,), **more)


def names_of(shards: ShardSet) -> list[str]:
    return [category.name for category in shards.categories]


def test_directories_are_found_whatever_their_case(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    data = write_voc(tmp_path, jpeg, ["Raccoon"] * 3, folder="annotations")
    shards = prepare_shards(data, "train", str(tmp_path / "shards"))
    assert names_of(shards) == ["Raccoon"]
    assert sum(len(sample.boxes) for sample in EvaluationSamples(shards)) == 3


def test_a_training_split_without_an_object_is_refused(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    data = write_voc(tmp_path, jpeg, ["Raccoon"] * 3, folder="xml")
    with pytest.raises(UserError, match=r"data\.train has 3 images and not one object to learn from"):
        prepare_shards(data, "train", str(tmp_path / "shards"))
    assert not (tmp_path / "shards" / "index.json").exists()


def test_one_class_of_voc_stays_one_class(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    assert names_of(prepare_shards(write_voc(tmp_path, jpeg, ["dog"]), "train", str(tmp_path / "shards"))) == ["dog"]


def test_white_space_makes_no_second_class(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    data = write_voc(tmp_path, jpeg, ["Raccoon ", "Raccoon", " Raccoon\n"])
    assert names_of(prepare_shards(data, "train", str(tmp_path / "shards"))) == ["Raccoon"]


def test_classes_that_differ_in_case_are_refused_until_one_is_named(
    tmp_path: Path, jpeg: Callable[..., bytes], caplog: pytest.LogCaptureFixture
) -> None:
    data = write_voc(tmp_path, jpeg, ["Raccoon", "raccoon"])
    with pytest.raises(UserError, match="'Raccoon' and 'raccoon', which differ in upper and lower case"):
        prepare_shards(data, "train", str(tmp_path / "shards"))
    named = data.model_copy(update={"classes": ("raccoon",)})
    shards = prepare_shards(named, "train", str(tmp_path / "shards"))
    assert sum(len(sample.boxes) for sample in EvaluationSamples(shards)) == 2
    assert "class 'Raccoon' is taken as 'raccoon'" in caplog.text


def test_classes_select_and_order(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    data = write_voc(tmp_path, jpeg, ["cat", "dog", "fox", "dog"], classes=("fox", "cat"))
    with pytest.raises(UserError, match=r"2 objects of classes that data.classes does not list: 'dog' \(2\)"):
        prepare_shards(data, "train", str(tmp_path / "shards"))
    dropping = data.model_copy(update={"other_classes": "drop"})
    shards = prepare_shards(dropping, "train", str(tmp_path / "shards"))
    assert names_of(shards) == ["fox", "cat"]
    assert [sample.labels.tolist() for sample in EvaluationSamples(shards)] == [[2], [], [1], []]
    assert shards.facts["dropped"] == {"dog": 2}


@pytest.mark.parametrize(("classes", "ids"), [(("train", "brush"), [7, 90]), (("brush", "train"), [1, 2])])
def test_own_ids_stay_unless_the_order_changes(
    coco_folder: Write, tmp_path: Path, classes: tuple[str, ...], ids: list[int]
) -> None:
    shards = prepare_shards(coco_folder(3, classes=classes), "train", str(tmp_path / "shards"))
    assert [(category.id, category.name) for category in shards.categories] == list(zip(ids, classes, strict=True))
    assert all(shards.categories[label - 1].name == "train" for s in EvaluationSamples(shards) for label in s.labels)


def test_a_box_that_vanishes_in_single_precision_is_named(coco_folder: Write, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["annotations"][1]["bbox"] = [33.3, 6, 1e-7, 10]

    shards = prepare_shards(coco_folder(3, edit), "train", str(tmp_path / "shards"))
    faults = json.loads((tmp_path / "shards" / "index.json").read_text())["faults"]
    assert ["in single precision" in fault["reason"] for fault in faults] == [True]
    assert [len(sample.boxes) for sample in EvaluationSamples(shards)] == [1, 0, 1]
    assert check_shards(shards.url).faults


@pytest.mark.parametrize("damage", ["flipped", "halved"])
def test_damaged_photos_are_left_out_of_shards(
    coco_folder: Write, tmp_path: Path, jpeg: Callable[..., bytes], damage: str
) -> None:
    data = coco_folder(4)
    content = bytearray(jpeg(48, 64))
    scan = content.index(b"\xff\xda") + 20
    if damage == "flipped":
        for at in np.random.default_rng(0).choice(range(scan, len(content) - 2), 40, replace=False):
            content[at] ^= 1 << int(at) % 8
    else:
        content[len(content) // 2 :] = b"\xff\xd9"
    (tmp_path / "images" / "2.jpg").write_bytes(content)
    shards = prepare_shards(data, "train", str(tmp_path / "shards"))
    assert [sample.image_id for sample in EvaluationSamples(shards)] == [1, 3, 4]
    strict = data.model_copy(update={"max_bad_samples": 0})
    with pytest.raises(UserError, match=r"more than 0 faults.*does not finish the image"):
        prepare_shards(strict, "train", str(tmp_path / "other"))


def test_a_damaged_photo_in_shards_of_others_is_grey_in_the_stream(
    coco_folder: Write, tmp_path: Path, jpeg: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = coco_folder(4)
    content = jpeg(48, 64)
    (tmp_path / "images" / "2.jpg").write_bytes(content[: len(content) // 2] + b"\xff\xd9")
    tolerant = np.zeros((48, 64, 3), np.uint8)
    monkeypatch.setattr("refinedet.pipeline.data.shard_file.decode_image", lambda _: (tolerant, None))
    shards = prepare_shards(data, "train", str(tmp_path / "shards"))
    monkeypatch.undo()
    stream = open_stream(shards, input_size=32, augmentation=PLAIN, seed=0, global_batch=4, epochs=1)
    faults = [fault for batch in stream for fault in batch.faults]
    assert ["does not finish the image" in fault.reason for fault in faults] == [True]
    assert len(check_shards(shards.url).faults) == 1


def photo(path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (64, 48)).save(path, exif=exif)


def test_turned_photos_are_counted_and_said(
    coco_folder: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = coco_folder(3)
    photo(tmp_path / "images" / "2.jpg", 3)
    shards = prepare_shards(data, "train", str(tmp_path / "shards"))
    assert shards.facts["exif_turned"] == 1
    assert "1 images carry an EXIF rotation, the first: 2.jpg; boxes are taken to follow the stored" in caplog.text


def test_boxes_may_follow_the_displayed_picture(coco_folder: Write, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["images"][1].update(width=48, height=64)
        content["annotations"][1].update(bbox=[0, 50, 40, 14])

    data = coco_folder(2, edit)
    photo(tmp_path / "images" / "2.jpg", 6)
    shards = prepare_shards(data, "train", str(tmp_path / "stored"))
    faults = json.loads((tmp_path / "stored" / "index.json").read_text())["faults"]
    assert any("which is the displayed picture" in fault["reason"] for fault in faults)
    displayed = data.model_copy(update={"exif": "displayed"})
    shards = prepare_shards(displayed, "train", str(tmp_path / "displayed"))
    second = list(EvaluationSamples(shards))[1]
    assert second.image.shape == (64, 48, 3)
    assert second.boxes.tolist() == [[0, 50, 40, 64]]


def test_large_photos_are_scaled_down_with_their_boxes(coco_folder: Write, tmp_path: Path) -> None:
    shards = prepare_shards(coco_folder(2, max_side=32), "train", str(tmp_path / "shards"))
    sample = next(iter(EvaluationSamples(shards)))
    assert sample.image.shape == (24, 32, 3)
    assert sample.boxes.tolist() == [[2, 3, 12, 8]]


def test_two_jobs_of_other_settings_do_not_destroy_each_other(coco_folder: Write, tmp_path: Path) -> None:
    data = coco_folder(6)
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def write(shard_bytes: int) -> None:
        try:
            prepare_shards(data.model_copy(update={"shard_bytes": shard_bytes}), "train", str(tmp_path / "both"))
            results.put("written")
        except UserError:
            results.put("refused")

    jobs = [context.Process(target=write, args=(size,)) for size in (3000, 6000)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert sorted(results.get(timeout=5) for _ in jobs) == ["refused", "written"]
    assert check_shards(str(tmp_path / "both")).faults == ()


def test_a_killed_writer_leaves_nothing_behind(coco_folder: Write, tmp_path: Path) -> None:
    data, folder = coco_folder(3), tmp_path / "shards"
    context = multiprocessing.get_context("fork")
    held = context.Event()

    def hold() -> None:
        with writer_lock(str(folder)):
            (folder / "shard-000000.tar.0123abcd.partial").write_bytes(b"half")
            held.set()
            time.sleep(600)

    writer = context.Process(target=hold)
    writer.start()
    assert held.wait(30)
    os.kill(writer.pid or 0, signal.SIGKILL)
    writer.join()
    prepare_shards(data, "train", str(folder))
    assert check_shards(str(folder)).faults == ()
    assert not list(folder.glob("*.partial"))
    assert not (folder / "writer.lock").exists()


def test_a_writer_that_waits_outlives_the_removal_of_partial_files(tmp_path: Path) -> None:
    """The holder removes every partial file, also the one that a waiting writer is about to make the lock of."""
    ended = threading.Event()

    def tidy() -> None:
        while not ended.is_set():
            for path in tmp_path.glob("*.partial"):
                path.unlink(missing_ok=True)

    tidying = threading.Thread(target=tidy)
    tidying.start()
    try:
        for _ in range(200):
            with writer_lock(str(tmp_path)) as lock:
                lock.check()
    finally:
        ended.set()
        tidying.join()


def test_a_lock_expires_and_its_late_owner_notices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lock_module, "EXPIRY_S", 3600.0)
    with writer_lock(str(tmp_path)) as first:
        path = tmp_path / "writer.lock"
        path.write_text(json.dumps({"owner": "elsewhere/1/x", "expires": time.time() - 1}))
        with writer_lock(str(tmp_path)):
            assert "of elsewhere/1/x has expired" in caplog.text
            with pytest.raises(JobError, match="was lost to another writer"):
                first.check()


def test_a_destination_that_cannot_be_written_is_one_sentence(
    coco_folder: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    monkeypatch.setattr("refinedet.pipeline.runs.storage.make_folder", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): .*data\.shards"):
        prepare_shards(coco_folder(3), "train", str(tmp_path / "shards"))


def test_a_root_that_does_not_exist_is_one_sentence(coco_folder: Write, tmp_path: Path) -> None:
    data = coco_folder(3).model_copy(update={"root": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"nowhere.* does not exist"):
        prepare_shards(data, "train", str(tmp_path / "shards"))


def test_many_splits_keep_their_sizes(coco_folder: Write, tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    voc = write_voc(tmp_path / "voc", jpeg, ["Train", "comb"])
    other = Split(format="voc", root=voc.root, set="VOC2012/train", weight=3)
    data = coco_folder(4)
    data = data.model_copy(update={"train": (*data.train, other), "classes": ("train", "comb", "brush")})
    (tmp_path / "images" / "2.jpg").write_bytes(b"")
    shards = prepare_shards(data, "train", str(tmp_path / "shards"))
    assert shards.split_sizes == (3, 2)
    assert [sample.labels.tolist() for sample in EvaluationSamples(shards)] == [[1], [1], [1], [1], [2]]
    assert open_shards(shards.url).split_sizes == (3, 2)


@pytest.fixture(autouse=True)
def _log_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
