"""The diagnosis equals TIDE's numbers, adds up, and names faults that were planted."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import tidecv
from refinedet.pipeline.evaluation.diagnose import diagnose
from refinedet.pipeline.evaluation.diagnosis import ERROR_KINDS
from refinedet.pipeline.evaluation.diagnosis_examination import examine
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable

from .random_truth import random_truth


def perfect(truth: dict[str, Any]) -> list[dict[str, Any]]:
    scores = np.random.default_rng(0).uniform(0.5, 1, len(truth["annotations"])).tolist()
    return [
        {"image_id": one["image_id"], "category_id": one["category_id"], "bbox": one["bbox"], "score": score}
        for one, score in zip(truth["annotations"], scores, strict=True)
    ]


def diagnose_rows(truth: dict[str, Any], rows: list[dict[str, Any]]):
    return diagnose(GroundTruth.of(truth), DetectionTable.of(rows))


def apart(seed: int) -> dict[str, Any]:
    """Objects that do not overlap, of three classes."""
    rng = np.random.default_rng(seed)
    annotations = []
    for image in range(1, 9):
        for place in range(6):
            box = [100.0 * place, 10.0, float(rng.uniform(30, 80)), float(rng.uniform(30, 200))]
            one = {"id": len(annotations) + 1, "image_id": image, "category_id": 1 + place % 3, "bbox": box}
            annotations.append({**one, "area": box[2] * box[3]})
    categories = [{"id": number, "name": name} for number, name in enumerate(("cat", "dog", "cow"), start=1)]
    return {"images": [{"id": image} for image in range(1, 9)], "annotations": annotations, "categories": categories}


@pytest.mark.parametrize("seed", range(6))
def test_equals_tide(seed):
    """Every class has objects that are found: TIDE counts a class without objects as AP 0, we leave it out."""
    truth, rows = random_truth(seed, images=12, categories=3, objects=9, detections=60, ties=False)
    used = {one["category_id"] for one in truth["annotations"]}
    rows = [row for row in rows if row["category_id"] in used]
    gt, found = tidecv.Data("gt"), tidecv.Data("found")
    for category in truth["categories"]:
        gt.add_class(category["id"], category["name"])
    for image in truth["images"]:
        gt.add_image(image["id"], str(image["id"]))
    for one in truth["annotations"]:
        add = gt.add_ignore_region if one["iscrowd"] else gt.add_ground_truth
        add(one["image_id"], one["category_id"], one["bbox"])
    for row in rows:
        found.add_detection(row["image_id"], row["category_id"], row["score"], row["bbox"])
    tide = tidecv.TIDE()
    run = tide.evaluate(gt, found, mode=tidecv.TIDE.BOX, pos_threshold=0.5)
    expected = {kind.short_name: cost for kind, cost in run.fix_main_errors().items()}
    ours = diagnose_rows(truth, rows)
    assert ours.ap == pytest.approx(run.ap / 100, abs=1e-12)
    names = dict(zip(("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss"), ERROR_KINDS, strict=True))
    costs = {error.kind: error.ap_cost for error in ours.errors}
    counts = {error.kind: error.count for error in ours.errors}
    for kind, errors in run.error_dict.items():
        assert counts[names[kind.short_name]] == len(errors)
    for name, cost in expected.items():
        assert costs[names[name]] == pytest.approx(cost / 100, abs=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_fixing_everything_gives_an_ap_of_one(seed):
    truth, rows = random_truth(seed, images=10, categories=6, detections=40)
    found = diagnose_rows(truth, rows)
    assert found.ap_all_fixed == 1
    assert found.ap is not None
    assert found.ap < 1
    assert json.loads(json.dumps(found.to_json()))["errors"][0]["kind"] == "classification"
    known, table = GroundTruth.of(truth), DetectionTable.of(rows)
    parts = [
        examine(known, table.select(np.isin(table.image_id, ids)), ids.tolist())
        for ids in np.array_split(known.image_ids, 3)
    ]
    assert diagnose(known, parts).errors == found.errors


def test_perfect_detections_have_no_errors():
    found = diagnose_rows(apart(0), perfect(apart(0)))
    assert found.ap == 1
    assert [error.count for error in found.errors] == [0] * 6
    assert {(row, column) for row, column, _ in found.confusion.cells} == {(0, 0), (1, 1), (2, 2)}
    assert found.worst_images == found.costly_misses == found.false_alarms == found.truth_suspects == ()
    assert all(one.best_f1 == 1 for one in found.classes)
    assert sum(one.num_objects for one in found.slices["size"]) == found.num_objects == 48
    assert all(one.recall in (1, None) for slices in found.slices.values() for one in slices)


def test_shifted_boxes_are_localization_errors():
    truth = apart(1)
    rows = perfect(truth)
    for row in rows:
        x, y, width, height = row["bbox"]
        row["bbox"] = [x + 0.2 * width, y + 0.2 * height, width, height]  # IoU 0.64 / 1.36 = 0.47
    found = diagnose_rows(truth, rows)
    costs = {error.kind: error.ap_cost for error in found.errors}
    assert found.ap == 0
    assert costs.pop("localization") == pytest.approx(1)
    assert set(costs.values()) == {0}
    assert {one.kind for one in found.truth_suspects} == {"wrong box"}


def test_two_swapped_classes_are_seen_in_the_confusion_matrix():
    truth = apart(2)
    rows = [{**row, "category_id": {1: 2, 2: 1}.get(row["category_id"], 3)} for row in perfect(truth)]
    found = diagnose_rows(truth, rows)
    cells = {(found.confusion.labels[a], found.confusion.labels[b]): n for a, b, n in found.confusion.cells}
    assert cells == {("cat", "dog"): 16, ("dog", "cat"): 16, ("cow", "cow"): 16}
    costs = {error.kind: error.ap_cost for error in found.errors}
    assert costs["classification"] == pytest.approx(2 / 3)


def test_a_miss_and_a_false_alarm_are_listed_with_their_image():
    truth = apart(3)
    rows = [row for row in perfect(truth) if row["image_id"] != 5]
    rows.append({"image_id": 7, "category_id": 1, "bbox": [700, 400, 30, 30], "score": 1.0})
    found = diagnose_rows(truth, rows)
    assert found.worst_images[0].image_id == 5
    assert found.worst_images[0].num_missed == 6
    lost = {
        (one["category_id"], tuple(round(side, 3) for side in one["bbox"]))
        for one in truth["annotations"]
        if one["image_id"] == 5
    }
    ids = {category["name"]: category["id"] for category in truth["categories"]}
    assert {(ids[one.label], one.bbox) for one in found.worst_images[0].missed} == lost
    assert {one.image_id for one in found.costly_misses} == {5}
    (alarm,) = found.false_alarms
    assert (alarm.image_id, alarm.label, alarm.kind) == (7, "cat", "background")
    assert found.truth_suspects[0].kind == "missing object"
