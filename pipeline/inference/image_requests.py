"""Images that anybody may send to a server: limits, strict decoding, and the answer about each.

Both servers use it: `refinedet serve`, and MLflow's with a packaged model. The file travels inside that package, so it
imports nothing of `refinedet`.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

MAX_BODY_BYTES = 32 * 2**20
MAX_IMAGES = 64
MAX_ENCODED_BYTES = 20 * 2**20
MAX_SENT_PIXELS = 25_000_000
MAX_BATCH = 64
IMAGE_TYPES = ("image/jpeg", "image/png", "image/webp", "image/bmp", "application/octet-stream")
DEFAULT_THRESHOLD = 0.05
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")
_FORMS = ("inputs", "instances", "dataframe_records", "dataframe_split")
_ROWS = 'The input must be rows with "image", as in {"inputs": [{"image": "<base64>"}]}.'


class RequestError(ValueError):
    """A request that is refused: one sentence for who sent it, and the HTTP status."""

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        self.status = status


def check_threshold(value: Any) -> float:
    """A score threshold as a float. Raises RequestError unless it is a number in [0, 1]."""
    if not _is_number(value) or not (math.isfinite(value) and 0 <= value <= 1):
        raise RequestError(f"score_threshold must be a number in [0, 1], received {_shown(value)}.")
    return float(value)


def check_batch_size(value: Any) -> int:
    """A batch size as an int. Raises RequestError unless it is a whole number in [1, MAX_BATCH]."""
    if not _is_number(value) or not 1 <= value <= MAX_BATCH or value != value // 1:
        raise RequestError(f"batch_size must be a whole number in [1, {MAX_BATCH}], received {_shown(value)}.")
    return int(value)


def check_body_size(num_bytes: int) -> None:
    """Raise RequestError, status 413, where a body is too large; call before more of it is read."""
    if num_bytes > MAX_BODY_BYTES:
        raise RequestError(f"A request may have {MAX_BODY_BYTES} bytes, received {num_bytes} or more; send less.", 413)


def parse_request(body: bytes, content_type: str, threshold: str | None) -> tuple[list[bytes], float]:
    """Encoded images and the score threshold of a request.

    body          one encoded image, or JSON: {"inputs": [{"image": "<base64>"}, ...], "params": {"score_threshold": x}}
                  or the same in another form of MLflow's servers
    content_type  of `IMAGE_TYPES`, or application/json
    threshold     of the query; JSON's own comes first
    returns       images whose headers are within the limits; nothing is decoded
    """
    kind = content_type.partition(";")[0].strip().lower()
    if kind == "application/json":
        rows, params = _parse_document(body)
        if "batch_size" in params:  # of MLflow's server; here the batches are those of the server
            check_batch_size(params["batch_size"])
        images, number = list_sent_images(rows), params.get("score_threshold", threshold)
    elif kind in IMAGE_TYPES:
        images, number = [body], threshold
    else:
        types = ", ".join(("application/json", *IMAGE_TYPES))
        raise RequestError(f"Content-Type must be one of {types}, received {_shown(content_type)}.", 415)
    encoded = [encoded_bytes(image, f"image {index}") for index, image in enumerate(images)]
    for index, image in enumerate(encoded):
        check_header(image, f"image {index}")
    return encoded, DEFAULT_THRESHOLD if number is None else check_threshold(_as_number(number))


def list_sent_images(rows: Any) -> list[Any]:
    """The images of a table with a column `image`, or of rows [{"image": ...}]; at most MAX_IMAGES."""
    try:
        if hasattr(rows, "columns") or isinstance(rows, dict):
            images = _flat(rows["image"])
        else:
            images = [image for row in rows for image in _flat([row["image"]])]
    except (KeyError, TypeError, IndexError):
        raise RequestError(_ROWS) from None
    if not 1 <= len(images) <= MAX_IMAGES:
        raise RequestError(f"Between 1 and {MAX_IMAGES} images a request, received {len(images)}; send it in parts.")
    check_body_size(sum(len(image) for image in images if isinstance(image, str | bytes)))
    return images


def encoded_bytes(image: Any, name: str) -> bytes:
    """The bytes of an image file, also from base64; RequestError where there are too many, or it is no base64."""
    if isinstance(image, str):
        if len(image) > MAX_ENCODED_BYTES * 4 // 3 + 4:
            raise RequestError(f"{name} has {len(image)} characters; at most {MAX_ENCODED_BYTES} bytes in base64.", 413)
        try:
            image = base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(f"{name} is no base64 text; encode the file's bytes in base64.") from None
    if not isinstance(image, bytes | bytearray | memoryview):
        raise RequestError(f"{name} must be the bytes of a file in base64, received {type(image).__name__}.")
    if len(image) > MAX_ENCODED_BYTES:
        raise RequestError(f"{name} has {len(image)} bytes; at most {MAX_ENCODED_BYTES}.", 413)
    return bytes(image)


def check_header(content: bytes, name: str) -> int:
    """Pixels of an encoded image, from its header alone. Raises RequestError where there are too many, or none."""
    with _open(content, name) as image:
        return image.size[0] * image.size[1]


def decode_sent_image(image: Any, name: str, exif: str) -> np.ndarray:
    """uint8 [H, W, 3] RGB of a file's bytes, of base64 or of an array.

    exif  of photos with a rotation, as `RefineDet.exif`
    Raises RequestError for what is no image, or is beyond the limits, before it is decoded.
    """
    if isinstance(image, str | bytes | bytearray | memoryview):
        return _decode_bytes(encoded_bytes(image, name), name, exif)
    try:
        array = np.asarray(image)
    except ValueError:  # lists of uneven lengths
        raise RequestError(f"{name} must be uint8 [H, W, 3], received lists of uneven lengths.") from None
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise RequestError(f"{name} must be uint8 [H, W, 3], received {array.dtype} {list(array.shape)}.")
    _check_size(array.shape[1], array.shape[0], name)
    return array


def describe_objects(
    boxes: Sequence, scores: Sequence[float], labels: Sequence[int], categories: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The answer about one image; the id and name of label 1 are those of the first category."""
    found = [categories[label - 1] for label in labels]
    return {
        "boxes": boxes,
        "scores": scores,
        "labels": [category["id"] for category in found],
        "names": [category["name"] for category in found],
    }


def _decode_bytes(content: bytes, name: str, exif: str) -> np.ndarray:
    with _open(content, name) as image:
        turned = exif == "displayed" and image.format == "JPEG"
        try:
            image.load()  # raises for a file that is cut short, where OpenCV returns a grey rest
        except Exception:  # decoders raise many kinds for a broken file
            raise _unreadable(content, name) from None
    try:
        how = cv2.IMREAD_COLOR_RGB | (0 if turned else cv2.IMREAD_IGNORE_ORIENTATION)
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), how)
    except cv2.error:
        pixels = None
    if pixels is None:
        raise _unreadable(content, name)
    return pixels


def _open(content: bytes, name: str) -> Image.Image:
    """The image, of which Pillow reads the header alone."""
    try:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
    except Image.DecompressionBombError:
        raise RequestError(f"{name} has more than {MAX_SENT_PIXELS} pixels; send a smaller one.") from None
    except Exception:
        raise _unreadable(content, name) from None
    _check_size(*image.size, name)
    return image


def _unreadable(content: bytes, name: str) -> RequestError:
    return RequestError(f"{name}: {len(content)} bytes are no image that can be decoded; send a whole JPEG or PNG.")


def _check_size(width: int, height: int, name: str) -> None:
    if not 0 < width * height <= MAX_SENT_PIXELS:
        raise RequestError(f"{name} has {width} x {height} pixels; between 1 and {MAX_SENT_PIXELS} are accepted.")


def _parse_document(body: bytes) -> tuple[Any, dict[str, Any]]:
    """The rows, or columns, and the params of a JSON document in one of MLflow's forms."""
    content = _parse_json(body)
    params = content.pop("params", None) or {}
    unknown = sorted(set(content) - set(_FORMS))
    if unknown or len(content) != 1:
        raise RequestError(f"{_ROWS[:-1]}{f'; received the key {_shown(unknown[0])}' if unknown else ''}.")
    if not isinstance(params, dict):
        raise RequestError(f"params must be an object, received {_shown(params)}.")
    if strange := sorted(set(params) - {"score_threshold", "batch_size"}):
        raise RequestError(f"params may have score_threshold and batch_size, received {_shown(strange[0])}.")
    ((form, rows),) = content.items()
    return _rows_of_split(rows) if form == "dataframe_split" else rows, params


def _rows_of_split(table: Any) -> list[dict[str, Any]]:
    """Rows of pandas' split orientation, {"columns": ["image"], "data": [["<base64>"], ...]}."""
    try:
        columns = [str(column) for column in table["columns"]]
        return [dict(zip(columns, row, strict=True)) for row in table["data"]]
    except (KeyError, TypeError, ValueError):
        raise RequestError(
            'dataframe_split must have columns and data, as in {"columns": ["image"], "data": [["<base64>"]]}.'
        ) from None


def _parse_json(body: bytes) -> dict[str, Any]:
    try:
        content = json.loads(body.decode())  # of bytes it would also take UTF-16
    except (ValueError, RecursionError):  # not JSON, not UTF-8, a number of thousands of digits, too deep
        raise RequestError("The body is no JSON that can be read; send UTF-8 JSON of a few levels.") from None
    if not isinstance(content, dict):
        raise RequestError(_ROWS)
    return content


def _flat(images: Any) -> list[Any]:
    """Images one by one: MLflow hands a column over as a list, an array, or an array of one text in each row."""
    flat: list[Any] = []
    for image in [images] if isinstance(images, str | bytes) else images:
        texts = isinstance(image, list | np.ndarray) and len(image) and isinstance(image[0], str | bytes)
        flat += list(image) if texts else [image]
    return flat


def _as_number(value: Any) -> Any:
    """The number in a text of a query; anything else as it is."""
    try:
        return float(value) if isinstance(value, str) and len(value) < 40 else value
    except ValueError:
        return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _shown(value: Any) -> str:
    """A value in a message: at most 40 characters; a whole number of thousands of digits has no text."""
    try:
        return f"{value!r:.40}"
    except ValueError:
        return "a number of thousands of digits"
