"""Encoded images of every kind a data set may hold."""

from __future__ import annotations

import io
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from refinedet.pipeline.data.images import decode_image, read_header, resize_image, stack_images


def picture(mode: str = "RGB", **options: object) -> bytes:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(cv2.resize(coarse, (64, 48), interpolation=cv2.INTER_CUBIC)).convert(mode)
    file = io.BytesIO()
    image.save(file, **{"format": "JPEG", "quality": 95, **options})
    return file.getvalue()


@pytest.fixture(scope="module")
def colours() -> np.ndarray:
    image, reason = decode_image(picture())
    assert reason is None
    assert image is not None
    return image.astype(int)


@pytest.mark.parametrize(
    ("content", "tolerance"),
    [
        (picture(progressive=True), 1),
        (picture("CMYK"), 30),
        (picture(format="PNG"), 12),
        (picture() + b"\0" * 700 + b"a preview", 0),
    ],
    ids=["progressive", "cmyk", "png", "trailing bytes"],
)
def test_every_kind_decodes_to_the_same_colours(colours: np.ndarray, content: bytes, tolerance: int) -> None:
    image, reason = decode_image(content)
    assert reason is None
    assert image is not None
    assert np.abs(image - colours).mean() <= tolerance
    header = read_header(content)
    assert header
    assert (header.width, header.height, header.complete) == (64, 48, True)


def test_grey_becomes_three_equal_channels() -> None:
    image, reason = decode_image(picture("L"))
    assert reason is None
    assert image is not None
    assert image.shape == (48, 64, 3)
    assert (image == image[..., :1]).all()


def test_exif_orientation_is_ignored() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image, _ = decode_image(picture(exif=exif))
    assert image is not None
    assert image.shape == (48, 64, 3)


@pytest.mark.parametrize("part", [0.75, 0.9, 0.999])
def test_an_image_that_ends_early_is_decoded_as_far_as_it_goes_and_said(colours: np.ndarray, part: float) -> None:
    content = picture()
    image, reason = decode_image(content[: int(len(content) * part)])
    assert image is not None
    assert reason
    assert np.abs(image[:16, :16] - colours[:16, :16]).mean() < 2
    header = read_header(content[: int(len(content) * part)])
    assert header
    assert not header.complete


@pytest.mark.parametrize("content", [b"", b"\xff\xd8", b"not an image at all" * 9, picture()[:60], b"\xff" * 500])
def test_what_is_no_image_is_said_and_never_raises(content: bytes) -> None:
    image, reason = decode_image(content)
    assert image is None
    assert reason
    assert read_header(content) is None


def test_a_flipped_bit_never_raises() -> None:
    content = picture()
    for at in range(0, len(content), 7):
        damaged = bytearray(content)
        damaged[at] ^= 16
        image, reason = decode_image(bytes(damaged))
        assert (image is None) <= bool(reason)
        read_header(bytes(damaged))


def test_stacking_keeps_pixels_and_is_channels_last(jpeg: Callable[..., bytes]) -> None:
    images = [decode_image(jpeg(48, side))[0] for side in (64, 80)]
    squares = [resize_image(image, 32) for image in images if image is not None]
    batch = stack_images(squares)
    assert batch.shape == (2, 3, 32, 32)
    assert batch.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_array_equal(batch[1].permute(1, 2, 0).numpy(), squares[1])


def test_resize_takes_height_before_width() -> None:
    assert resize_image(np.zeros((10, 20, 3), np.uint8), (30, 50)).shape == (30, 50, 3)
