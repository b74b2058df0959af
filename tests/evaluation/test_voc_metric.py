"""VOC's average precision equals the devkit's rules followed one detection at a time; its result files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from refinedet.pipeline.evaluation.server_files import write_voc_files
from refinedet.pipeline.evaluation.voc_metric import evaluate_voc
from refinedet.pipeline.runs.errors import UserError

from .random_truth import random_truth


def average_precision_in_a_loop(truth: dict[str, Any], rows: list[dict[str, Any]], category: int, rule: str) -> float:
    """VOCevaldet, plainly."""
    objects = [one for one in truth["annotations"] if one["category_id"] == category and not one["iscrowd"]]
    num_positives = sum(not one["difficult"] for one in objects)
    if not num_positives:
        return -1.0
    rows = sorted((row for row in rows if row["category_id"] == category), key=lambda row: -row["score"])
    found, true, false = set(), [], []
    for row in rows:
        best, best_overlap = None, -1.0
        x, y, w, h = row["bbox"]
        for one in objects:
            if one["image_id"] != row["image_id"]:
                continue
            gx, gy, gw, gh = one["bbox"]
            width, height = min(x + w, gx + gw) - max(x, gx), min(y + h, gy + gh) - max(y, gy)
            if width > 0 and height > 0 and width * height / (w * h + gw * gh - width * height) > best_overlap:
                best, best_overlap = one, width * height / (w * h + gw * gh - width * height)
        hit = best is not None and best_overlap >= 0.5
        skip = hit and best["difficult"]
        true.append(hit and not skip and best["id"] not in found)
        false.append(not skip and not true[-1])
        if true[-1]:
            found.add(best["id"])
    hits, misses = np.cumsum(true), np.cumsum(false)
    recall, precision = hits / num_positives, hits / np.maximum(hits + misses, 1)
    if rule == "voc2007":
        levels = np.linspace(0, 1, 11)
        return float(np.mean([max(precision[recall >= level - 1e-12], default=0.0) for level in levels]))
    area, last = 0.0, 0.0
    for k in range(len(recall)):
        if recall[k] > last:
            area += (recall[k] - last) * precision[k:].max()
            last = recall[k]
    return area


@pytest.mark.parametrize("rule", ["voc2007", "voc2012"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_devkits_loop(seed, rule):
    truth, rows = random_truth(seed, images=12, categories=4, objects=6, detections=50, ties=seed == 0)
    rng = np.random.default_rng(seed)
    for one in truth["annotations"]:
        one["difficult"] = int(rng.random() < 0.2)
    metrics = evaluate_voc(truth, rows, rule=rule)
    for category in truth["categories"]:
        expected = average_precision_in_a_loop(truth, rows, category["id"], rule)
        assert metrics.per_class[category["name"]] == pytest.approx(expected, abs=1e-9)
    valid = [value for value in metrics.per_class.values() if value >= 0]
    assert metrics.mean == pytest.approx(np.mean(valid))
    assert metrics.to_json()[rule]["mAP"] == metrics.mean


def one_object(**changes: Any) -> dict[str, Any]:
    annotation = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [10, 10, 50, 50], "area": 2500, **changes}
    images = [{"id": 5, "file_name": "JPEGImages/000005.jpg"}]
    categories = [{"id": 3, "name": "dog"}, {"id": 4, "name": "cat"}]
    return {"images": images, "categories": categories, "annotations": [annotation]}


HIT = {"image_id": 5, "category_id": 3, "bbox": [10, 10, 50, 50], "score": 0.9}


def test_a_second_look_at_an_object_is_wrong_and_a_difficult_one_is_ignored():
    assert evaluate_voc(one_object(), [HIT]).per_class == {"dog": pytest.approx(1), "cat": -1}
    assert evaluate_voc(one_object(), [HIT, {**HIT, "score": 0.95}], rule="voc2012").mean == 1
    early = [HIT, {**HIT, "bbox": [200, 200, 9, 9], "score": 0.95}]
    assert evaluate_voc(one_object(), early, rule="voc2012").mean == 0.5
    assert evaluate_voc(one_object(difficult=1), [HIT]).mean == -1
    assert evaluate_voc(one_object(), []).mean == 0
    with pytest.raises(UserError, match="voc2007 or voc2012, received voc"):
        evaluate_voc(one_object(), [HIT], rule="voc")  # pyright: ignore[reportArgumentType]


def test_result_files_hold_inclusive_pixels_from_one(tmp_path):
    names = write_voc_files(str(tmp_path), one_object(), [HIT])
    assert names == ("comp4_det_test_dog.txt", "comp4_det_test_cat.txt")
    assert (tmp_path / names[0]).read_text() == "000005 0.900000 11.0 11.0 60.0 60.0\n"
    assert (tmp_path / names[1]).read_text() == ""
