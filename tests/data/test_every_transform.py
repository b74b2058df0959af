"""Laws of every entry of TRANSFORMS, of those that are off by default too."""

from __future__ import annotations

import numpy as np
import pytest
from refinedet.pipeline.data.augmentation import TRANSFORMS, Picture, augment

from tests.data.streams import PLAIN


@pytest.mark.parametrize("part", TRANSFORMS)
@pytest.mark.parametrize(("width", "height", "objects"), [(60, 40, 1), (1, 1, 1), (1, 90, 0), (90, 1, 2), (60, 40, 0)])
def test_each_transform_is_a_function_of_its_key_and_leaves_its_arguments(
    part: str, width: int, height: int, objects: int
) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    boxes = np.array([[0, 0, width, height], [0, 0, 1, 1]], np.float32)[:objects]
    labels = np.arange(1, objects + 1)
    before = image.copy(), boxes.copy()
    other = Picture(image[::-1].copy(), boxes, labels)
    settings = PLAIN.model_copy(update={part: True})

    def view(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return augment(image, boxes, labels, size=32, key=(seed,), settings=settings, companions=lambda: [other] * 3)

    views = [view(seed) for seed in range(30)]
    for seed, (pixels, moved, kept) in enumerate(views):
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        assert len(moved) == len(kept)
        assert ((moved >= 0) & (moved <= 32)).all()
        assert (moved[:, :2] < moved[:, 2:]).all()
        for found, again in zip(view(seed), (pixels, moved, kept), strict=True):
            np.testing.assert_array_equal(found, again)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(boxes, before[1])
    if objects and width == 60:  # the switch does something
        assert any((pixels != views[0][0]).any() for pixels, _, _ in views[1:])
