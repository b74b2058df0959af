"""Encoded images: what their headers say, tolerant decoding, the plain resize of evaluation, stacking to a tensor."""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

# EXIF orientation is ignored: the boxes of COCO and VOC refer to the stored pixels.
_DECODE = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE_MARKERS = frozenset(range(0xD0, 0xD9)) | {0x01, 0xFF}
_TOLERANCE = threading.Lock()  # Pillow's is a switch for the whole process
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class ImageHeader:
    extension: str
    """jpg or png"""
    width: int
    height: int
    complete: bool
    """the file has its end marker"""


def read_header(content: bytes) -> ImageHeader | None:
    """Kind and size of an encoded image without decoding it; None where it is no JPEG or PNG."""
    if content.startswith(_PNG) and len(content) >= 24:
        width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
        return ImageHeader("png", width, height, b"IEND" in content[-16:])
    if not content.startswith(b"\xff\xd8"):
        return None
    at = 2
    while at + 9 <= len(content):
        if content[at] != 0xFF:
            return None
        marker = content[at + 1]
        if marker in _STANDALONE_MARKERS:
            at += 1 if marker == 0xFF else 2
            continue
        if marker in _FRAME_MARKERS:
            height, width = (int.from_bytes(content[at + k : at + k + 2], "big") for k in (5, 7))
            # Cameras append padding and previews after the end marker, so it is looked for near the end, not at it.
            return ImageHeader("jpg", width, height, content.rfind(b"\xff\xd9", at) > 0) if width and height else None
        at += 2 + int.from_bytes(content[at + 2 : at + 4], "big")
    return None


def decode_image(content: bytes) -> tuple[np.ndarray | None, str | None]:
    """Decode to RGB uint8 [H, W, 3]; the second value says what was wrong with the file, None where nothing was.

    Grey, CMYK and progressive JPEG are ordinary. A file that the first decoder refuses gets a tolerant second try.
    """
    header = read_header(content)
    image = None
    with contextlib.suppress(cv2.error):
        image = cv2.imdecode(np.frombuffer(content, np.uint8), _DECODE)
    if image is not None:
        if header and not header.complete:
            return image, "the image file ends early; decoded as far as it goes"
        return image, None
    image = _decode_tolerantly(content)
    if image is not None:
        return image, "only a tolerant decoder could read the image"
    return None, f"not a readable image ({len(content)} bytes)"


def _decode_tolerantly(content: bytes) -> np.ndarray | None:
    from PIL import Image, ImageFile

    with _TOLERANCE:
        before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
        try:
            with Image.open(io.BytesIO(content)) as file:
                return np.array(file.convert("RGB"))
        except Exception:  # Pillow raises many kinds for a broken file, SyntaxError among them; the caller reports it
            return None
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


def resize_image(image: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Plain bilinear resize of uint8 [H, W, 3] to a square side or (height, width): how evaluation sees an image."""
    height, width = (size, size) if isinstance(size, int) else size
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)


def stack_images(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 images [H, W, 3] of one size to one uint8 tensor [B, 3, H, W], channels-last in memory."""
    # In a worker of a loader this writes to shared memory at once, where the batch would be copied to otherwise.
    return default_collate([torch.from_numpy(image) for image in images]).permute(0, 3, 1, 2)
