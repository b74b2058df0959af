"""VOC's average precision equals the devkit's rules followed one detection at a time; its result files."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from refinedet.pipeline.evaluation.metrics import evaluate, make_protocol
from refinedet.pipeline.evaluation.server_files import write_voc_files
from refinedet.pipeline.runs.errors import UserError

from .random_truth import random_truth


def voc_eval_det(truth: dict[str, Any], rows: list[dict[str, Any]], category: int, year: int) -> float:
    """VOCdevkit's VOCevaldet.m and VOCap.m, statement by statement, in inclusive pixels from 1."""
    ground, num_positives = {}, 0
    for image in truth["images"]:
        own = [one for one in truth["annotations"] if (one["image_id"], one["category_id"]) == (image["id"], category)]
        boxes = [(x + 1, y + 1, x + w, y + h) for x, y, w, h in (one["bbox"] for one in own)]
        ground[image["id"]] = {"BB": boxes, "diff": [one["difficult"] for one in own], "det": [False] * len(own)}
        num_positives += sum(not one["difficult"] for one in own)
    if not num_positives:
        return -1.0
    rows = sorted((row for row in rows if row["category_id"] == category), key=lambda row: -row["score"])
    tp, fp = np.zeros(len(rows)), np.zeros(len(rows))
    for d, row in enumerate(rows):
        x, y, w, h = row["bbox"]
        bb, gt, ovmax, jmax = (x + 1, y + 1, x + w, y + h), ground[row["image_id"]], -np.inf, -1
        for j, bbgt in enumerate(gt["BB"]):
            bi = max(bb[0], bbgt[0]), max(bb[1], bbgt[1]), min(bb[2], bbgt[2]), min(bb[3], bbgt[3])
            iw, ih = bi[2] - bi[0] + 1, bi[3] - bi[1] + 1
            if iw > 0 and ih > 0:
                ua = (bb[2] - bb[0] + 1) * (bb[3] - bb[1] + 1) + (bbgt[2] - bbgt[0] + 1) * (bbgt[3] - bbgt[1] + 1)
                ov = iw * ih / (ua - iw * ih)
                if ov > ovmax:
                    ovmax, jmax = ov, j
        if ovmax >= 0.5:
            if not gt["diff"][jmax]:
                tp[d], fp[d] = (0, 1) if gt["det"][jmax] else (1, 0)
                gt["det"][jmax] = True
        else:
            fp[d] = 1
    tp, fp = np.cumsum(tp), np.cumsum(fp)
    rec, prec = tp / num_positives, np.divide(tp, fp + tp, out=np.zeros(len(tp)), where=fp + tp > 0)
    if year == 2007:
        ap = 0.0
        for k in range(11):  # for t=0:0.1:1
            p = prec[rec >= k * 0.1]
            ap = ap + (p.max() if len(p) else 0.0) / 11
        return ap
    mrec, mpre = [0.0, *rec, 1.0], [0.0, *prec, 0.0]
    for i in range(len(mpre) - 2, -1, -1):
        mpre[i] = max(mpre[i], mpre[i + 1])
    return sum((mrec[i] - mrec[i - 1]) * mpre[i] for i in range(1, len(mrec)) if mrec[i] != mrec[i - 1])


def voc_eval(
    truth: dict[str, Any], rows: list[dict[str, Any]], category: int, use_07_metric: bool, ovthresh: float
) -> float:
    """py-faster-rcnn's voc_eval.py, which takes an object above `ovthresh` where the devkit takes it from 0.5 on."""
    class_recs = {}
    for image in truth["images"]:
        own = [one for one in truth["annotations"] if (one["image_id"], one["category_id"]) == (image["id"], category)]
        corners = [[x + 1, y + 1, x + w, y + h] for x, y, w, h in (one["bbox"] for one in own)]
        hard = np.array([one["difficult"] for one in own], bool)
        class_recs[image["id"]] = np.array(corners, float).reshape(-1, 4), hard, [False] * len(own)
    npos = sum(int((~hard).sum()) for _, hard, _ in class_recs.values())
    if not npos:
        return -1.0
    found = [row for row in rows if row["category_id"] == category]
    confidence = np.array([row["score"] for row in found])
    order = np.argsort(-confidence, kind="stable")
    tp, fp = np.zeros(len(found)), np.zeros(len(found))
    for d, index in enumerate(order):
        x, y, w, h = found[index]["bbox"]
        bb = np.array([x + 1, y + 1, x + w, y + h])
        boxes, hard, det = class_recs[found[index]["image_id"]]
        ovmax, jmax = -np.inf, -1
        if boxes.size:
            iw = np.maximum(np.minimum(boxes[:, 2], bb[2]) - np.maximum(boxes[:, 0], bb[0]) + 1.0, 0.0)
            ih = np.maximum(np.minimum(boxes[:, 3], bb[3]) - np.maximum(boxes[:, 1], bb[1]) + 1.0, 0.0)
            inters = iw * ih
            uni = (bb[2] - bb[0] + 1.0) * (bb[3] - bb[1] + 1.0)
            uni = uni + (boxes[:, 2] - boxes[:, 0] + 1.0) * (boxes[:, 3] - boxes[:, 1] + 1.0) - inters
            overlaps = inters / uni
            ovmax, jmax = overlaps.max(), int(overlaps.argmax())
        if ovmax > ovthresh:
            if not hard[jmax]:
                tp[d], fp[d] = (0.0, 1.0) if det[jmax] else (1.0, 0.0)
                det[jmax] = True
        else:
            fp[d] = 1.0
    fp, tp = np.cumsum(fp), np.cumsum(tp)
    rec, prec = tp / float(npos), tp / np.maximum(tp + fp, np.finfo(np.float64).eps)
    if use_07_metric:
        ap = 0.0
        for t in np.arange(0.0, 1.1, 0.1):
            ap = ap + (0 if np.sum(rec >= t) == 0 else np.max(prec[rec >= t])) / 11.0
        return float(ap)
    mrec, mpre = np.concatenate(([0.0], rec, [1.0])), np.concatenate(([0.0], prec, [0.0]))
    for i in range(mpre.size - 1, 0, -1):
        mpre[i - 1] = np.maximum(mpre[i - 1], mpre[i])
    i = np.where(mrec[1:] != mrec[:-1])[0]
    return float(np.sum((mrec[i + 1] - mrec[i]) * mpre[i + 1]))


def random_voc(seed: int, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Whole pixels, as VOC's, difficult objects and no crowds."""
    truth, rows = random_truth(seed, **settings)
    rng = np.random.default_rng(seed)
    for one in truth["annotations"]:
        one |= {"difficult": int(rng.random() < 0.2), "iscrowd": 0, "bbox": [round(side) for side in one["bbox"]]}
    for row in rows:
        row["bbox"] = [round(side) for side in row["bbox"]]
    return truth, rows


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_devkit_and_py_faster_rcnn(seed):
    truth, rows = random_voc(seed, images=10, categories=4, objects=5, detections=40, ties=seed % 2 == 0)
    for year in (2007, 2012):
        metrics = evaluate(f"voc{year}", truth, rows)
        for category in truth["categories"]:
            ours = metrics.per_class[category["name"]]["AP"]
            assert ours == pytest.approx(voc_eval_det(truth, rows, category["id"], year), abs=1e-13)
            theirs = voc_eval(truth, rows, category["id"], year == 2007, np.nextafter(0.5, 0))
            assert ours == pytest.approx(theirs, abs=1e-13)
        valid = [values["AP"] for values in metrics.per_class.values() if values["AP"] >= 0]
        assert metrics.values["mAP"] == pytest.approx(np.mean(valid))
        assert metrics.to_json()[f"voc{year}"] == metrics.values


def test_a_recall_of_three_tenths_lies_below_the_devkits_fourth_point():
    """0.3 < 3 * 0.1: the devkit, and np.arange(0, 1.1, 0.1), give 3 of 11 points here, arange(11) / 10 gives 4."""
    truth = one_object()
    truth["annotations"] = [{**truth["annotations"][0], "id": 1 + n, "bbox": [100 * n, 10, 50, 50]} for n in range(10)]
    rows = [{**HIT, "bbox": truth["annotations"][n]["bbox"]} for n in range(3)]
    for one in truth["annotations"]:
        one["difficult"] = 0
    assert evaluate("voc2007", truth, rows).values["mAP"] == pytest.approx(3 / 11)
    assert voc_eval_det(truth, rows, 3, 2007) == pytest.approx(3 / 11)


def test_overlap_and_number_of_detections_can_be_set():
    shifted = {**HIT, "bbox": [10, 10, 50, 30]}  # IoU 0.6
    protocol = make_protocol("voc2012", ious=[0.5, 0.7], max_detections=[1])
    metrics = evaluate(protocol, one_object(), [shifted, {**HIT, "score": 0.1}])
    assert metrics.values == {"mAP": 0.5, "mAP50": 1.0, "mAP70": 0.0}
    assert metrics.per_class["dog"] == {"AP": 0.5, "AP50": 1.0, "AP70": 0.0}
    with pytest.raises(UserError, match="voc2012 has its own areas, which cannot be set"):
        make_protocol("voc2012", areas={"tiny": (0, 10)})


def test_crowds_are_no_part_of_voc():
    with pytest.raises(UserError, match=r"mark crowds \(iscrowd\), which voc2007 has no rule for; measure by coco"):
        evaluate("voc2007", one_object(iscrowd=1), [HIT])


def one_object(**changes: Any) -> dict[str, Any]:
    annotation = {"id": 1, "image_id": 5, "category_id": 3, "bbox": [10, 10, 50, 50], "area": 2500, **changes}
    images = [{"id": 5, "file_name": "JPEGImages/000005.jpg"}]
    categories = [{"id": 3, "name": "dog"}, {"id": 4, "name": "cat"}]
    return {"images": images, "categories": categories, "annotations": [annotation]}


HIT = {"image_id": 5, "category_id": 3, "bbox": [10, 10, 50, 50], "score": 0.9}


def test_a_second_look_at_an_object_is_wrong_and_a_difficult_one_is_ignored():
    assert evaluate("voc2007", one_object(), [HIT]).per_class == {"dog": {"AP": pytest.approx(1)}, "cat": {"AP": -1}}
    assert evaluate("voc2012", one_object(), [HIT, {**HIT, "score": 0.95}]).values["mAP"] == 1
    early = [HIT, {**HIT, "bbox": [200, 200, 9, 9], "score": 0.95}]
    assert evaluate("voc2012", one_object(), early).values["mAP"] == 0.5
    assert evaluate("voc2007", one_object(difficult=1), [HIT]).values["mAP"] == -1
    assert evaluate("voc2007", one_object(), []).values["mAP"] == 0
    with pytest.raises(UserError, match=r"must be one of coco, voc2007, .* received voc"):
        evaluate("voc", one_object(), [HIT])


def test_result_files_hold_inclusive_pixels_from_one(tmp_path):
    names = write_voc_files(str(tmp_path), one_object(), [HIT])
    assert names == ("comp4_det_test_dog.txt", "comp4_det_test_cat.txt")
    assert (tmp_path / names[0]).read_text() == "000005 0.900000 11.0 11.0 60.0 60.0\n"
    assert (tmp_path / names[1]).read_text() == ""
