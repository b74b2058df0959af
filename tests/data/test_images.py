"""Encoded images of every kind a data set may hold."""

from __future__ import annotations

import io
from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from refinedet.pipeline.data.images import decode_image, read_header, resize_image, turn_upright
from refinedet.pipeline.data.tensors import stack_images


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
        (picture(format="WEBP"), 12),
        (picture() + b"\0" * 700 + b"a preview", 0),
    ],
    ids=["progressive", "cmyk", "png", "webp", "trailing bytes"],
)
def test_every_kind_decodes_to_the_same_colours(colours: np.ndarray, content: bytes, tolerance: int) -> None:
    image, reason = decode_image(content)
    assert reason is None
    assert image is not None
    assert np.abs(image - colours).mean() <= tolerance
    header = read_header(content)
    assert header
    assert (header.width, header.height) == (64, 48)


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
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_that_ends_early_is_refused(kind: str, part: float) -> None:
    content = picture(format=kind)
    image, reason = decode_image(content[: int(len(content) * part)])
    assert image is None
    assert reason


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("damage", ["flipped bits", "a zeroed block", "half a file with an end marker"])
def test_damage_that_a_tolerant_decoder_fills_in_is_refused(mode: str, damage: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(cv2.resize(noise, (640, 480))).convert(mode).save(file, format="JPEG", quality=90)
    content = bytearray(file.getvalue())
    assert decode_image(bytes(content))[1] is None
    scan = content.index(b"\xff\xda") + 20
    if damage == "flipped bits":
        for at in np.random.default_rng(1).choice(range(scan, len(content) - 2), 40, replace=False):
            content[at] ^= 1 << int(at) % 8
    elif damage == "a zeroed block":
        middle = (scan + len(content)) // 2
        content[middle : middle + 4096] = bytes(4096)
    else:
        content[len(content) // 2 :] = b"\xff\xd9"
    image, reason = decode_image(bytes(content))
    assert image is None
    assert reason


def test_a_header_of_too_many_pixels_is_refused_before_decoding() -> None:
    content = picture()
    at = content.index(b"\xff\xc0") + 5
    sides = (16_000).to_bytes(2, "big") * 2
    image, reason = decode_image(content[:at] + sides + content[at + 4 :])
    assert image is None
    assert "16000 x 16000 pixels" in (reason or "")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photo_is_turned_as_its_exif_orientation_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = picture(exif=exif)
    header, (image, _) = read_header(content), decode_image(content)
    assert header is not None
    assert image is not None
    assert header.orientation == orientation
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(content))))
    assert header.displayed == expected.shape[1::-1]
    np.testing.assert_array_equal(turn_upright(image, orientation), expected)


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
