"""Pixels and boxes stay together through every transform; what is drawn follows section 4 of the release."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from refinedet.pipeline.config.spec import Augmentation
from refinedet.pipeline.data.augmentation import (
    INTERPOLATIONS,
    MEAN_RGB,
    MIN_IOUS,
    NUM_TRIALS,
    TRANSFORMS,
    Picture,
    ViewPlan,
    Window,
    augment,
    crop_window,
    distort,
    expand_window,
    jitter_window,
    join_tiles,
    mirror_boxes,
    project_boxes,
)
from refinedet.pipeline.data.randomness import keyed_generator

from tests.data.streams import PLAIN

HEIGHT, WIDTH, SIZE = 150, 210, 256


def marked_image(box: tuple[int, int, int, int]) -> np.ndarray:
    """Black, with one white rectangle exactly as large as its box."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    return image


def edges_of_marker(image: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Places of the marker's four edges, to a fraction of a pixel: its profile from the middle out, at half height."""
    bright = image[..., 0].astype(np.float64)
    bright[(image != image[..., :1]).any(-1)] = 0  # the mean border is not grey
    x1, y1, x2, y2 = box
    column, row = int((x1 + x2) / 2), int((y1 + y2) / 2)
    right, bottom = bright[row, column:], bright[row:, column]
    left, top = bright[row, : column + 1][::-1], bright[: row + 1, column][::-1]
    return np.array([column + 1 - reach(left), row + 1 - reach(top), column + reach(right), row + reach(bottom)])


def reach(profile: np.ndarray) -> float:
    """Pixels from the outer side of the first one to where the profile falls below half of white."""
    below = np.nonzero(profile < 127.5)[0]
    if not len(below):
        return float(len(profile))
    last = below[0] - 1
    high, low = profile[last], profile[last + 1]
    return last + 0.5 + (high - 127.5) / (high - low)  # pixel centres lie at halves


def check_alignment(settings: Augmentation, seed: int) -> bool:
    rng = keyed_generator("marker", seed)
    side = rng.integers(20, 80, 2)
    corner = rng.integers(12, (WIDTH, HEIGHT) - side - 12)  # clear of the mean border
    box = (*corner.tolist(), *(corner + side).tolist())
    boxes = np.array([box], np.float32)
    image, moved, labels = augment(marked_image(box), boxes, np.array([3]), size=SIZE, key=(seed,), settings=settings)
    assert image.shape == (SIZE, SIZE, 3)
    assert len(moved) == len(labels)
    if not len(moved):
        return False
    x1, y1, x2, y2 = moved[0]
    assert 0 <= x1 < x2 <= SIZE
    assert 0 <= y1 < y2 <= SIZE
    if min(x2 - x1, y2 - y1) < 8:
        return False
    inside = (moved[0] > 1) & (moved[0] < SIZE - 1)  # an edge at the border may be one that the crop made
    error = np.abs(edges_of_marker(image, moved[0]) - moved[0])
    assert (error[inside] <= 0.5 + 1e-3).all(), (seed, moved[0], error)
    return True


RECOLOURING = {"distort"}  # so that a marker's edges cannot be found
OF_SEVERAL = {"mosaic"}  # has a test of its own


@pytest.mark.parametrize("part", sorted(TRANSFORMS.keys() - RECOLOURING - OF_SEVERAL))
def test_boxes_follow_pixels_through_each_transform(part: str) -> None:
    settings = PLAIN.model_copy(update={part: True})
    least = 40 if part == "scale_jitter" else 75  # it makes many markers too small to look at
    assert sum(check_alignment(settings, seed) for seed in range(150)) > least


def test_boxes_follow_pixels_through_all_transforms() -> None:
    settings = Augmentation(distort=False)
    assert sum(check_alignment(settings, seed) for seed in range(400)) > 200


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("side", [60, 97, 300, 640])
def test_interpolations_do_not_shift(interpolation: int, side: int) -> None:
    box = (40, 30, 120, 100)
    resized = cv2.resize(marked_image(box), (side, side), interpolation=interpolation)
    expected = np.array(box) * np.array([side / WIDTH, side / HEIGHT] * 2)
    assert np.abs(edges_of_marker(resized, expected) - expected).max() <= 0.5


def test_the_same_sample_and_epoch_give_the_same_view() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    boxes, labels = np.array([[5, 5, 30, 30]], np.float32), np.array([1])

    def view(*key: int | str) -> np.ndarray:
        return augment(image, boxes, labels, size=32, key=key, settings=Augmentation())[0]

    np.testing.assert_array_equal(view(0, 1, "a"), view(0, 1, "a"))
    assert any((view(0, 1, "a") != view(0, 1, other)).any() for other in "bcd")


def test_cropping_first_gives_the_same_pixels_as_the_written_order() -> None:
    """expand, crop, resize, mirror one after the other on whole images, as the reference has it."""
    image = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    boxes = np.array([[20, 20, 120, 110], [130, 60, 200, 140]], np.float32)
    for seed in range(60):
        settings = Augmentation(distort=False)
        fast, *_ = augment(image, boxes, np.array([1, 2]), size=96, key=(seed,), settings=settings)
        slow = image
        canvas = Window(0, 0, WIDTH, HEIGHT)
        coin, ratio, x, y = keyed_generator("augment", "expand", seed).random(4)
        if coin < 0.5:
            canvas = expand_window(canvas, 1 + 3 * ratio, x, y)
            whole = np.empty((canvas.height, canvas.width, 3), np.uint8)
            whole[:] = MEAN_RGB
            whole[-canvas.top : HEIGHT - canvas.top, -canvas.left : WIDTH - canvas.left] = slow
            slow = whole
        rng = keyed_generator("augment", "crop", seed)
        crop = crop_window(canvas, boxes, rng.random(), rng.random((len(MIN_IOUS), NUM_TRIALS, 4)))
        left, top = crop.left - canvas.left, crop.top - canvas.top
        slow = slow[top : top + crop.height, left : left + crop.width]
        draw = keyed_generator("augment", "random_interpolation", seed).random()
        interpolation = INTERPOLATIONS[int(draw * 5)]
        slow = cv2.resize(slow, (96, 96), interpolation=interpolation)
        slow = slow[:, ::-1] if keyed_generator("augment", "mirror", seed).random() < 0.5 else slow
        rounding = 0 if interpolation == cv2.INTER_NEAREST_EXACT else 1  # fixed point against floating point
        assert np.abs(fast.astype(int) - slow.astype(int)).max() <= rounding


def test_a_transform_that_is_added_shifts_none_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    boxes, labels = np.array([[20, 20, 120, 110]], np.float32), np.array([1])
    drawn = []

    def extra(plan: ViewPlan, rng: np.random.Generator) -> ViewPlan:
        drawn.append(rng.random(7))
        return plan

    def view(seed: int) -> np.ndarray:
        switches: Any = SimpleNamespace(**Augmentation().model_dump(), extra=True)
        return augment(image, boxes, labels, size=64, key=(seed,), settings=switches)[0]

    before = [view(seed) for seed in range(20)]
    monkeypatch.setattr("refinedet.pipeline.data.augmentation.TRANSFORMS", {"extra": extra, **TRANSFORMS})
    after = [view(seed) for seed in range(20)]
    assert len(drawn) == 20
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_distortion_may_come_after_the_crop() -> None:
    image = np.random.default_rng(2).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    for seed in range(30):
        draws = keyed_generator(seed).random(9)
        first = distort(image, draws)[20:90, 31:150].astype(int)
        after = distort(image[20:90, 31:150], draws)
        # OpenCV rounds HSV otherwise in the last pixels of a row, and cropping changes which those are.
        assert np.abs(first - after).max() <= 2


def test_crops_meet_their_sampler() -> None:
    boxes = np.array([[30, 40, 90, 120], [100, 20, 200, 70]], np.float32)
    canvas = Window(0, 0, WIDTH, HEIGHT)
    counts = {"whole": 0, "crop": 0}
    for seed in range(500):
        rng = keyed_generator("crop", seed)
        window = crop_window(canvas, boxes, rng.random(), rng.random((len(MIN_IOUS), NUM_TRIALS, 4)))
        counts["whole" if window == canvas else "crop"] += 1
        assert 0 <= window.left <= window.left + window.width <= WIDTH
        assert 0 <= window.top <= window.top + window.height <= HEIGHT
        # Sides relative to the image: scale 0.3..1, aspect 0.5..2 (to a whole pixel).
        w, h = (window.width + 1) / WIDTH, (window.height + 1) / HEIGHT
        assert np.sqrt(w * h) * 1.02 >= 0.3
        assert 0.47 <= w / h <= 2.1
    # Seven candidates where all samplers succeed, one of them the whole image.
    assert 500 / 9 < counts["whole"] < 500 / 2


def test_crop_iou_is_against_any_box() -> None:
    boxes = np.array([[30, 40, 90, 120]], np.float32)
    canvas = Window(0, 0, WIDTH, HEIGHT)
    trials = keyed_generator("iou").random((len(MIN_IOUS), NUM_TRIALS, 4))
    choices = [crop_window(canvas, boxes, choice, trials) for choice in np.linspace(0, 0.999, 200)]
    ious = []
    for window in dict.fromkeys(choices):
        x1, y1 = max(window.left, 30), max(window.top, 40)
        x2, y2 = min(window.left + window.width, 90), min(window.top + window.height, 120)
        inside = max(x2 - x1, 0) * max(y2 - y1, 0)
        ious.append(inside / (window.width * window.height + 60 * 80 - inside))
    assert all(iou >= bound for iou, bound in zip(sorted(ious[:-2]), sorted(MIN_IOUS), strict=False))


def test_crops_are_those_of_trying_one_after_the_other() -> None:
    """The samplers as the reference writes them: loops over samplers, trials and boxes."""

    def iou(crop: Window, box: list[float]) -> float:
        w = min(crop.left + crop.width, box[2]) - max(crop.left, box[0])
        h = min(crop.top + crop.height, box[3]) - max(crop.top, box[1])
        inside = max(w, 0) * max(h, 0)
        return inside / (crop.width * crop.height + (box[2] - box[0]) * (box[3] - box[1]) - inside)

    def trial_crop(canvas: Window, trial: np.ndarray) -> Window:
        scale = 0.3 + 0.7 * trial[0]
        aspect = min(max(0.5 + 1.5 * trial[1], scale**2), 1 / scale**2)
        width = max(int(scale * aspect**0.5 * canvas.width), 1)
        height = max(int(scale / aspect**0.5 * canvas.height), 1)
        left = canvas.left + int(trial[2] * (canvas.width - width + 1))
        return Window(left, canvas.top + int(trial[3] * (canvas.height - height + 1)), width, height)

    for seed in range(40):
        rng = keyed_generator("trials", seed)
        canvas = Window(
            -int(rng.integers(50)), -int(rng.integers(50)), *(int(side) for side in rng.integers(80, 400, 2))
        )
        corner = rng.integers(0, 60, (int(rng.integers(1, 9)), 2))
        boxes = np.concatenate([corner, corner + rng.integers(1, 200, corner.shape)], 1).astype(np.float32)
        choice, trials = rng.random(), rng.random((len(MIN_IOUS), NUM_TRIALS, 4))
        candidates = []
        for least, sampler in zip(MIN_IOUS, trials, strict=True):
            crops = (trial_crop(canvas, trial) for trial in sampler)
            met = (crop for crop in crops if any(iou(crop, box) >= least for box in boxes.tolist()))
            candidates.extend([crop] if (crop := next(met, None)) else [])
        candidates.append(canvas)
        assert crop_window(canvas, boxes, choice, trials) == candidates[int(choice * len(candidates))]


def test_without_boxes_there_is_no_crop() -> None:
    canvas = Window(-3, -4, 300, 400)
    trials = np.full((len(MIN_IOUS), NUM_TRIALS, 4), 0.5)
    assert crop_window(canvas, np.zeros((0, 4), np.float32), 0.1, trials) == canvas


def test_boxes_whose_centre_is_outside_are_dropped_and_others_clipped() -> None:
    boxes = np.array([[0, 0, 40, 40], [30, 30, 70, 90], [0, 0, 100, 20]], np.float32)
    moved, labels = project_boxes(boxes, np.array([1, 2, 3]), Window(25, 25, 50, 50), (100, 100))
    assert labels.tolist() == [2]
    np.testing.assert_allclose(moved, [[10, 10, 90, 100]])


def test_mirroring_twice_is_identity() -> None:
    boxes = np.array([[1, 2, 30, 40], [5.5, 0, 99, 100]], np.float32)
    np.testing.assert_allclose(mirror_boxes(mirror_boxes(boxes, 100), 100), boxes)
    np.testing.assert_allclose(mirror_boxes(boxes, 100)[0], [70, 2, 99, 40])


def test_expansion_covers_one_to_four_times_with_the_image_anywhere_in_it() -> None:
    image = Window(0, 0, 64, 48)
    assert expand_window(image, 1, 0.7, 0.7) == image
    assert expand_window(image, 4, 0, 0) == Window(0, 0, 256, 192)
    assert expand_window(image, 4, 0.9999, 0.9999) == Window(-192, -144, 256, 192)


def test_scale_jitter_shows_a_tenth_to_twice_the_image() -> None:
    image = Window(0, 0, 64, 48)
    assert jitter_window(image, 1, 0.7, 0.7) == image
    assert jitter_window(image, 2, 0, 0) == Window(0, 0, 32, 24)
    assert jitter_window(image, 2, 0.9999, 0.9999) == Window(32, 24, 32, 24)
    assert jitter_window(image, 0.25, 0, 0) == Window(0, 0, 256, 192)
    assert jitter_window(image, 0.25, 0.9999, 0.9999) == Window(-192, -144, 256, 192)


COLOURS = {1: (255, 0, 0), 2: (0, 255, 0), 3: (0, 0, 255), 4: (255, 255, 0)}


def coloured_picture(label: int, rng: np.random.Generator) -> Picture:
    """A black picture of any size with one rectangle, of the label's colour, as large as its box."""
    width, height = rng.integers(60, 200, 2).tolist()
    sides = (rng.uniform(0.2, 0.7, 2) * (width, height)).astype(int)
    corner = rng.integers(0, (width, height) - sides)
    x1, y1, x2, y2 = (*corner.tolist(), *(corner + sides).tolist())
    image = np.zeros((height, width, 3), np.uint8)
    image[y1:y2, x1:x2] = COLOURS[label]
    return Picture(image, np.array([[x1, y1, x2, y2]], np.float32), np.array([label]))


def box_of_colour(image: np.ndarray, label: int) -> np.ndarray | None:
    """The pixels that are nearer to a colour than to black."""
    near = np.abs(image.astype(int) - COLOURS[label]).max(-1) < 128
    rows, columns = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]) if len(rows) else None


def test_boxes_follow_pixels_through_mosaic() -> None:
    kept = absent = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        pictures = [coloured_picture(label, rng) for label in COLOURS]
        width, height = rng.integers(80, 200, 2).tolist()
        meeting = tuple((rng.uniform(0.3, 0.7, 2) * (width, height)).astype(int).tolist())
        image, boxes, labels = join_tiles(pictures, (width, height), meeting, rng.random((4, 3)))
        assert image.shape == (height, width, 3)
        found = dict(zip(labels.tolist(), boxes, strict=True))
        for label in COLOURS:
            seen = box_of_colour(image, label)
            if label in found:
                assert seen is not None
                np.testing.assert_allclose(found[label], seen, atol=1)
                kept += 1
            else:  # cut: nothing of it is seen, or it continues beyond its tile
                edges = {0, 1, width - 1, width, height - 1, height}
                edges |= {side + by for side in meeting for by in (-1, 0, 1)}
                assert seen is None or edges & set(seen.tolist())
                absent += 1
    assert kept > 400
    assert absent > 50


def test_mosaic_shows_half_of_the_views_with_three_companions() -> None:
    picture = coloured_picture(1, np.random.default_rng(0))
    settings = PLAIN.model_copy(update={"mosaic": True})
    asked = []

    def companions() -> list[Picture]:
        asked.append(True)
        return [coloured_picture(label, np.random.default_rng(label)) for label in (2, 3, 4)]

    plain = augment(*picture, size=64, key=(0,), settings=PLAIN)
    shown, places = [], set()
    for seed in range(200):
        before = len(asked)
        view = augment(*picture, size=64, key=(seed,), settings=settings, companions=companions)
        alone = len(asked) == before  # others are read only where they are shown
        assert alone == all(np.array_equal(one, other) for one, other in zip(view, plain, strict=True))
        shown.append(not alone)
        again = augment(*picture, size=64, key=(seed,), settings=settings, companions=companions)
        assert all(np.array_equal(one, other) for one, other in zip(view, again, strict=True))
        if not alone and 1 in view[2]:
            centre = view[1][view[2].tolist().index(1)].reshape(2, 2).mean(0)
            places.add(tuple((centre > 32).tolist()))
    assert 75 < sum(shown) < 125
    assert len(places) == 4


def test_distortion_does_what_its_numbers_say() -> None:
    grey = np.full((4, 4, 3), 100, np.uint8)
    off = [1.0] * 9
    np.testing.assert_array_equal(distort(grey, np.array(off)), grey)
    brighter = distort(grey, np.array([0.0, 1.0, *off[2:]]))
    assert (brighter == 132).all()
    lower_contrast = distort(grey, np.array([1.0, 1.0, 0.0, 0.0, *off[4:]]))
    assert (lower_contrast == 50).all()
    # Brightness and contrast in either order of the other two: 100 + 32, then halved.
    for coin in (0.0, 1.0):
        both = distort(grey, np.array([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, coin]))
        assert (both == 66).all()


def test_hue_wraps_around_and_saturation_scales() -> None:
    red = np.full((2, 2, 3), (200, 0, 0), np.uint8)
    off = [1.0] * 9
    turned = [distort(red, np.array([*off[:6], 0.0, u, 1.0]))[0, 0] for u in (0.0, 0.9999)]
    for colour in turned:  # 36 degrees to either side of red: towards magenta and towards yellow
        assert colour[0] == 200
    assert turned[0][2] > 100
    assert turned[0][1] == 0
    assert turned[1][1] > 100
    assert turned[1][2] == 0
    paler = distort(red, np.array([*off[:4], 0.0, 0.0, *off[6:]]))[0, 0]
    assert abs(int(paler[1]) - 100) <= 2
