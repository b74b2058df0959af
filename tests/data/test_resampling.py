"""Summing lines gives what OpenCV gives for the whole canvas."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from refinedet.pipeline.data import resampling
from refinedet.pipeline.data.augmentation import INTERPOLATIONS, MEAN_RGB
from refinedet.pipeline.data.randomness import keyed_generator
from refinedet.pipeline.data.resampling import Border, find_taps, resize_bordered

NAMES = {
    cv2.INTER_LINEAR: "linear",
    cv2.INTER_AREA: "area",
    cv2.INTER_NEAREST_EXACT: "nearest",
    cv2.INTER_CUBIC: "cubic",
    cv2.INTER_LANCZOS4: "lanczos",
}


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def largest_difference(image: np.ndarray, border: Border, size: int, interpolation: int) -> int:
    """Between our view and OpenCV's of the canvas, in levels."""
    canvas = cv2.copyMakeBorder(image, *border, cv2.BORDER_CONSTANT, value=MEAN_RGB)
    expected = cv2.resize(canvas, (size, size), interpolation=interpolation)
    view = resize_bordered(image, border, MEAN_RGB, size, interpolation)
    assert view.shape == expected.shape
    assert view.dtype == np.uint8
    return int(np.abs(view.astype(int) - expected).max())


@pytest.mark.parametrize("interpolation", INTERPOLATIONS, ids=NAMES.get)
@pytest.mark.parametrize("size", [96, 128, 333])
def test_sums_equal_opencv(monkeypatch: pytest.MonkeyPatch, interpolation: int, size: int) -> None:
    monkeypatch.setattr(resampling, "_is_slow", lambda *_: True)
    # OpenCV computes in fixed point here, and may round to the neighbour.
    allowed = 0 if interpolation == cv2.INTER_NEAREST_EXACT else 1
    compared = 0
    for seed in range(40):
        rng = keyed_generator("sums", seed)
        height, width = (int(side) for side in rng.integers(1, 300, 2))
        top, bottom, left, right = (int(pixels) for pixels in rng.integers(0, 400, 4) * (rng.random(4) < 0.7))
        if interpolation == cv2.INTER_AREA and min(top + height + bottom, left + width + right) < size:
            continue  # no area interpolation in OpenCV
        border = (top, bottom, left, right)
        assert largest_difference(noise(height, width, seed), border, size, interpolation) <= allowed, (seed, border)
        compared += 1
    assert compared > 10


@pytest.mark.parametrize("interpolation", INTERPOLATIONS, ids=NAMES.get)
@pytest.mark.parametrize(
    ("height", "width", "border"),
    [
        (40, 60, (0, 0, 0, 0)),
        (300, 400, (0, 0, 0, 0)),
        (40, 60, (3, 0, 0, 9)),
        (150, 200, (100, 300, 20, 250)),  # large enough for sums
        (100, 600, (0, 1, 700, 0)),
        (1, 1, (0, 0, 0, 0)),
        (1, 1, (900, 200, 300, 800)),  # between the lines that sparse interpolations look at
        (2, 500, (0, 0, 0, 0)),
    ],
)
def test_any_way_taken_equals_opencv(interpolation: int, height: int, width: int, border: Border) -> None:
    allowed = 0 if interpolation == cv2.INTER_NEAREST_EXACT else 1
    assert largest_difference(noise(height, width), border, 128, interpolation) <= allowed


@pytest.mark.parametrize("interpolation", INTERPOLATIONS, ids=NAMES.get)
def test_border_alone_is_plain(interpolation: int) -> None:
    nothing = np.empty((0, 7, 3), np.uint8)
    assert (resize_bordered(nothing, (30, 20, 1, 9), MEAN_RGB, 64, interpolation) == MEAN_RGB).all()
    same = np.full((50, 70, 3), MEAN_RGB, np.uint8)
    assert (resize_bordered(same, (200, 300, 0, 250), MEAN_RGB, 64, interpolation) == MEAN_RGB).all()


@pytest.mark.parametrize("interpolation", [i for i in INTERPOLATIONS if i != cv2.INTER_NEAREST_EXACT], ids=NAMES.get)
def test_weights_keep_the_centre_of_mass(interpolation: int) -> None:
    """Line i of the view is centred on (i + 1/2) E / S - 1/2 of E lines: nothing is shifted."""
    size, extent = 90, 250
    taps, weights = find_taps(interpolation, size, extent)
    centre = (taps * weights).sum(1) / weights.sum(1)
    tolerance = 1e-4 if interpolation == cv2.INTER_LINEAR else 0.12  # only linear reproduces a slope exactly
    np.testing.assert_allclose(centre, (np.arange(size) + 0.5) * extent / size - 0.5, atol=tolerance)


def test_the_argument_is_left_as_it_is() -> None:
    image = noise(60, 80)
    before = image.copy()
    for interpolation in INTERPOLATIONS:
        resize_bordered(image[5:50, 9:70], (100, 200, 100, 200), MEAN_RGB, 96, interpolation)
    np.testing.assert_array_equal(image, before)
