"""The detector as MLflow serves it: images in, boxes out. MLflow copies and runs this file ("models from code").

The file stands alone beside the packaged detector and its requirements: it imports nothing of `refinedet`.
"""

from __future__ import annotations

import base64
import binascii
import importlib
import io
import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from PIL import Image
from safetensors.torch import load_file

MAX_IMAGES = 64
MAX_ENCODED_BYTES = 20 * 2**20
MAX_PIXELS = 25_000_000
MAX_BATCH = 64
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


class ServedDetector(PythonModel):
    """`predict` takes images of any size, `[{"image": ...}, ...]` or a table with a column `image`.

    An image is encoded bytes (JPEG, PNG, WebP, BMP), the same in base64 (from JSON), or a uint8 array [H, W, 3] in RGB.
    For every image it returns
    {"boxes": [[x1, y1, x2, y2], ...] in pixels of that image, "scores": [...], "labels": [...], "names": [...]},
    most confident first; labels are the data set's own category ids.

    params: score_threshold in [0, 1]; batch_size in [1, 64].
    Limits: 64 images a request, 20 MiB an encoded image, 25 million pixels an image; checked before decoding.
    Raises MlflowException, invalid parameter value, which a server answers with status 400.
    """

    def load_context(self, context: Any) -> None:
        description = json.loads(Path(context.artifacts["description"]).read_text())
        # The package's name carries a digest of its sources: two models of different code share no module.
        package = importlib.import_module(description["package"])
        self._categories = description["categories"]
        self._detector = package.RefineDet(package.RefineDetConfig(**_with_tuples(description["config"]))).eval()
        self._detector.load_state_dict(load_file(context.artifacts["weights"]))
        self._detector.to("cuda" if torch.cuda.is_available() else "cpu")

    # No type hint on the input: MLflow would take the signature from it, and none of its types means "image".
    def predict(self, context, model_input, params: dict[str, Any] | None = None):
        threshold, batch_size = _checked_params(params or {})
        images = _images_of(model_input)
        views = (_view(image, f"image {index}") for index, image in enumerate(images))
        # One whole image is in memory at a time: the detector warps each as it comes.
        batches = (islice(views, batch_size) for _ in range(0, len(images), batch_size))
        return [self._answer(found, threshold) for batch in batches for found in self._detector.predict(batch)]

    def _answer(self, found: Any, threshold: float) -> dict[str, Any]:
        keep = found.scores >= threshold
        categories = [self._categories[label - 1] for label in found.labels[keep].tolist()]
        return {
            "boxes": found.boxes[keep].tolist(),
            "scores": found.scores[keep].tolist(),
            "labels": [category["id"] for category in categories],
            "names": [category["name"] for category in categories],
        }


def _checked_params(params: dict[str, Any]) -> tuple[float, int]:
    threshold, batch_size = params.get("score_threshold", 0.05), params.get("batch_size", 8)
    if not _is_number(threshold) or not (math.isfinite(threshold) and 0 <= threshold <= 1):
        raise _refusal(f"score_threshold must be a number in [0, 1], received {threshold!r:.40}.")
    if not _is_number(batch_size) or batch_size != batch_size // 1 or not 1 <= batch_size <= MAX_BATCH:
        raise _refusal(f"batch_size must be a whole number in [1, {MAX_BATCH}], received {batch_size!r:.40}.")
    return float(threshold), int(batch_size)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _images_of(model_input: Any) -> list[Any]:
    try:
        if hasattr(model_input, "columns") or isinstance(model_input, dict):
            images = _flat(model_input["image"])
        else:
            images = [image for row in model_input for image in _flat([row["image"]])]
    except (KeyError, TypeError, IndexError):
        raise _refusal('The input must be rows with "image", as in {"inputs": [{"image": "<base64>"}]}.') from None
    if len(images) > MAX_IMAGES:
        raise _refusal(f"At most {MAX_IMAGES} images a request, received {len(images)}; send several requests.")
    return images


def _flat(images: Any) -> list[Any]:
    """Images one by one: MLflow hands a column over as a list, an array, or an array of one text in each row."""
    flat: list[Any] = []
    for image in [images] if isinstance(images, str | bytes) else images:
        texts = isinstance(image, list | np.ndarray) and len(image) and isinstance(image[0], str | bytes)
        flat += list(image) if texts else [image]
    return flat


def _view(image: Any, name: str) -> torch.Tensor:
    """uint8 [3, H, W] RGB."""
    return torch.from_numpy(np.require(_decode(image, name), requirements=["C", "W"])).permute(2, 0, 1)


def _decode(image: Any, name: str) -> np.ndarray:
    """uint8 [H, W, 3] RGB. EXIF orientation is ignored, as COCO's boxes do."""
    if isinstance(image, str):
        if len(image) > MAX_ENCODED_BYTES * 4 // 3 + 4:
            raise _refusal(f"{name} has {len(image)} characters; at most {MAX_ENCODED_BYTES} bytes in base64.")
        try:
            image = base64.b64decode(image, validate=True)
        except (binascii.Error, ValueError):
            raise _refusal(f"{name} is no base64 text; encode the file's bytes in base64.") from None
    if isinstance(image, bytes | bytearray | memoryview):
        return _decode_bytes(bytes(image), name)
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise _refusal(f"{name} must be uint8 [H, W, 3], received {array.dtype} {list(array.shape)}.")
    _check_size(array.shape[1], array.shape[0], name)
    return array


def _decode_bytes(content: bytes, name: str) -> np.ndarray:
    if len(content) > MAX_ENCODED_BYTES:
        raise _refusal(f"{name} has {len(content)} bytes; at most {MAX_ENCODED_BYTES}.")
    unreadable = f"{name}: {len(content)} bytes are no image that can be decoded; send a whole JPEG or PNG."
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:  # reads the header alone
            _check_size(*image.size, name)
            image.load()  # raises for a file that is cut short, where OpenCV returns a grey rest
        pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    except MlflowException:
        raise
    except Image.DecompressionBombError:
        raise _refusal(f"{name} has more than {MAX_PIXELS} pixels; send a smaller one.") from None
    except Exception:  # decoders raise many kinds for bytes that are no image
        raise _refusal(unreadable) from None
    if pixels is None:
        raise _refusal(unreadable)
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _check_size(width: int, height: int, name: str) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise _refusal(f"{name} has {width} x {height} pixels; between 1 and {MAX_PIXELS} are accepted.")


def _refusal(sentence: str) -> MlflowException:
    return MlflowException.invalid_parameter_value(sentence)


def _with_tuples(config: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; the frozen configuration has no lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}


set_model(ServedDetector())
