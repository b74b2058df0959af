"""Encoded images: their headers, strict decoding, re-encoding, and the plain resize of evaluation.

A decoder that fills in what a damaged file lacks makes training data that no camera took. Every image is decoded
strictly: what libjpeg-turbo only warns of is a refusal, the chunks of a PNG must match their checksums, and a WebP
file must have its whole length. A lossy WebP file has no checksum: flipped bits inside it cannot be detected.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 100_000_000
"""of an image: a header that claims more is refused before a decoder takes the memory for it"""
EXTENSIONS = ("jpg", "png", "webp")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
"""of image files, in lower case"""
# EXIF orientation is ignored: the boxes of COCO and VOC refer to the stored pixels.
_DECODE = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE_MARKERS = frozenset(range(0xD0, 0xD9)) | {0x01, 0xFF}
_PNG = b"\x89PNG\r\n\x1a\n"
_QUALITY = 95  # of images that are encoded again


@dataclass(frozen=True)
class ImageHeader:
    extension: str
    """jpg, png or webp"""
    width: int
    height: int
    components: int = 3
    """colour components of a JPEG: 1 grey, 3 colour, 4 CMYK"""
    orientation: int = 1
    """EXIF's, of a JPEG: 1 as stored, 3 turned by 180 degrees, 6 and 8 by 90, even or 5 and 7 mirrored"""

    @property
    def displayed(self) -> tuple[int, int]:
        """(width, height) of the picture as viewers that follow EXIF display it."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(content: bytes) -> ImageHeader | None:
    """Kind and size of an encoded image without decoding it; None where it is no JPEG, PNG or WebP."""
    if content.startswith(_PNG) and len(content) >= 24:
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        return ImageHeader("png", width, height)
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return _read_webp_header(content)
    if not content.startswith(b"\xff\xd8"):
        return None
    at, orientation = 2, 1
    while at + 10 <= len(content):
        if content[at] != 0xFF:
            return None
        marker = content[at + 1]
        if marker in _STANDALONE_MARKERS:
            at += 1 if marker == 0xFF else 2
            continue
        size = int.from_bytes(content[at + 2 : at + 4], "big")
        if marker in _FRAME_MARKERS:
            height, width = (int.from_bytes(content[at + k : at + k + 2], "big") for k in (5, 7))
            return ImageHeader("jpg", width, height, content[at + 9], orientation) if width and height else None
        if marker == 0xE1 and content[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _read_orientation(content[at + 10 : at + 2 + size])
        at += 2 + size
    return None


def _read_webp_header(content: bytes) -> ImageHeader | None:
    # Pillow raises many kinds for a broken header.
    with contextlib.suppress(Exception), Image.open(io.BytesIO(content)) as image:
        return ImageHeader("webp", *image.size)
    return None


def _read_orientation(exif: bytes) -> int:
    """Tag 0x0112 of the first directory of an EXIF block; 1 where it has none."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(exif[:4])
    if order is None:
        return 1

    def number(at: int, size: int) -> int:
        return int.from_bytes(exif[at : at + size], order)  # type: ignore[arg-type]

    directory = number(4, 4)
    for at in range(directory + 2, directory + 2 + 12 * min(number(directory, 2), 512), 12):
        if number(at, 2) == 0x0112:
            return found if 1 <= (found := number(at + 8, 2)) <= 8 else 1
    return 1


def decode_image(content: bytes) -> tuple[np.ndarray | None, str | None]:
    """Decode strictly to RGB uint8 [H, W, 3]; None, and the reason, where a decoder does not finish the image.

    Grey, CMYK and progressive JPEG are ordinary.
    """
    header = read_header(content)
    if header is None:
        return None, f"not a JPEG, PNG or WebP image ({len(content)} bytes)"
    if not 0 < header.width * header.height <= MAX_PIXELS:
        return None, f"claims to have {header.width} x {header.height} pixels, more than {MAX_PIXELS:,}"
    try:
        if header.extension == "jpg" and header.components != 4:
            return simplejpeg.decode_jpeg(content, "RGB"), None
        if header.extension == "jpg":
            simplejpeg.decode_jpeg(content, "CMYK")  # the check alone: it does not convert to RGB
        elif header.extension == "png":
            with Image.open(io.BytesIO(content)) as image:
                image.verify()  # the checksums of all chunks
        elif len(content) < 8 + int.from_bytes(content[4:8], "little"):
            return None, "the image file ends early"
        image = cv2.imdecode(np.frombuffer(content, np.uint8), _DECODE)
    except Exception as error:  # Pillow raises many kinds for a broken file, SyntaxError among them
        return None, f"the decoder does not finish the image ({' '.join(str(error).split()):.120})"
    return (image, None) if image is not None else (None, "the decoder does not finish the image")


def encode_image(image: np.ndarray) -> bytes:
    """An RGB image as JPEG, the same bytes for the same pixels."""
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), _QUALITY, "RGB", "420")


def turn_upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """The picture as viewers that follow the EXIF orientation display it."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return np.ascontiguousarray(image)


def resize_image(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Plain bilinear resize of uint8 [H, W, 3] to a square side or (height, width): how evaluation sees an image."""
    height, width = (size, size) if isinstance(size, int) else size
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
