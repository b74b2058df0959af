"""Validation images for the report: the truth beside what was found, chosen without looking at how well it went.

G objects, N detections of one image. Boxes are xyxy pixels of the original image.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from refinedet.pipeline.inference.pictures import Boxes, draw_detections
from refinedet.pipeline.report.findings import LoadImages, Panel, jpeg_uri

_MATCH_IOU = 0.5
_THRESHOLD_IMAGES = 200
_LOWEST_THRESHOLD = 0.1  # a detector that has learned little would cover its pictures
_MAX_DRAWN = 25
_LONGEST = 640


@dataclass(frozen=True)
class Gallery:
    rows: list[list[Panel]]
    """one row for each image: the truth, then every mode"""
    thresholds: dict[str, float]
    """mode -> score from which detections are drawn, as `choose_threshold` finds it"""
    num_threshold_images: int


def build_gallery(
    truth: Mapping[str, Any],
    detections: Mapping[str, Sequence[Mapping[str, Any]]],
    load_images: LoadImages,
    *,
    count: int,
    titles: Mapping[str, str],
) -> Gallery | None:
    """Draw `count` images, evenly spaced in the validation set; None where there is nothing to draw.

    truth       COCO instances
    detections  mode -> COCO result rows
    titles      of the modes
    """
    labels = {category["id"]: index for index, category in enumerate(_categories(truth), start=1)}
    names = [category["name"] for category in _categories(truth)]
    truths = _truth_by_image(truth, labels)
    ids = sorted(image["id"] for image in truth["images"])
    with_objects = [image_id for image_id in ids if len(truths[image_id].boxes)] or ids
    sampled = _evenly(with_objects, _THRESHOLD_IMAGES)
    shown = _evenly(with_objects, count)
    found = {mode: _found_by_image(rows, labels, {*sampled, *shown}) for mode, rows in detections.items() if rows}
    thresholds = {mode: choose_threshold([(truths[i], boxes[i]) for i in sampled]) for mode, boxes in found.items()}
    images = load_images(shown)
    rows = [
        _row(
            images[image_id], truths[image_id], {mode: boxes[image_id] for mode, boxes in found.items()},
            thresholds, names, titles,
        )
        for image_id in shown
        if image_id in images
    ]  # fmt: skip
    return Gallery(rows, thresholds, len(sampled)) if rows else None


def find_from(
    truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], image_ids: Sequence[int], score: float
) -> dict[int, Boxes]:
    """Detections of some images from a score on, at most a few of each; `matched` where they find an object."""
    labels = {category["id"]: index for index, category in enumerate(_categories(truth), start=1)}
    truths = _truth_by_image(truth, labels)
    shown = {}
    for image_id, boxes in _found_by_image(rows, labels, set(image_ids)).items():
        assert boxes.scores is not None
        keep = np.argsort(-boxes.scores, kind="stable")[: int((boxes.scores >= score).sum())][:_MAX_DRAWN]
        kept = Boxes(boxes.boxes[keep], boxes.labels[keep], boxes.scores[keep])
        if image_id in truths:
            shown[image_id] = replace(kept, matched=pair_boxes(truths[image_id], kept)[1])
    return shown


def pair_boxes(truth: Boxes, found: Boxes) -> tuple[np.ndarray, np.ndarray]:
    """Pair detections, most confident first, with the object of their class that they cover best, from IoU 0.5.

    Returns which objects were found [G] and which detections found one [N]. A detection of a crowd counts as right.
    """
    hit, right = np.zeros(len(truth.boxes), bool), np.zeros(len(found.boxes), bool)
    scores = found.scores if found.scores is not None else np.ones(len(found.boxes))
    crowd = truth.crowd if truth.crowd is not None else np.zeros(len(truth.boxes), bool)
    overlaps = _iou(found.boxes, truth.boxes)
    same = found.labels[:, None] == truth.labels[None, :]
    for index in np.argsort(-scores, kind="stable"):
        free = np.where(same[index] & (~hit | crowd), overlaps[index], 0.0)
        if len(free) and free.max() >= _MATCH_IOU:
            best = int(free.argmax())
            hit[best] = right[index] = True
    return hit | crowd, right


def choose_threshold(pairs: Sequence[tuple[Boxes, Boxes]]) -> float:
    """Score, from 0.1 up, at which F1 over `pairs` of truth and detections is best; 0.5 without anything to go by."""
    scores, rights, num_objects = [], [], 0
    for truth, found in pairs:
        num_objects += len(truth.boxes) - (0 if truth.crowd is None else int(truth.crowd.sum()))
        scores.append(found.scores if found.scores is not None else np.ones(len(found.boxes)))
        rights.append(pair_boxes(truth, found)[1])
    score = np.concatenate(scores) if scores else np.zeros(0)
    if not len(score) or not num_objects:
        return 0.5
    order = np.argsort(-score, kind="stable")
    num_right = np.cumsum(np.concatenate(rights)[order])
    f1 = 2 * num_right / (np.arange(1, len(order) + 1) + num_objects)
    return max(_LOWEST_THRESHOLD, float(np.floor(score[order][int(f1.argmax())] * 100) / 100))


def _row(
    image: np.ndarray,
    truth: Boxes,
    found: Mapping[str, Boxes],
    thresholds: Mapping[str, float],
    names: Sequence[str],
    titles: Mapping[str, str],
) -> list[Panel]:
    num_objects = len(truth.boxes) - int(truth.crowd.sum() if truth.crowd is not None else 0)
    panels = [Panel("Truth", _count(num_objects, "object"), _picture(image, truth, names))]
    for mode, boxes in found.items():
        scores = boxes.scores if boxes.scores is not None else np.ones(len(boxes.boxes))
        keep = scores >= thresholds[mode]
        kept = Boxes(boxes.boxes[keep], boxes.labels[keep], scores[keep])
        hit, right = pair_boxes(truth, kept)
        num_found = int(hit.sum()) - (len(truth.boxes) - num_objects)
        first = np.argsort(-scores[keep], kind="stable")[:_MAX_DRAWN]
        drawn = Boxes(kept.boxes[first], kept.labels[first], scores[keep][first], matched=right[first])
        note = f"{num_found} of {num_objects} found"
        if not right.all():
            note += f", {_count(int((~right).sum()), 'false alarm')}"
        if len(kept.boxes) > _MAX_DRAWN:
            note += f" (the first {_MAX_DRAWN} are drawn)"
        panels.append(Panel(titles[mode], note, _picture(image, drawn, names)))
    return panels


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _categories(truth: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(truth["categories"], key=lambda category: category["id"])


def _truth_by_image(truth: Mapping[str, Any], labels: Mapping[int, int]) -> dict[int, Boxes]:
    rows: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in truth["annotations"]:
        if row["category_id"] in labels:
            rows[row["image_id"]].append(row)
    return {
        image["id"]: Boxes(
            *_boxes(rows[image["id"]], labels),
            crowd=np.array([bool(row.get("iscrowd", 0)) for row in rows[image["id"]]], bool),
        )
        for image in truth["images"]
    }


def _found_by_image(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[int, int], image_ids: set[int]
) -> dict[int, Boxes]:
    kept: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["image_id"] in image_ids and row["category_id"] in labels:
            kept[row["image_id"]].append(row)
    return {
        image_id: Boxes(
            *_boxes(kept[image_id], labels), scores=np.array([row["score"] for row in kept[image_id]], np.float64)
        )
        for image_id in image_ids
    }


def _boxes(rows: Sequence[Mapping[str, Any]], labels: Mapping[int, int]) -> tuple[np.ndarray, np.ndarray]:
    xywh = np.array([row["bbox"] for row in rows], np.float64).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1), np.array(
        [labels[row["category_id"]] for row in rows], np.int64
    )


def _iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    inner = np.prod(np.maximum(high - low, 0), axis=2)
    area_first = np.prod(first[:, 2:] - first[:, :2], axis=1)[:, None]
    area_second = np.prod(second[:, 2:] - second[:, :2], axis=1)[None, :]
    return inner / np.maximum(area_first + area_second - inner, 1e-12)


def _evenly(values: Sequence[int], count: int) -> list[int]:
    if len(values) <= count:
        return list(values)
    return [values[int((index + 0.5) * len(values) / count)] for index in range(count)]


def _picture(image: np.ndarray, boxes: Boxes, names: Sequence[str]) -> str:
    return jpeg_uri(draw_detections(image, boxes, names), _LONGEST)
