"""The evaluation equals pycocotools to the last digit, in whatever chunks; each trap of the format on its own."""

from __future__ import annotations

import json
import os
from typing import Any, NamedTuple

import numpy as np
import pytest
from refinedet.pipeline.evaluation import curves
from refinedet.pipeline.evaluation.metrics import accumulate_matches, evaluate, make_protocol, match_detections
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs.errors import UserError

from tests.outside import outside

from .judges import evaluate_by_pycocotools, judge_by_faster_coco_eval, judge_by_pycocotools
from .random_truth import random_truth

COCO = make_protocol("coco")
PHOTOS = outside("data", "cocoeval-100")
# pycocotools' numbers of 100 photos that ship with it, which lie beside the repository
KNOWN_OF_PHOTOS = {
    "AP": 0.504581,
    "AP50": 0.696973,
    "AP75": 0.572982,
    "APs": 0.585626,
    "APm": 0.519400,
    "APl": 0.501398,
    "AR1": 0.386813,
    "AR10": 0.593680,
    "AR100": 0.595353,
}


# pycocotools' numbers of 100 made-up images, `random_truth(100, images=100, categories=20)`
KNOWN_OF_MADE_UP = {
    "AP": 0.143816,
    "AP50": 0.263609,
    "AP75": 0.114888,
    "APs": 0.278702,
    "APm": 0.155854,
    "APl": 0.072817,
    "AR1": 0.254662,
    "AR10": 0.809716,
    "AR100": 0.833517,
}


class Known(NamedTuple):
    """Ground truth, results rows, and the numbers that pycocotools gave for them when they were recorded."""

    truth: dict[str, Any]
    rows: list[dict[str, Any]]
    values: dict[str, float]


@pytest.fixture(
    scope="module",
    params=[None, *PHOTOS],
    ids=lambda folder: "photos" if folder else "made-up",
)
def hundred_images(request) -> Known:
    if request.param is None:
        return Known(*random_truth(100, images=100, categories=20), KNOWN_OF_MADE_UP)
    truth = json.loads((request.param / "instances_val2014_100.json").read_text())
    rows = json.loads((request.param / "instances_val2014_fakebbox100_results.json").read_text())
    return Known(truth, rows, KNOWN_OF_PHOTOS)


def evaluate_in_parts(truth: dict[str, Any], rows: list[dict[str, Any]], workers: int) -> dict[str, float]:
    """The result of `workers`: each matches its images, the parts come back in another order."""
    known, table = GroundTruth.of(truth), DetectionTable.of(rows)
    parts = []
    for worker in range(workers):
        images = np.random.default_rng(0).permutation(known.image_ids)[worker::workers]
        parts.append(match_detections(COCO, known, table.select(np.isin(table.image_id, images)), images.tolist()))
    return accumulate_matches(COCO, known, parts[::-1]).values


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
def test_known_answer_at_any_number_of_workers(hundred_images, workers):
    truth, rows, known = hundred_images
    values = evaluate_in_parts(truth, rows, workers)
    assert values == judge_by_pycocotools(truth, rows)
    assert {name: round(values[name], 6) for name in known} == known


@pytest.mark.parametrize("seed", range(6))
def test_random_truth_equals_pycocotools(seed):
    detections = 300 if seed == 0 else 40
    truth, rows = random_truth(seed, images=12, categories=1 + 2 * seed, detections=detections, ties=seed % 2 == 0)
    expected = judge_by_pycocotools(truth, rows)
    assert evaluate("coco", truth, rows).values == expected
    assert evaluate_in_parts(truth, rows, 3) == expected
    # faster-coco-eval sums in another order, so that its last digit may differ
    assert judge_by_faster_coco_eval(truth, rows) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_every_point_of_every_curve_equals_pycocotools(seed):
    truth, rows = random_truth(seed, images=12, categories=1 + 2 * seed, detections=60, ties=seed % 2 == 0)
    expected = evaluate_by_pycocotools(truth, rows).eval
    known = GroundTruth.of(truth)
    matches = [match_detections(COCO, known, DetectionTable.of(rows))]
    precision, recall = curves.accumulate_curves(COCO, known, matches)
    np.testing.assert_array_equal(precision, expected["precision"][..., -1])
    np.testing.assert_array_equal(recall, expected["recall"])
    metrics = evaluate("coco", truth, rows)
    for iou, row in ((0.5, 0), (0.75, 5)):
        for k, category in enumerate(sorted(truth["categories"], key=lambda one: one["id"])):
            np.testing.assert_array_equal(
                metrics.curves[iou][category["name"]], expected["precision"][row, :, k, 0, -1]
            )


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_categories_shared_out_to_threads_equal_pycocotools(threads, monkeypatch):
    truth, rows = random_truth(seed=threads, images=12, categories=7)
    monkeypatch.setattr(curves, "_DETECTIONS_A_THREAD", 1)
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    assert evaluate("coco", truth, rows).values == judge_by_pycocotools(truth, rows)


def test_shares_hold_every_category_once_and_about_as_many_detections(monkeypatch):
    monkeypatch.setattr(curves, "_DETECTIONS_A_THREAD", 10)
    counts = np.random.default_rng(0).integers(0, 20, 80)
    for most in (1, 2, 5, 100):
        shares = curves._shares(counts, most)
        assert [category for share in shares for category in share] == list(range(80))
        assert len(shares) <= most
        assert max(counts[list(share)].sum() for share in shares) <= counts.sum() / len(shares) + 20
    assert curves._shares(np.zeros(0, int), 4) == [range(0)]
    assert curves._shares(np.zeros(3, int), 4) == [range(3)]


def test_more_detections_of_a_class_than_count():
    truth, rows = random_truth(7, images=4, categories=1, objects=20, detections=300)
    assert evaluate("coco", truth, rows).values == judge_by_pycocotools(truth, rows)


def test_per_class_is_pycocotools_on_that_class(hundred_images):
    truth, rows, _ = hundred_images
    metrics = evaluate("coco", truth, rows)
    for category in truth["categories"][:5]:
        alone = {**truth, "categories": [category]}
        alone["annotations"] = [a for a in truth["annotations"] if a["category_id"] == category["id"]]
        own = [row for row in rows if row["category_id"] == category["id"]]
        if not own:
            continue
        expected = judge_by_pycocotools(alone, own)
        for name, value in metrics.per_class[category["name"]].items():
            assert value == pytest.approx(expected[name], abs=1e-12)
    for iou, name in ((0.5, "AP50"), (0.75, "AP75")):
        measured = np.stack([curve for curve in metrics.curves[iou].values() if curve.max() >= 0])
        assert measured.mean() == pytest.approx(metrics.values[name])


def one_object(**changes: Any) -> dict[str, Any]:
    annotation = {"id": 1, "image_id": 5, "category_id": 18, "bbox": [10, 10, 50, 50], "area": 2500, "iscrowd": 0}
    return {
        "images": [{"id": 5}, {"id": 9}],
        "categories": [{"id": 18, "name": "dog"}, {"id": 90, "name": "brush"}],
        "annotations": [{**annotation, **changes}],
    }


HIT = {"image_id": 5, "category_id": 18, "bbox": [10, 10, 50, 50], "score": 0.9}


def test_annotation_id_zero_counts_as_pycocotools_counts_it_and_is_named(caplog):
    values = evaluate("coco", one_object(id=0), [HIT]).values
    assert values == judge_by_pycocotools(one_object(id=0), [HIT])
    assert values["AP"] == 0
    assert "id 0" in caplog.text
    assert evaluate("coco", one_object(), [HIT]).values["AP"] == pytest.approx(1)


def test_area_is_the_annotations_own():
    small = one_object(area=900)  # the mask's; the box has 2500 square pixels
    values = evaluate("coco", small, [HIT]).values
    assert values == judge_by_pycocotools(small, [HIT])
    assert (values["APs"], values["APm"]) == (pytest.approx(1), -1)


def test_an_image_counted_twice_or_never_is_refused():
    truth = GroundTruth.of(one_object())
    table = DetectionTable.of([HIT])
    with pytest.raises(ValueError, match="exactly once: 1 came more than once"):
        accumulate_matches(
            COCO,
            truth,
            [match_detections(COCO, truth, table), match_detections(COCO, truth, DetectionTable.empty(), [9])],
        )
    with pytest.raises(ValueError, match="1 of 2 are missing"):
        accumulate_matches(COCO, truth, [match_detections(COCO, truth, table, [5])])


def test_a_hundred_detections_count_and_no_more():
    rows = [{**HIT, "bbox": [200, 200, 5, 5], "score": 0.95} for _ in range(100)] + [HIT]
    assert evaluate("coco", one_object(), rows).values["AR100"] == 0
    assert evaluate("coco", one_object(), rows[1:]).values["AR100"] == 1
    assert evaluate("coco", one_object(), rows).values == judge_by_pycocotools(one_object(), rows)


def test_a_crowd_is_neither_missed_nor_wrong():
    truth = one_object()
    truth["annotations"].append({**truth["annotations"][0], "id": 2, "iscrowd": 1, "bbox": [100, 100, 80, 80]})
    rows = [HIT, *({**HIT, "bbox": [110 + 3 * i, 110, 20, 20], "score": 0.95} for i in range(5))]
    values = evaluate("coco", truth, rows).values
    assert values == judge_by_pycocotools(truth, rows)
    assert values["AP"] == pytest.approx(1)


def test_an_empty_result_and_a_truth_without_objects():
    values = evaluate("coco", one_object(), []).values
    assert (values["AP"], values["AR100"], values["APl"]) == (0, 0, -1)
    nothing = {**one_object(), "annotations": []}
    assert set(evaluate("coco", nothing, [HIT]).values.values()) == {-1}
    assert evaluate("coco", nothing, [HIT]).values == judge_by_pycocotools(nothing, [HIT])
    assert set(evaluate("coco", nothing, []).values.values()) == {-1}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"score": float("nan")}, "row 1 .*not finite"),
        ({"bbox": [1, 2, float("inf"), 4]}, "row 1 .*not finite"),
        ({"bbox": [10, 10, -5, 5]}, "row 1 .*negative side"),
        ({"bbox": [10, 10, 5]}, "row 1: bbox must be four numbers"),
        ({"bbox": None}, "row 1: bbox must be four numbers"),
        ({"score": "high"}, "row 1: score must be a number"),
        ({"score": "0.5"}, "row 1: score must be a number"),
        ({"score": None}, "row 1: score must be a number"),
        ({"bbox": ["1", "2", "3", "4"]}, "row 1: bbox must be four numbers"),
        ({"bbox": [1, 2, 3, 10**400]}, "row 1: bbox must be four numbers"),
        ({"image_id": "5"}, "row 1: image_id must be a whole number"),
        ({"image_id": 5.5}, "row 1: image_id must be a whole number"),
        ({"image_id": 2**63}, "row 1: image_id must be a whole number"),
        ({"category_id": 2**70}, "row 1: category_id must be a whole number"),
        ({"image_id": 7}, "row 1: image_id 7 is not among the 2 .*1 rows like it"),
        ({"category_id": 1}, "row 1: category_id 1 is not among .*own category ids"),
    ],
)
def test_bad_rows_are_named(change, said):
    with pytest.raises(UserError, match=said):
        evaluate("coco", one_object(), [HIT, {**HIT, **change}])


def test_rows_that_lack_a_field_or_are_no_rows():
    with pytest.raises(UserError, match="row 0 has no score"):
        evaluate("coco", one_object(), [{key: HIT[key] for key in ("image_id", "category_id", "bbox")}])
    with pytest.raises(UserError, match="must be a list"):
        evaluate("coco", one_object(), {"annotations": []})  # pyright: ignore[reportArgumentType]
    whole = [{**HIT, "image_id": 5.0}]
    assert evaluate("coco", one_object(), whole).values["AP"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"images": None}, "is not a COCO instances file"),
        ({"annotations": [{"id": 1}]}, "every annotation needs"),
        ({"annotations": one_object()["annotations"] * 2}, "annotation id 1 is used 2 times"),
        ({"annotations": [{**one_object()["annotations"][0], "area": float("nan")}]}, "finite"),
        ({"annotations": [{**one_object()["annotations"][0], "id": 1.9}]}, "id must be a whole number, received 1.9"),
        ({"annotations": [{**one_object()["annotations"][0], "id": 2**63}]}, "id must be a whole number"),
        ({"annotations": [{**one_object()["annotations"][0], "image_id": "5"}]}, "image_id must be a whole number"),
        ({"annotations": [{**one_object()["annotations"][0], "category_id": [3]}]}, "must be a whole number"),
        ({"annotations": [{**one_object()["annotations"][0], "bbox": ["1", "2", "3", "4"]}]}, "bbox must be numbers"),
        ({"annotations": [{**one_object()["annotations"][0], "area": "9"}]}, "area must be numbers, received '9'"),
        ({"annotations": [{**one_object()["annotations"][0], "iscrowd": "0"}]}, "iscrowd must be 0 or 1, received '0'"),
        ({"annotations": ["annotation"]}, "is not a COCO instances file"),
        ({"images": [{"id": "5"}, {"id": 9}]}, "all whole numbers or all text"),
        ({"categories": [{"id": 3.5, "name": "x"}]}, "a category's id must be a whole number"),
    ],
)
def test_truth_that_is_none(change, said):
    with pytest.raises(UserError, match=said):
        GroundTruth.of({**one_object(), **change})
    with pytest.raises(UserError, match="received \\['boxes'\\]"):
        GroundTruth.of({"boxes": []})


def test_truth_with_whole_numbers_written_as_floats():
    truth = one_object()
    floats = {**truth["annotations"][0]}
    for field in ("id", "image_id", "category_id", "iscrowd"):
        floats[field] = float(floats.get(field, 0))
    read, expected = GroundTruth.of({**truth, "annotations": [floats]}), GroundTruth.of(truth)
    for field in ("annotation_id", "image_id", "category_id", "crowd", "bbox"):
        assert getattr(read, field).dtype == getattr(expected, field).dtype
        assert getattr(read, field).tolist() == getattr(expected, field).tolist()
