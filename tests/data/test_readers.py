"""VOC and shapes as they come out of the shards; whole data sets, drawn and, where they are, of real photos."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from pycocotools.coco import COCO
from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.images import decode_image
from refinedet.pipeline.data.inspection import check_shards
from refinedet.pipeline.data.reading import EvaluationSamples, write_coco_annotations
from refinedet.pipeline.data.shapes import SHAPES, draw_shapes
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.runs.errors import UserError

from tests.data.shape_files import write_shapes
from tests.outside import outside

COCO_PHOTOS, VOC_PHOTOS = outside("data", "coco-mini"), outside("data", "voc-mini", "VOCdevkit")
SIDES = ("xmin", "ymin", "xmax", "ymax")
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
        # The mask fills its box: the outline or run lengths agree with the box.
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
    """A user who corrects annotations gets other shards, and must not be measured by the boxes of before."""
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


@pytest.fixture(params=[None, *COCO_PHOTOS], ids=lambda root: "photos" if root else "drawn")
def coco_root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A data set laid out as COCO 2017, with crowds and sparse ids."""
    if request.param is None:
        for part, count in (("train2017", 60), ("val2017", 25)):
            write_shapes(str(tmp_path / "coco"), count, seed=3, part=part, image_size=96)
    return request.param or tmp_path / "coco"


@pytest.mark.parametrize("part", ["train", "val"])
def test_coco_comes_back_as_it_went_in(coco_root: Path, tmp_path: Path, part: str) -> None:
    file = f"annotations/instances_{part}2017.json"
    split = Split(images=f"{part}2017", annotations=file)
    data = Data(format="coco", root=str(coco_root), train=(split,), val=(split,), shard_bytes=2**17)
    shards = prepare_shards(data, "train", str(tmp_path / "shards"))
    original = json.loads((coco_root / file).read_text())
    assert len(shards) > 1
    assert shards.num_samples == len(original["images"])
    assert [category.id for category in shards.categories] == sorted(entry["id"] for entry in original["categories"])
    write_coco_annotations(shards, str(tmp_path / "truth.json"))
    written = json.loads((tmp_path / "truth.json").read_text())
    names = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")
    assert sorted([entry[name] for name in names] for entry in written["annotations"]) == sorted(
        [entry[name] for name in names] for entry in original["annotations"]
    )
    sample = next(iter(EvaluationSamples(shards, [shards.num_samples - 1])))
    image, _ = decode_image((coco_root / f"{part}2017" / sample.file_name).read_bytes())
    assert image is not None
    np.testing.assert_array_equal(sample.image, image)
    assert not check_shards(str(tmp_path / "shards"), decode=False).faults


@pytest.fixture(params=[None, *VOC_PHOTOS], ids=lambda root: "photos" if root else "drawn")
def voc_data(request: pytest.FixtureRequest, voc_folder: Callable[[dict[str, list]], Data]) -> Data:
    if request.param is None:
        crowd = [("dog", number % 2, 1 + number, 2, 30 + number, 40) for number in range(9)]
        return voc_folder({"a": [("dog", 1, 5, 6, 20, 30), ("cat", 0, 1, 1, 64, 48)], "b": [], "c": crowd})
    return Data(
        format="voc", root=str(request.param), train=(Split(set="VOC2012/train"),), val=(Split(set="VOC2012/val"),)
    )


@pytest.mark.parametrize("part", ["train", "val"])
def test_voc_is_read_as_its_files_say(voc_data: Data, tmp_path: Path, part: str) -> None:
    shards = prepare_shards(voc_data, part, str(tmp_path / "shards"))
    report = check_shards(str(tmp_path / "shards"))
    year, _, name = getattr(voc_data, part)[0].set.partition("/")
    folder = Path(voc_data.root) / year
    listed = (folder / "ImageSets" / "Main" / f"{name}.txt").read_text().split()
    assert report.faults == ()
    assert report.num_samples == len(listed)
    difficult = 0
    for sample in EvaluationSamples(shards):
        entries = ElementTree.parse(folder / "Annotations" / f"{Path(sample.file_name).stem}.xml").findall("object")
        found = [[float(entry.findtext(f"bndbox/{side}", "")) for side in SIDES] for entry in entries]
        np.testing.assert_allclose(sample.boxes, np.reshape(found, (-1, 4)) - (1, 1, 0, 0))
        assert sample.difficult.tolist() == [entry.findtext("difficult") == "1" for entry in entries]
        difficult += int(sample.difficult.sum())
    assert difficult
