"""Files of `refinedet predict`, read back by what others read them with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from refinedet.pipeline.inference.choice import BoxStyle, Choice
from refinedet.pipeline.inference.detect import Found
from refinedet.pipeline.inference.outputs import Outputs
from refinedet.pipeline.inference.predict import Tally, predict_sources
from refinedet.pipeline.inference.sources import find_sources
from refinedet.pipeline.runs.errors import UserError

NAMES = ("cat", "dog/wolf", "tree")
SIZES = ((48, 64), (100, 40), (33, 77))
EVERY_FORMAT = tuple(name for name in Outputs.FORMATS if name != "window")


@dataclass
class KnownDetector:
    """In an image of H x W: a cat of score 0.9 in its left half, a dog/wolf of 0.4 over all, a tree of 0.1."""

    names = NAMES
    batch_size = 2
    exif: str = "stored"

    def predict(self, images):
        for image in images:
            height, width = image.shape[:2]
            boxes = [[0, 0, width, height], [0, 0, width / 2, height], [1.5, 2.5, 20.25, 30.75]]
            yield Found(
                torch.tensor(boxes), torch.tensor([0.4, 0.9, 0.1]), torch.tensor([2, 1, 3]), torch.zeros(3).long()
            )


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    directory = tmp_path / "photos"
    directory.mkdir()
    generator = np.random.default_rng(0)
    for number, size in enumerate(SIZES):
        cv2.imwrite(str(directory / f"{number}.png"), generator.integers(0, 256, (*size, 3), np.uint8))
    return directory


def predict(photos: Path, output: Path, exif: str = "stored", **choice):
    sources = find_sources([str(photos)], leave_out=str(output))
    faults: list[tuple[str, str]] = []
    tally = predict_sources(
        KnownDetector(exif),  # pyright: ignore[reportArgumentType]
        sources,
        Choice(output, **choice),
        on_fault=lambda *fault: faults.append(fault),
    )
    return tally, faults


def test_pycocotools_reads_the_dataset(photos: Path, tmp_path: Path) -> None:
    tally, _ = predict(photos, tmp_path / "out", formats=("coco",))
    assert (tally.images, tally.objects, tally.unreadable) == (3, 6, 0)
    data = COCO(str(tmp_path / "out" / "coco.json"))
    assert [category["name"] for category in data.loadCats(data.getCatIds())] == list(NAMES)
    for image, (height, width) in zip(data.loadImgs(data.getImgIds()), SIZES, strict=True):
        assert (image["height"], image["width"]) == (height, width)
        rows = data.loadAnns(data.getAnnIds(image["id"]))
        assert [(row["category_id"], round(row["score"], 4)) for row in rows] == [(1, 0.9), (2, 0.4), (3, 0.1)]
        np.testing.assert_allclose(rows[1]["bbox"], [0, 0, width, height])
        np.testing.assert_allclose(rows[2]["bbox"], [1.5, 2.5, 18.75, 28.25])


def test_lines_hold_everything_and_yolo_what_reaches_the_threshold(photos: Path, tmp_path: Path) -> None:
    predict(photos, tmp_path / "out", formats=("jsonl", "yolo"), threshold=0.3)
    lines = [json.loads(line) for line in (tmp_path / "out" / "detections.jsonl").read_text().splitlines()]
    assert [len(line["objects"]) for line in lines] == [3, 3, 3]
    assert lines[0]["objects"][0] == {"label": "cat", "score": 0.9, "box": [0.0, 0.0, 32.0, 48.0]}
    for number, (height, width) in enumerate(SIZES):
        rows = np.loadtxt(tmp_path / "out" / "labels" / f"{number}.txt")
        assert rows.shape == (2, 6)
        np.testing.assert_array_equal(rows[:, 0], [0, 1])
        centre, side = rows[:, 1:3] * (width, height), rows[:, 3:5] * (width, height)
        np.testing.assert_allclose((centre - side / 2)[1], [0, 0], atol=1e-3)
        np.testing.assert_allclose((centre + side / 2)[0], [width / 2, height], atol=1e-3)


def test_crops_are_the_pixels_of_the_boxes(photos: Path, tmp_path: Path) -> None:
    predict(photos, tmp_path / "out", formats=("crops",))
    crop = cv2.imread(str(tmp_path / "out" / "crops" / "dog_wolf" / "0-2.jpg"))
    assert crop is not None
    assert crop.shape == (48, 64, 3)
    assert not (tmp_path / "out" / "crops" / "tree").exists(), "0.1 is below the threshold"


def test_categories_are_chosen_by_name(photos: Path, tmp_path: Path) -> None:
    tally, _ = predict(photos, tmp_path / "out", formats=("jsonl",), categories=("tree",), threshold=0)
    assert tally.objects == 3
    with pytest.raises(UserError, match="no category 'trees'; it has cat, dog/wolf, tree"):
        predict(photos, tmp_path / "other", categories=("trees",))
    assert not (tmp_path / "other").exists()


def test_a_bad_image_is_passed_over_in_every_format(photos: Path, tmp_path: Path) -> None:
    (photos / "1.png").write_bytes(b"no image")
    tally, faults = predict(photos, tmp_path / "out", formats=EVERY_FORMAT)
    assert (tally.images, tally.unreadable) == (2, 1)
    assert [name for name, _ in faults] == [str(photos / "1.png")]
    assert {path.name for path in (tmp_path / "out").glob("*.jpg")} == {"0.jpg", "2.jpg"}
    assert len(COCO(str(tmp_path / "out" / "coco.json")).getImgIds()) == 2


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """21 white frames of 64 x 48, ten a second."""
    writer = cv2.VideoWriter(str(tmp_path / "clip.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10.0, (64, 48))
    for _ in range(21):
        writer.write(np.full((48, 64, 3), 255, np.uint8))
    writer.release()
    return tmp_path / "clip.mp4"


def test_a_video_becomes_a_video(clip: Path, tmp_path: Path) -> None:
    tally, _ = predict(clip, tmp_path / "out", formats=("pictures", "jsonl", "yolo"))
    assert tally.images == 21
    video = cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4"))
    assert video.get(cv2.CAP_PROP_FRAME_COUNT) == 21
    assert video.get(cv2.CAP_PROP_FPS) == 10
    complete, drawn = video.read()
    assert complete
    assert drawn.shape == (48, 64, 3)
    assert drawn.min() < 200, "boxes are drawn on the white frame"
    assert len(list((tmp_path / "out" / "labels").iterdir())) == 21


def test_the_frames_of_a_video_become_pictures(clip: Path, photos: Path, tmp_path: Path) -> None:
    sources = find_sources([str(clip), str(photos)], leave_out="/nowhere", every=10)
    choice = Choice(tmp_path / "out", formats=("frames",))
    assert predict_sources(KnownDetector(), sources, choice).images == 6  # pyright: ignore[reportArgumentType]
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    assert [str(path.relative_to(tmp_path / "out")) for path in files] == [
        f"frames/clip/{number:06d}.jpg" for number in (0, 10, 20)
    ]
    drawn = cv2.imread(str(files[1]))
    assert drawn is not None
    assert drawn.shape == (48, 64, 3)
    assert drawn.min() < 200, "boxes are drawn on the white frame"


def test_names_scores_and_lines_are_drawn_as_chosen(clip: Path, tmp_path: Path) -> None:
    def inked(name: str, **drawing) -> int:
        sources = find_sources([str(clip)], leave_out="/nowhere", every=100)
        choice = Choice(tmp_path / name, formats=("frames",), drawing=BoxStyle(**drawing))
        predict_sources(KnownDetector(), sources, choice)  # pyright: ignore[reportArgumentType]
        picture = cv2.imread(str(tmp_path / name / "frames" / "clip" / "000000.jpg"))
        assert picture is not None
        return int((picture.min(2) < 200).sum())

    whole, names, boxes, thin = (
        inked("whole"), inked("names", scores=False), inked("boxes", labels=False),
        inked("thin", labels=False, line_width=1),
    )  # fmt: skip
    assert whole > names > boxes > thin > 0


def test_what_was_detected_before_an_interrupt_is_in_whole_files(clip: Path, tmp_path: Path) -> None:
    def interrupt(tally: Tally) -> None:
        if tally.images == 6:
            raise KeyboardInterrupt

    sources = find_sources([str(clip)], leave_out="/nowhere")
    choice = Choice(tmp_path / "out", formats=EVERY_FORMAT)
    with pytest.raises(KeyboardInterrupt):
        predict_sources(KnownDetector(), sources, choice, on_progress=interrupt)  # pyright: ignore[reportArgumentType]
    assert cv2.VideoCapture(str(tmp_path / "out" / "clip.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 6
    assert len(list((tmp_path / "out" / "frames" / "clip").iterdir())) == 6
    assert len(COCO(str(tmp_path / "out" / "coco.json")).getImgIds()) == 6


def test_a_picture_never_replaces_a_source(photos: Path) -> None:
    cv2.imwrite(str(photos / "a.jpg"), np.zeros((9, 9, 3), np.uint8))
    before = (photos / "a.jpg").read_bytes()
    sources = find_sources([str(photos / "a.jpg")], leave_out="/nowhere")
    with pytest.raises(UserError, match="would be written over"):
        predict_sources(KnownDetector(), sources, Choice(photos))  # pyright: ignore[reportArgumentType]
    assert (photos / "a.jpg").read_bytes() == before


@pytest.mark.parametrize("exif", ["stored", "displayed"])
def test_a_turned_photo_is_seen_as_the_detector_was_trained(tmp_path: Path, exif: str) -> None:
    (tmp_path / "photos").mkdir()
    rotation = Image.Exif()
    rotation[0x0112] = 6  # by 90 degrees
    Image.new("RGB", (64, 48)).save(tmp_path / "photos" / "phone.jpg", exif=rotation)
    predict(tmp_path / "photos", tmp_path / "out", exif, formats=("jsonl",))
    line = json.loads((tmp_path / "out" / "detections.jsonl").read_text())
    size = [64, 48] if exif == "stored" else [48, 64]
    assert [line["width"], line["height"]] == size
    assert max(found["box"][2:] for found in line["objects"]) == size
