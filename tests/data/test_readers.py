"""VOC and shapes as they come out of the shards; COCO's and VOC's real photos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.images import decode_image
from refinedet.pipeline.data.inspection import check_shards
from refinedet.pipeline.data.reading import EvaluationSamples, write_coco_annotations
from refinedet.pipeline.data.shapes import SHAPES, draw_shapes, write_shapes
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.runs.errors import UserError

OBJECT = (
    "<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox><part><bndbox><xmin>1</xmin></bndbox></part></object>"
)


@pytest.fixture
def voc_folder(tmp_path: Path, jpeg: Callable[..., bytes]) -> Callable[[dict[str, list]], Data]:
    """Write a VOC data set from objects by image: `voc_folder({"a": [("dog", 0, 1, 1, 64, 48)]})`."""

    def write(objects: dict[str, list]) -> Data:
        year = tmp_path / "VOC2007"
        for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (year / folder).mkdir(parents=True)
        for name, found in objects.items():
            (year / "JPEGImages" / f"{name}.jpg").write_bytes(jpeg(48, 64))
            body = "".join(OBJECT.format(*values) for values in found)
            size = "<size><width>64</width><height>48</height></size>"
            (year / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{body}</annotation>")
        (year / "ImageSets/Main/train.txt").write_text("\n".join(objects))
        (year / "ImageSets/Main/val.txt").write_text(next(iter(objects)))
        train, val = Split(set="VOC2007/train"), Split(set="VOC2007/val")
        return Data(format="voc", root=str(tmp_path), train=(train,), val=(val,))

    return write


def test_voc_boxes_are_continuous_and_difficult_ones_marked(
    voc_folder: Callable[[dict[str, list]], Data], tmp_path: Path
) -> None:
    data = voc_folder({"b": [("dog", 0, 1, 1, 64, 48), ("cat", 1, 11, 21, 30, 40)], "a": []})
    shards = prepare_shards(data, "train", str(tmp_path / "shards"))
    assert [category.name for category in shards.categories] == ["cat", "dog"]
    first, second = EvaluationSamples(shards)
    assert first.boxes.tolist() == [[0, 0, 64, 48], [10, 20, 30, 40]]
    assert first.labels.tolist() == [2, 1]
    assert first.difficult.tolist() == [False, True]
    assert (first.image_id, first.file_name, second.image_id) == (1, "b.jpg", 2)
    assert len(second.boxes) == 0


def test_voc_with_own_classes_numbers_them_alike_in_both_parts(
    voc_folder: Callable[[dict[str, list]], Data], tmp_path: Path
) -> None:
    data = voc_folder({"a": [("weed", 0, 1, 1, 9, 9)], "b": [("beet", 0, 1, 1, 9, 9)]})
    for part in ("train", "val"):
        shards = prepare_shards(data, part, str(tmp_path / part))
        assert [category.name for category in shards.categories] == ["beet", "weed"]


def test_a_voc_list_that_is_missing_is_said(voc_folder: Callable[[dict[str, list]], Data], tmp_path: Path) -> None:
    data = voc_folder({"a": []})
    other = data.model_copy(update={"train": (Split(set="VOC2012/trainval"),)})
    with pytest.raises(UserError, match=r"VOC2012/ImageSets/Main/trainval\.txt does not exist"):
        prepare_shards(other, "train", str(tmp_path / "shards"))


def test_shapes_are_the_same_for_the_same_seed_and_differ_between_parts() -> None:
    first, again = draw_shapes(1, "train", 5, 96), draw_shapes(1, "train", 5, 96)
    np.testing.assert_array_equal(first.image, again.image)
    assert first.annotations == again.annotations
    assert first.annotations != draw_shapes(1, "val", 5, 96).annotations
    assert first.annotations != draw_shapes(2, "train", 5, 96).annotations


def test_shapes_are_a_coco_data_set(tmp_path: Path) -> None:
    write_shapes(str(tmp_path), 60, seed=3, image_size=96)
    coco = COCO(str(tmp_path / "annotations" / "instances_train.json"))
    assert sorted(coco.cats) == sorted(SHAPES)
    assert len(SHAPES) >= 8
    crowds = [annotation for annotation in coco.anns.values() if annotation["iscrowd"]]
    assert crowds
    for annotation in coco.anns.values():
        image = coco.imgs[annotation["image_id"]]
        x, y, w, h = annotation["bbox"]
        assert w > 0
        assert h > 0
        assert x >= -0.01
        assert y >= -0.01
        assert x + w <= image["width"] + 0.01
        assert y + h <= image["height"] + 0.01
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        # The mask fills its box: the outline or run lengths say the same as the box.
        assert abs(columns.min() - x) <= 2
        assert abs(columns.max() + 1 - x - w) <= 2
        assert abs(rows.min() - y) <= 2
        assert abs(rows.max() + 1 - y - h) <= 2
        assert 0 < annotation["area"] <= (w + 1) * (h + 1)

    data = Data(format="shapes", seed=3, image_size=96, train=(Split(count=60),))
    drawn = prepare_shards(data, "train", str(tmp_path / "drawn"))
    written = data.model_copy(
        update={
            "format": "coco",
            "root": str(tmp_path),
            "train": (Split(images="train", annotations="annotations/instances_train.json"),),
        }
    )
    read = prepare_shards(written, "train", str(tmp_path / "read"))
    for a, b in zip(EvaluationSamples(drawn), EvaluationSamples(read), strict=True):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.labels, b.labels)


def test_ground_truth_is_written_again_for_other_shards(coco_folder: Callable[..., Data], tmp_path: Path) -> None:
    """A user who mends annotations gets other shards, and must not be measured by the boxes of before."""
    path, data = tmp_path / "truth.json", coco_folder(4)
    write_coco_annotations(prepare_shards(data, "train", str(tmp_path / "first")), str(path))
    written = path.stat().st_mtime_ns
    write_coco_annotations(prepare_shards(data, "train", str(tmp_path / "first")), str(path))
    assert path.stat().st_mtime_ns == written
    annotations = tmp_path / "instances.json"
    mended = json.loads(annotations.read_text())
    mended["annotations"][0]["bbox"] = [1, 1, 20, 20]
    annotations.write_text(json.dumps(mended))
    write_coco_annotations(prepare_shards(data, "train", str(tmp_path / "second")), str(path))
    assert json.loads(path.read_text())["annotations"][0]["bbox"] == [1, 1, 20, 20]


@pytest.mark.parametrize("part", ["train", "val"])
def test_coco_photos_come_back_as_they_went_in(shared_dir: Path, tmp_path: Path, part: str) -> None:
    root = shared_dir / "data" / "coco-mini"
    file = f"annotations/instances_{part}2017.json"
    split = Split(images=f"{part}2017", annotations=file)
    data = Data(format="coco", root=str(root), train=(split,), val=(split,), shard_bytes=4 * 2**20)
    shards = prepare_shards(data, "train", str(tmp_path / "shards"))
    original = json.loads((root / file).read_text())
    assert shards.num_samples == len(original["images"])
    assert [category.id for category in shards.categories] == sorted(entry["id"] for entry in original["categories"])
    write_coco_annotations(shards, str(tmp_path / "truth.json"))
    written = json.loads((tmp_path / "truth.json").read_text())
    names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    assert sorted([entry[name] for name in names] for entry in written["annotations"]) == sorted(
        [entry[name] for name in names] for entry in original["annotations"]
    )
    sample = next(iter(EvaluationSamples(shards, [shards.num_samples - 1])))
    image, _ = decode_image((root / f"{part}2017" / sample.file_name).read_bytes())
    assert image is not None
    np.testing.assert_array_equal(sample.image, image)
    assert not check_shards(str(tmp_path / "shards"), decode=False).faults


def test_voc_photos_are_read(shared_dir: Path, tmp_path: Path) -> None:
    splits = {part: (Split(set=f"VOC2012/{part}"),) for part in ("train", "val")}
    data = Data(format="voc", root=str(shared_dir / "data" / "voc-mini" / "VOCdevkit"), **splits)  # type: ignore[arg-type]
    shards = prepare_shards(data, "val", str(tmp_path / "shards"))
    report = check_shards(str(tmp_path / "shards"))
    assert report.faults == ()
    assert report.num_samples == 50
    assert any(sample.difficult.any() for sample in EvaluationSamples(shards))
