"""Bad annotations and images: counted and named up to the limit, then an error; never silence."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refinedet.pipeline.config.spec import Data
from refinedet.pipeline.data.annotations import are_learnable, fault_of_box
from refinedet.pipeline.data.index import ShardSet, check_same_categories
from refinedet.pipeline.data.inspection import check_shards
from refinedet.pipeline.data.reading import EvaluationSamples, expand_tar, read_facts, write_coco_annotations
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.runs.errors import UserError

Write = Callable[..., Data]


def prepared(data: Data, tmp_path: Path) -> tuple[Any, list[dict[str, str]]]:
    shards = prepare_shards(data, "train", str(tmp_path / "shards"))
    return shards, json.loads((tmp_path / "shards" / "index.json").read_text())["faults"]


def set_box(box: list[Any]) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["annotations"][2].update(bbox=box)


@pytest.mark.parametrize(
    ("box", "reason", "stays"),
    [
        ([4, 6, 0, 10], "has no area", True),
        ([4, 6, -3, 10], "has no area", True),
        ([64, 6, 5, 5], "outside the image", True),
        ([-9, 6, 5, 5], "outside the image", True),
        ([float("nan"), 6, 5, 5], "four finite numbers", False),
        ([4, 6, float("inf"), 5], "four finite numbers", False),
        ([4, 6, 5], "four finite numbers", False),
        (["a", 6, 5, 5], "not four numbers", False),
        (["4", "6", "5", "5"], "not four numbers", False),
        ([4, 6, 5, 10**400], "not four numbers", False),
        ([True, 6, 5, 5], "not four numbers", False),
        ({"x": 4}, "not four numbers", False),
    ],
)
def test_a_bad_box_is_named_and_not_learnt(
    coco_folder: Write, tmp_path: Path, box: list[Any], reason: str, stays: bool
) -> None:
    shards, faults = prepared(coco_folder(5, set_box(box)), tmp_path)
    assert [(fault["key"], reason in fault["reason"]) for fault in faults] == [("annotation 3", True)]
    assert [len(sample.boxes) for sample in EvaluationSamples(shards)] == [1, 1, 0, 1, 1]
    # A box with numbers stays in the ground truth: COCO's own code counts it too.
    write_coco_annotations(shards, str(tmp_path / "truth.json"))
    assert len(json.loads((tmp_path / "truth.json").read_text())["annotations"]) == 4 + stays
    assert bool(check_shards(str(tmp_path / "shards")).faults) == stays


def test_boxes_are_judged_alike_one_by_one_and_together() -> None:
    rng = np.random.default_rng(0)
    odd = [0.0, -1.0, 1e-7, 33.3, 64.0, 48.0, 1e30, 1e308, float("inf"), float("nan")]
    boxes = np.concatenate([rng.uniform(-40, 80, (500, 4)), rng.choice(odd, (3000, 4))])
    judged = [fault_of_box(tuple(box), 64, 48) is None for box in boxes.tolist()]
    assert 100 < sum(judged) < 3000
    assert are_learnable(boxes, 64, 48).tolist() == judged


@pytest.mark.parametrize("sides", [(16_000, 16_000), (60_000, 60_000), (0, 64)])
def test_a_header_that_claims_the_impossible_is_not_believed(
    coco_folder: Write, tmp_path: Path, sides: tuple[int, int]
) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["images"][1] |= {"file_name": "bomb.png", "width": sides[0], "height": sides[1]}

    data = coco_folder(3, edit)
    header = b"IHDR" + sides[0].to_bytes(4, "big") + sides[1].to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    (tmp_path / "images" / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x0d" + header + b"IEND")
    shards, faults = prepared(data, tmp_path)
    assert shards.num_samples == 2
    assert any(f"claims to have {sides[0]} x {sides[1]} pixels" in fault["reason"] for fault in faults)


def test_a_box_that_reaches_over_the_edge_is_clipped(coco_folder: Write, tmp_path: Path) -> None:
    shards, faults = prepared(coco_folder(3, set_box([-2, 40, 20, 30])), tmp_path)
    assert faults == []
    assert next(iter(EvaluationSamples(shards, [2]))).boxes.tolist() == [[0, 40, 18, 48]]


def test_areas_that_are_missing_are_those_of_the_boxes(coco_folder: Write, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        del content["annotations"][0]["area"]
        content["annotations"][1]["area"] = float("nan")

    shards, faults = prepared(coco_folder(3, edit), tmp_path)
    assert faults == []
    assert [facts["objects"][0]["area"] for facts in read_facts(shards)] == [200, 200, 150]


@pytest.mark.parametrize("number", ["seven", None, 2.5, 2**70, True, 0, -3])
def test_ids_that_are_no_positive_numbers_are_replaced_and_named_as_received(
    coco_folder: Write, tmp_path: Path, number: Any
) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["annotations"][1]["id"] = number

    shards, faults = prepared(coco_folder(3, edit), tmp_path)
    (fault,) = faults
    assert f"annotation {number!r}" in str(fault)
    ids = [facts["objects"][0]["id"] for facts in read_facts(shards)]
    assert (ids[0], ids[2]) == (1, 3)
    assert ids[1] > 2**40


def test_past_the_limit_is_an_error_that_names_the_first(coco_folder: Write, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        for annotation in content["annotations"][1:5]:
            annotation["bbox"] = [0, 0, 0, 0]

    with pytest.raises(UserError, match=r"more than 3 faults.*annotation 2: .*no area.*data\.max_bad_samples"):
        prepared(coco_folder(6, edit, max_bad_samples=3), tmp_path)
    assert not (tmp_path / "shards" / "index.json").exists()


@pytest.mark.parametrize("number", [0, -4, 1, "x", 2**63, True, [1]])
def test_annotation_ids_that_coco_would_lose_are_replaced(coco_folder: Write, tmp_path: Path, number: Any) -> None:
    shards, faults = prepared(coco_folder(3, lambda content: content["annotations"][1].update(id=number)), tmp_path)
    assert len(faults) == 1
    assert "its id" in faults[0]["reason"]
    write_coco_annotations(shards, str(tmp_path / "truth.json"))
    ids = [entry["id"] for entry in json.loads((tmp_path / "truth.json").read_text())["annotations"]]
    assert len(set(ids)) == 3
    assert min(ids) > 0


@pytest.mark.parametrize(
    "edit",
    [
        {"category_id": 5},
        {"image_id": 99},
        {"category_id": [7]},
        {"category_id": "7"},
        {"category_id": 7.5},
        {"image_id": {}},
        {"image_id": "2"},
        {"image_id": 2**70},
    ],
)
def test_annotations_of_nothing_are_left_out_and_named(coco_folder: Write, tmp_path: Path, edit: dict) -> None:
    shards, faults = prepared(coco_folder(3, lambda content: content["annotations"][1].update(edit)), tmp_path)
    assert ["does not exist" in fault["reason"] for fault in faults] == [True]
    assert sum(len(sample.boxes) for sample in EvaluationSamples(shards)) == 2


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("annotation", "is not an object"),
        (None, "is not an object"),
        ({"iscrowd": "0"}, "iscrowd '0' is neither 0 nor 1"),
        ({"iscrowd": 2}, "iscrowd 2 is neither 0 nor 1"),
    ],
)
def test_what_is_no_annotation_is_left_out_and_named(
    coco_folder: Write, tmp_path: Path, entry: Any, reason: str
) -> None:
    def edit(content: dict[str, Any]) -> None:
        known = content["annotations"][1]
        content["annotations"][1] = {**known, **entry} if isinstance(entry, dict) else entry

    shards, faults = prepared(coco_folder(3, edit), tmp_path)
    assert [reason in fault["reason"] for fault in faults] == [True]
    assert [len(sample.boxes) for sample in EvaluationSamples(shards)] == [1, 0, 1]


def test_whole_numbers_may_be_written_as_floats(coco_folder: Write, tmp_path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["annotations"][1].update(image_id=2.0, category_id=7.0, iscrowd=1.0)
        content["categories"][1]["id"] = 7.0
        content["images"][1].update(width=64.0, height=48.0)

    shards, faults = prepared(coco_folder(3, edit), tmp_path)
    assert faults == []
    assert [sample.crowd.tolist() for sample in EvaluationSamples(shards)] == [[False], [True], [False]]
    write_coco_annotations(shards, str(tmp_path / "truth.json"))
    categories = [entry["category_id"] for entry in json.loads((tmp_path / "truth.json").read_text())["annotations"]]
    assert list(map(repr, categories)) == ["7", "7", "7"]


@pytest.mark.parametrize(
    ("part", "edit", "said"),
    [
        ("images", {"width": "64"}, "the width of image 2 must be a whole number of pixels, received '64'"),
        ("images", {"height": -48}, "the height of image 2 must be a whole number of pixels, received -48"),
        ("images", {"id": 2**63}, "every image needs a whole number `id`"),
        ("categories", {"id": "7"}, "every category needs a whole number `id`"),
        ("categories", {"id": 7.9}, "every category needs a whole number `id`"),
        ("categories", {"id": [7]}, "every category needs a whole number `id`"),
    ],
)
def test_images_and_categories_that_are_malformed_are_errors_at_once(
    coco_folder: Write, tmp_path: Path, part: str, edit: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        prepared(coco_folder(3, lambda content: content[part][1].update(edit)), tmp_path)


def test_duplicate_ids_of_images_and_categories_are_errors_at_once(coco_folder: Write, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="image id 1 occurs twice"):
        prepared(coco_folder(3, lambda content: content["images"][1].update(id=1)), tmp_path)
    with pytest.raises(UserError, match="category id 90 occurs twice"):
        prepared(coco_folder(3, lambda content: content["categories"][1].update(id=90)), tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "is not JSON .the file is no JSON object"),
        ('{"images": []}', "is not a COCO file"),
    ],
)
def test_a_file_that_is_not_coco_is_said(coco_folder: Write, tmp_path: Path, content: str, message: str) -> None:
    data = coco_folder(2)
    (tmp_path / "instances.json").write_text(content)
    with pytest.raises(UserError, match=message):
        prepared(data, tmp_path)
    (tmp_path / "instances.json").unlink()
    with pytest.raises(UserError, match=r"instances\.json does not exist"):
        prepared(data, tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "has no file"), (b"", "not a JPEG, PNG or WebP"), (b"<html>gone</html>", "not a JPEG, PNG or WebP")],
)
def test_files_that_are_no_images_are_left_out(
    coco_folder: Write, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    data = coco_folder(4)
    path = tmp_path / "images" / "3.jpg"
    path.unlink() if content is None else path.write_bytes(content)
    shards, faults = prepared(data, tmp_path)
    assert [reason in fault["reason"] for fault in faults] == [True]
    assert "3.jpg" in faults[0]["key"]
    assert [sample.image_id for sample in EvaluationSamples(shards)] == [1, 2, 4]


def test_an_image_of_another_size_than_annotated_is_left_out(
    coco_folder: Write, tmp_path: Path, jpeg: Callable[..., bytes]
) -> None:
    data = coco_folder(3)
    (tmp_path / "images" / "2.jpg").write_bytes(jpeg(64, 48))
    shards, faults = prepared(data, tmp_path)
    assert ["48 x 64 pixels, its annotations have 64 x 48" in fault["reason"] for fault in faults] == [True]
    assert shards.num_samples == 2


def test_an_image_without_end_marker_is_left_out_and_named(coco_folder: Write, tmp_path: Path) -> None:
    data = coco_folder(3)
    path = tmp_path / "images" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-2])
    shards, faults = prepared(data, tmp_path)
    assert ["does not finish the image" in fault["reason"] for fault in faults] == [True]
    assert [sample.image_id for sample in EvaluationSamples(shards)] == [1, 3]


def test_names_that_point_out_of_the_tar_are_found_and_never_followed(coco_folder: Write, tmp_path: Path) -> None:
    shards, _ = prepared(coco_folder(3), tmp_path)
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in ("../x.jpg", "/etc/x.json"):
            member = tarfile.TarInfo(name)
            member.size = 3
            tar.addfile(member, io.BytesIO(b"abc"))
    path = tmp_path / "shards" / shards.names[0]
    path.write_bytes(file.getvalue() + path.read_bytes())
    faults = check_shards(str(tmp_path / "shards")).faults
    assert {"../x.jpg", "/etc/x.json"} <= {fault.key for fault in faults}
    assert not (tmp_path / "x.jpg").exists()
    assert expand_tar(file.getvalue())["__key__"] == "../x"
    with pytest.raises(UserError, match="is damaged"):  # place and content of the bytes differ from the index
        list(EvaluationSamples(shards))


def test_ids_that_select_images(coco_folder: Write, tmp_path: Path) -> None:
    data = coco_folder(6)
    lists = {"lines.txt": "5\n2\n", "list.json": "[5, 2]", "file.json": json.dumps({"images": [{"id": 5}, {"id": 2}]})}
    for name, content in lists.items():
        (tmp_path / name).write_text(content)
        split = data.train[0].model_copy(update={"ids": name})
        shards = prepare_shards(data.model_copy(update={"train": (split,)}), "train", str(tmp_path / f"s-{name}"))
        assert [sample.image_id for sample in EvaluationSamples(shards)] == [2, 5]
    for content in ("[5, 2.5]", '["5"]', "[[5]]", '{"images": [{"id": "5"}]}'):
        (tmp_path / "list.json").write_text(content)
        split = data.train[0].model_copy(update={"ids": "list.json"})
        with pytest.raises(UserError, match="is not a list of image ids"):
            prepare_shards(data.model_copy(update={"train": (split,)}), "train", str(tmp_path / "s"))
    (tmp_path / "lines.txt").write_text("5\n77\n")
    split = data.train[0].model_copy(update={"ids": "lines.txt"})
    with pytest.raises(UserError, match=r"names 1 images that instances\.json does not have, the first: 77"):
        prepare_shards(data.model_copy(update={"train": (split,)}), "train", str(tmp_path / "s"))


def test_images_without_annotations_as_in_test_dev(coco_folder: Write, tmp_path: Path) -> None:
    data = coco_folder(3, lambda content: content.pop("annotations"))
    with pytest.raises(UserError, match="needs the lists images, categories, annotations"):
        prepared(data, tmp_path)
    split = data.train[0].model_copy(update={"annotations": None, "image_info": "instances.json"})
    shards = prepare_shards(data.model_copy(update={"val": (split,)}), "val", str(tmp_path / "shards"))
    assert [len(sample.boxes) for sample in EvaluationSamples(shards)] == [0, 0, 0]
    with pytest.raises(UserError, match="3 images and not one object to learn from"):
        prepare_shards(data.model_copy(update={"train": (split,)}), "train", str(tmp_path / "other"))
    assert [category.id for category in shards.categories] == [7, 90]


def test_two_splits_may_not_share_images_or_disagree_on_categories(coco_folder: Write, tmp_path: Path) -> None:
    data = coco_folder(3)
    twice = data.model_copy(update={"train": (data.train[0], data.train[0])})
    with pytest.raises(UserError, match=r"image id 1 .* is already taken"):
        prepared(twice, tmp_path)
    content = json.loads((tmp_path / "instances.json").read_text())
    content["categories"][0]["name"] = "comb"
    (tmp_path / "other.json").write_text(json.dumps(content))
    other = data.train[0].model_copy(update={"annotations": "other.json"})
    with pytest.raises(UserError, match="has other categories"):
        prepare_shards(data.model_copy(update={"train": (data.train[0], other)}), "train", str(tmp_path / "other"))


def test_the_same_labels_must_mean_the_same_categories(coco_folder: Write, tmp_path: Path) -> None:
    def named(folder: str, *names: str) -> ShardSet:
        def edit(content: dict[str, Any]) -> None:
            content["categories"] = [{"id": 7 + number, "name": name} for number, name in enumerate(names)]

        return prepare_shards(coco_folder(2, edit), "train", str(tmp_path / folder))

    train = named("train", "dog", "cat")
    check_same_categories(train, named("same", "dog", "cat"))
    with pytest.raises(UserError, match=r"label 1 .* is 'dog' in the first and 'cat' in the second"):
        check_same_categories(train, named("swapped", "cat", "dog"))
    with pytest.raises(UserError, match=r"label 2 .* is 'cat' in the first and missing in the second"):
        check_same_categories(train, named("fewer", "dog"))
    # Ids are the data set's own affair: labels go by their order.
    other = coco_folder(2, lambda content: content["categories"][0].update(id=8, name="brush"))
    check_same_categories(
        prepare_shards(coco_folder(2), "train", str(tmp_path / "ids")),
        prepare_shards(other, "train", str(tmp_path / "other ids")),
    )
