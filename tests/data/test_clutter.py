"""The harder drawn set: what its description promises, measured on its own pixels."""

import numpy as np
from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.clutter import CLUTTER, draw_clutter
from refinedet.pipeline.data.drawings import read_drawings

IMAGES = [draw_clutter(3, "train", index, 160) for index in range(120)]


def test_an_image_is_a_pure_function_of_seed_part_and_number():
    again = draw_clutter(3, "train", 7, 160)
    assert np.array_equal(again.image, IMAGES[7].image)
    assert again.annotations == IMAGES[7].annotations
    for other in (draw_clutter(4, "train", 7, 160), draw_clutter(3, "val", 7, 160), draw_clutter(3, "train", 8, 160)):
        assert other.image.shape != IMAGES[7].image.shape or not np.array_equal(other.image, IMAGES[7].image)


def test_twenty_classes_differ_by_outline_and_pattern_and_all_occur():
    assert len({(shape.outline, shape.fill == "plain") for shape in CLUTTER.values()}) == len(CLUTTER) == 20
    assert {entry["category_id"] for image in IMAGES for entry in image.annotations} == set(CLUTTER)


def test_counts_sizes_and_nesting_are_those_of_the_description():
    counts = [len(image.annotations) for image in IMAGES]
    assert 5 < np.mean(counts) < 7
    assert max(counts) <= 16
    sides = [max(e["bbox"][2:]) / min(i.image.shape[:2]) for i in IMAGES for e in i.annotations]
    assert 0.25 < np.mean(np.array(sides) < 0.2) < 0.45
    inside = 0
    for image in IMAGES:
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (entry["bbox"] for entry in image.annotations)]
        inside += sum(
            a != b and a[0] >= b[0] and a[1] >= b[1] and a[2] <= b[2] and a[3] <= b[3] for a in boxes for b in boxes
        )
    assert inside > 60


def test_every_object_is_seen_and_its_area_is_what_is_seen():
    for image in IMAGES:
        for entry in image.annotations:
            box = entry["bbox"][2] * entry["bbox"][3]
            assert 0.1 * box <= entry["area"] <= 1.1 * box


def test_the_spec_chooses_the_set():
    data = Data(format="shapes", drawing="clutter", image_size=64, train=(Split(count=3),))
    source = read_drawings(data, "train", 0, data.train[0])
    assert [category.name for category in source.categories] == [shape.name for shape in CLUTTER.values()]
    assert len(source.records) == 3
