"""Every format of data sets gives the same images and objects for the same truth."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.inspection import check_shards
from refinedet.pipeline.data.reading import EvaluationSamples
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.runs.errors import UserError

TRUTH: dict[str, list[tuple[str, tuple[float, float, float, float]]]] = {
    "a.jpg": [("fox", (4, 6, 20, 10)), ("owl", (16, 12, 32, 24))],
    "b.png": [],
    "c.webp": [("owl", (0, 0, 64, 48))],
}
SIZE = (64, 48)


@pytest.fixture(scope="module")
def images() -> dict[str, bytes]:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    picture = cv2.resize(coarse, SIZE, interpolation=cv2.INTER_CUBIC)
    return {name: cv2.imencode(f".{name.split('.')[1]}", picture)[1].tobytes() for name in TRUTH}


def write_images(directory: Path, images: dict[str, bytes]) -> None:
    directory.mkdir(parents=True)
    for name, content in images.items():
        (directory / name).write_bytes(content)


def coco_of(names: bool) -> str:
    listed, annotations = [], []
    for number, (name, objects) in enumerate(TRUTH.items(), start=1):
        where = {"file_name": name} if names else {"coco_url": f"http://images.cocodataset.org/images/{name}"}
        listed.append({"id": number, "width": SIZE[0], "height": SIZE[1], **where})
        for label, box in objects:
            category = {"fox": 3, "owl": 8}[label]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category, "bbox": list(box)}
            )
    categories = [{"id": 3, "name": "fox"}, {"id": 8, "name": "owl"}]
    return json.dumps({"images": listed, "annotations": annotations, "categories": categories})


def write_coco(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    write_images(root / "images", images)
    (root / "truth.json").write_text(coco_of(names=True))
    return "coco", Split(images="images", annotations="truth.json")


def write_lvis(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    write_images(root / "images", images)
    (root / "truth.json").write_text(coco_of(names=False))
    return "lvis", Split(annotations="truth.json")


def write_voc(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    write_images(root / "JPEGImages", images)
    for name in ("Annotations", "ImageSets/Main"):
        (root / name).mkdir(parents=True)
    (root / "ImageSets/Main/all.txt").write_text("\n".join(name.split(".")[0] for name in TRUTH))
    for name, objects in TRUTH.items():
        body = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax>"
            f"<ymax>{y + h}</ymax></bndbox></object>"
            for label, (x, y, w, h) in objects
        )
        (root / "Annotations" / f"{name.split('.')[0]}.xml").write_text(f"<annotation>{body}</annotation>")
    return "voc", Split(set="all")


def write_voc_export(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    """Without lists, as annotation tools write it; the XML files lie elsewhere than in VOC."""
    write_voc(root / "voc", images)
    (root / "voc" / "JPEGImages").rename(root / "images")
    (root / "voc" / "Annotations").rename(root / "xml")
    shutil.rmtree(root / "voc")
    return "voc", Split(images="images", annotations="xml")


def write_voc_beside(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    write_voc_export(root, images)
    for path in (root / "xml").iterdir():
        path.rename(root / "images" / path.name)
    (root / "xml").rmdir()
    return "voc", Split(images="images")


def yolo_lines(objects: list[tuple[str, tuple[float, float, float, float]]]) -> str:
    return "\n".join(
        f"{['owl', 'fox'].index(label)} {(x + w / 2) / SIZE[0]} {(y + h / 2) / SIZE[1]} {w / SIZE[0]} {h / SIZE[1]}"
        for label, (x, y, w, h) in objects
    )


def write_yolo(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    write_images(root / "images" / "train", images)
    (root / "labels" / "train").mkdir(parents=True)
    for name, objects in TRUTH.items():
        if objects:
            (root / "labels" / "train" / f"{name.split('.')[0]}.txt").write_text(yolo_lines(objects))
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nnames: {0: owl, 1: fox}\n")
    return "yolo", Split(set="train")


def write_yolo_flat(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    """Photos, labels and classes.txt in one directory."""
    write_yolo(root, images)
    for path in [*(root / "images" / "train").iterdir(), *(root / "labels" / "train").iterdir()]:
        path.rename(root / path.name)
    for name in ("images", "labels"):
        shutil.rmtree(root / name)
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("owl\nfox\n")
    return "yolo", Split(images=".")


def write_yolo_export(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    write_images(root / "train" / "images", images)
    (root / "train" / "labels").mkdir()
    for name, objects in TRUTH.items():
        (root / "train" / "labels" / f"{name.split('.')[0]}.txt").write_text(yolo_lines(objects))
    (root / "data.yaml").write_text("train: ../train/images\nnc: 2\nnames: [owl, fox]\n")
    return "yolo", Split(set="train")


def write_labelme(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    write_images(root / "photos", images)
    for name, objects in TRUTH.items():
        shapes = [
            {"label": label, "shape_type": "rectangle", "points": [[x + w, y], [x, y + h]]}
            for label, (x, y, w, h) in objects
        ]
        content = {"imageWidth": SIZE[0], "imageHeight": SIZE[1], "shapes": shapes}
        (root / "photos" / f"{name.split('.')[0]}.json").write_text(json.dumps(content))
    return "labelme", Split(images="photos")


def write_cvat(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    write_images(root / "images", images)
    body = ""
    for name, objects in TRUTH.items():
        boxes = "".join(
            f'<box label="{label}" xtl="{x}" ytl="{y}" xbr="{x + w}" ybr="{y + h}"/>' for label, (x, y, w, h) in objects
        )
        body += f'<image id="0" name="{name}" width="{SIZE[0]}" height="{SIZE[1]}">{boxes}</image>'
    (root / "annotations.xml").write_text(f"<annotations><version>1.1</version>{body}</annotations>")
    return "cvat", Split(images="images", annotations="annotations.xml")


def write_parquet(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    datasets = pytest.importorskip("datasets", reason="the package `datasets` writes what is read here")
    dataset = _dataset(datasets, images)
    (root / "data").mkdir(parents=True)
    dataset.to_parquet(str(root / "data" / "train-00000-of-00001.parquet"))
    return "huggingface", Split(set="train")


def write_plain_parquet(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    """A file as the package `datasets` writes it, without the package."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {
            "image": {"bytes": content, "path": name},
            "objects": {
                "bbox": [list(box) for _, box in TRUTH[name]],
                "category": [["owl", "fox"].index(label) for label, _ in TRUTH[name]],
            },
        }
        for name, content in images.items()
    ]
    names = {"_type": "List", "feature": {"_type": "ClassLabel", "names": ["owl", "fox"]}}
    features = {"info": {"features": {"image": {"_type": "Image"}, "objects": {"category": names}}}}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata({"huggingface": json.dumps(features)})
    (root / "data").mkdir(parents=True)
    parquet.write_table(table, root / "data" / "train-00000-of-00001.parquet")
    return "huggingface", Split(set="train")


def write_disk(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    datasets = pytest.importorskip("datasets", reason="the package `datasets` writes what is read here")
    datasets.DatasetDict({"train": _dataset(datasets, images)}).save_to_disk(str(root))
    return "huggingface", Split(set="train")


def _dataset(datasets, images: dict[str, bytes]):
    rows = {
        "image": [{"bytes": content, "path": name} for name, content in images.items()],
        "objects": [
            {"bbox": [list(box) for _, box in objects], "category": [["owl", "fox"].index(name) for name, _ in objects]}
            for objects in TRUTH.values()
        ],
    }
    label = datasets.ClassLabel(names=["owl", "fox"])
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(label)}
    return datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image(), "objects": objects}))


def write_tars(root: Path, images: dict[str, bytes]) -> tuple[str, Split]:
    root.mkdir()
    with tarfile.open(root / "train-0.tar", "w") as tar:
        for name, content in images.items():
            objects = [{"label": label, "bbox": list(box)} for label, box in TRUTH[name]]
            facts = json.dumps({"objects": objects}).encode()
            for member, data in ((name, content), (f"{name.split('.')[0]}.json", facts)):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return "webdataset", Split(images="train-*.tar")


WRITERS = [
    write_coco,
    write_lvis,
    write_voc,
    write_voc_export,
    write_voc_beside,
    write_yolo,
    write_yolo_export,
    write_yolo_flat,
    write_labelme,
    write_cvat,
    write_parquet,
    write_plain_parquet,
    write_disk,
    write_tars,
]


@pytest.mark.parametrize("write", WRITERS)
def test_every_format_gives_the_same_objects(
    tmp_path: Path, images: dict[str, bytes], write: Callable[[Path, dict[str, bytes]], tuple[str, Split]]
) -> None:
    name, split = write(tmp_path / "set", images)
    data = Data.model_validate({"format": name, "root": str(tmp_path / "set"), "train": (split,), "val": (split,)})
    shards = prepare_shards(data, "train", str(tmp_path / "shards"))
    assert check_shards(shards.url).faults == ()
    assert [category.name for category in shards.categories] == ["fox", "owl"]
    samples = list(EvaluationSamples(shards))
    assert [Path(sample.file_name).suffix for sample in samples] == [Path(image).suffix for image in TRUTH]
    for sample, objects in zip(samples, TRUTH.values(), strict=True):
        expected = [[x, y, x + w, y + h] for _, (x, y, w, h) in objects]
        np.testing.assert_allclose(sample.boxes, np.reshape(expected, (-1, 4)), atol=1e-4)
        assert [shards.categories[label - 1].name for label in sample.labels] == [label for label, _ in objects]
    again = prepare_shards(data, "train", str(tmp_path / "again"))
    assert again.digest == shards.digest


def test_a_changed_label_file_is_another_request(tmp_path: Path, images: dict[str, bytes]) -> None:
    name, split = write_yolo(tmp_path / "set", images)
    data = Data.model_validate({"format": name, "root": str(tmp_path / "set"), "train": (split,)})
    prepare_shards(data, "train", str(tmp_path / "shards"))
    labels = tmp_path / "set" / "labels" / "train" / "c.txt"
    labels.write_text(labels.read_text().replace("0 ", "1 ", 1))
    with pytest.raises(UserError, match="holds shards of another data set"):
        prepare_shards(data, "train", str(tmp_path / "shards"))


@pytest.mark.parametrize(
    ("line", "message"),
    [("2 .5 .5 .1 .1", "class 2 is none of the 2"), ("0 .5 .5 .1", "4 numbers"), ("owl .5 .5 .1 .1", "is not numbers")],
)
def test_a_yolo_line_that_cannot_be_is_named(tmp_path: Path, images: dict[str, bytes], line: str, message: str) -> None:
    name, split = write_yolo(tmp_path / "set", images)
    (tmp_path / "set" / "labels" / "train" / "c.txt").write_text(f"\n{line}\n")
    data = Data.model_validate({"format": name, "root": str(tmp_path / "set"), "train": (split,)})
    with pytest.raises(UserError, match=rf"c\.txt, line 2.*{message}"):
        prepare_shards(data, "train", str(tmp_path / "shards"))


def test_shares_divide_a_data_set(tmp_path: Path, images: dict[str, bytes]) -> None:
    for number in range(40):
        write_labelme(tmp_path / "all" / f"{number}", images)
    parts = {"train": (0.0, 0.9), "val": (0.9, 1.0)}
    splits = {part: (Split(images="all", share=share),) for part, share in parts.items()}
    data = Data(format="labelme", root=str(tmp_path), **splits)
    names = {}
    for part in parts:
        shards = prepare_shards(data, part, str(tmp_path / part))
        names[part] = [sample.file_name for sample in EvaluationSamples(shards)]
        assert [category.name for category in shards.categories] == ["fox", "owl"]
    assert [len(names["train"]), len(names["val"])] == [108, 12]
    assert len({*names["train"], *names["val"]}) == 120
    with pytest.raises(ValueError, match="two ascending numbers from 0 to 1"):
        Split(images="all", share=(0.5, 0.5))
