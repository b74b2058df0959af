"""LVIS's numbers equal those of the `lvis` package; federated truth is refused by metrics without its rules."""

from __future__ import annotations

import copy
import logging
from typing import Any

import lvis
import numpy as np
import pytest
from refinedet.pipeline.evaluation.metrics import accumulate_matches, evaluate, make_protocol, match_detections
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs.errors import UserError

from .random_truth import random_truth


def random_lvis(seed: int, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Categories verified absent, not exhaustive, and neither; frequencies; no crowds."""
    truth, rows = random_truth(seed, **settings)
    rng = np.random.default_rng(seed)
    ids = [category["id"] for category in truth["categories"]]
    for number, category in enumerate(truth["categories"]):
        category["frequency"] = "rcf"[number % 3]
    for one in truth["annotations"]:
        del one["iscrowd"]
    for image in truth["images"]:
        own = {one["category_id"] for one in truth["annotations"] if one["image_id"] == image["id"]}
        image["neg_category_ids"] = [c for c in ids if c not in own and rng.random() < 0.4]
        image["not_exhaustive_category_ids"] = [c for c in own if rng.random() < 0.3]
    return truth, rows


def judge_by_lvis(
    truth: dict[str, Any], rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> dict[str, float]:
    monkeypatch.setattr(np, "float", float, raising=False)  # the package was written for an earlier NumPy
    logging.getLogger("lvis").setLevel(logging.ERROR)
    ground = lvis.LVIS.__new__(lvis.LVIS)
    ground.logger = logging.getLogger("lvis")
    ground.dataset = copy.deepcopy(truth)
    ground._create_index()
    judged = lvis.LVISEval(ground, lvis.LVISResults(ground, copy.deepcopy(rows)), "bbox")
    judged.run()
    return {name.replace("@", ""): float(value) for name, value in judged.get_results().items()}


@pytest.mark.parametrize("seed", range(8))
def test_equals_the_lvis_package(seed, monkeypatch):
    detections = 400 if seed == 0 else 60
    truth, rows = random_lvis(seed, images=10, categories=9, detections=detections, ties=seed % 2 == 0)
    expected = judge_by_lvis(truth, rows, monkeypatch)
    assert evaluate("lvis", truth, rows).values == expected
    known, table = GroundTruth.of(truth), DetectionTable.of(rows)
    protocol = make_protocol("lvis")
    parts = [
        match_detections(protocol, known, table.select(np.isin(table.image_id, ids)), ids.tolist())
        for ids in np.array_split(known.image_ids, 3)
    ]
    assert accumulate_matches(protocol, known, parts[::-1]).values == expected


def test_truth_that_asks_for_other_rules_is_refused():
    truth, rows = random_lvis(1, images=3, categories=3, detections=5)
    for metric in ("coco", "voc2012", "crowdhuman"):
        with pytest.raises(UserError, match=rf"neg_category_ids.*which {metric} has no rule for; measure by lvis"):
            evaluate(metric, truth, rows)
    plain, rows = random_truth(1, images=3, categories=3, detections=5)
    for annotation in plain["annotations"]:
        annotation["iscrowd"] = 0
    with pytest.raises(UserError, match="lvis needs annotations that list the categories looked for"):
        evaluate("lvis", plain, rows)
    plain["annotations"][0]["ignore"] = 1
    with pytest.raises(UserError, match=r"mark objects to be ignored .* which coco has no rule for"):
        evaluate("coco", plain, rows)
