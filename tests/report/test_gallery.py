from __future__ import annotations

import numpy as np
import pytest
from refinedet.pipeline.inference.pictures import Boxes, class_colour, draw_detections
from refinedet.pipeline.report.gallery import choose_threshold, pair_boxes


def _boxes(rows, labels, scores=None, **more) -> Boxes:
    return Boxes(
        np.array(rows, float).reshape(-1, 4),
        np.array(labels, int),
        None if scores is None else np.array(scores),
        **more,
    )


def test_each_object_is_found_once_by_its_most_confident_detection():
    truth = _boxes([[0, 0, 10, 10], [20, 20, 30, 30]], [1, 2])
    found = _boxes([[0, 0, 10, 9], [0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 4, 4]], [1, 1, 1, 1], [0.5, 0.9, 0.8, 0.3])
    hit, right = pair_boxes(truth, found)
    assert hit.tolist() == [True, False]
    assert right.tolist() == [False, True, False, False]


def test_a_crowd_takes_any_number_and_is_never_missed():
    truth = _boxes([[0, 0, 10, 10]], [1], crowd=np.array([True]))
    hit, right = pair_boxes(truth, _boxes([[0, 0, 10, 10], [0, 0, 10, 9]], [1, 1], [0.9, 0.8]))
    assert hit.all()
    assert right.all()


def test_the_threshold_is_where_f1_is_best():
    truth = _boxes([[0, 0, 10, 10], [20, 20, 30, 30]], [1, 1])
    found = _boxes([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]], [1, 1, 1], [0.9, 0.62, 0.3])
    assert choose_threshold([(truth, found)]) == 0.62
    assert choose_threshold([]) == 0.5
    assert choose_threshold([(truth, _boxes([], [], []))]) == 0.5


def test_a_small_image_is_enlarged_and_a_large_one_keeps_its_size():
    found = _boxes([[1, 1, 9, 9]], [1], [0.9])
    assert draw_detections(np.zeros((16, 32, 3), np.uint8), found, ["disc"]).size == (640, 320)
    assert draw_detections(np.zeros((700, 900, 3), np.uint8), found, ["disc"]).size == (900, 700)


def test_drawing_changes_neither_its_image_nor_what_lies_below_the_threshold():
    image = np.full((64, 64, 3), 90, np.uint8)
    low = draw_detections(image, _boxes([[8, 8, 40, 40]], [1], [0.2]), ["disc"], score_threshold=0.3)
    high = draw_detections(image, _boxes([[8, 8, 40, 40]], [1], [0.4]), ["disc"], score_threshold=0.3)
    assert (image == 90).all()
    assert (np.asarray(low) == 90).all()
    assert (np.asarray(high) == class_colour(1)).all(axis=2).any()


@pytest.mark.parametrize(
    "box", [[-50, -50, -10, -10], [60, 60, 500, 500], [10, 10, 10, 10], [30, 30, 20, 20], [0, 0, 64, 0.5]]
)
def test_any_box_can_be_drawn(box):
    for matched in (None, np.array([False])):
        found = _boxes([box], [7], [0.9], matched=matched)
        assert draw_detections(np.zeros((64, 64, 3), np.uint8), found, {1: "disc"}).size == (640, 640)


def test_a_dashed_box_covers_less_than_a_solid_one():
    def painted(matched) -> int:
        boxes = _boxes([[8, 8, 56, 56]], [1], [0.9], matched=np.array([matched]))
        picture = np.asarray(draw_detections(np.zeros((64, 64, 3), np.uint8), boxes, ["x"]))
        return int((picture == class_colour(1)).all(axis=2).sum())

    assert painted(False) < 0.75 * painted(True)


def test_neighbouring_classes_differ_in_colour():
    colours = np.array([class_colour(label) for label in range(1, 81)], float)
    assert (np.linalg.norm(np.diff(colours, axis=0), axis=1) > 60).all()
