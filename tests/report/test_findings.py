from __future__ import annotations

import numpy as np
import pytest
from refinedet.pipeline.inference.pictures import Boxes
from refinedet.pipeline.report.findings import finding_groups


@pytest.mark.parametrize(
    "found", [None, Boxes(np.array([[8.0, 40, 30, 60]]), np.array([1]), np.ones(1), np.ones(1, bool))]
)
def test_missed_objects_are_drawn_where_they_are(found: Boxes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Boxes] = []
    draw = "refinedet.pipeline.report.findings.draw_detections"
    original = finding_groups.__globals__["draw_detections"]
    monkeypatch.setattr(
        draw, lambda image, boxes, *more, **options: drawn.append(boxes) or original(image, boxes, *more, **options)
    )
    missed = [{"label": "dog", "bbox": [10, 20, 30, 5]}, {"label": "cat", "bbox": [50, 60, 4, 20]}]
    row = {"image_id": 7, "cost": 0.25, "num_false": 1, "num_missed": 2, "num_objects": 3, "missed": missed}
    (group,) = finding_groups(
        {"worst_images": [row]},
        {7: "photo.jpg"},
        lambda ids: dict.fromkeys(ids, np.zeros((100, 80, 3), np.uint8)),
        drawn={} if found is None else {7: found},
        class_names=["cat", "dog"],
    )
    (panel,) = group.panels
    assert panel.note == "costs 0.250 AP: 2 of 3 missed, 1 false alarm"
    (boxes,) = drawn
    before = 0 if found is None else 1
    assert boxes.boxes[before:].tolist() == [[10, 20, 40, 25], [50, 60, 54, 80]]
    assert boxes.labels[before:].tolist() == [2, 1]
    assert boxes.crowd is not None
    assert boxes.crowd.tolist() == [False] * before + [True, True]  # thin, without a name
