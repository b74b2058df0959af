"""The detector as MLflow serves it: images in, boxes out. MLflow copies and runs this file ("models from code").

It must stand alone beside the packages `model` and its requirements: nothing of `pipeline` is imported.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from safetensors.torch import load_file


class ServedDetector(PythonModel):
    """`predict` takes images of any size, `[{"image": ...}, ...]` or a table with a column `image`.

    An image is encoded bytes (JPEG, PNG), the same in base64 (from JSON), or a uint8 array [H, W, 3] in RGB. For every
    image it returns
    {"boxes": [[x1, y1, x2, y2], ...] in pixels of that image, "scores": [...], "labels": [...], "names": [...]},
    most confident first; labels are the data set's own category ids. `params`: score_threshold, batch_size.
    """

    def load_context(self, context: Any) -> None:
        from refinedet.model import RefineDet, RefineDetConfig

        description = json.loads(Path(context.artifacts["description"]).read_text())
        self._categories = description["categories"]
        self._config = RefineDetConfig(**_with_tuples(description["config"]))
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._detector = RefineDet(self._config).eval()
        self._detector.load_state_dict(load_file(context.artifacts["weights"]))
        self._detector.to(self._device)

    # No type hint on the input: MLflow would take the signature from it, and none of its types says "image".
    def predict(self, context, model_input, params: dict[str, Any] | None = None):
        params = params or {}
        threshold, batch_size = params.get("score_threshold", 0.05), params.get("batch_size", 8)
        images = [_decode(image) for image in _images_of(model_input)]
        results: list[dict[str, Any]] = []
        for start in range(0, len(images), batch_size):
            results += self._detect(images[start : start + batch_size], threshold)
        return results

    def _detect(self, images: list[np.ndarray], threshold: float) -> list[dict[str, Any]]:
        side = self._config.input_size
        resized = np.stack([cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR) for image in images])
        batch = torch.from_numpy(resized).permute(0, 3, 1, 2).to(self._device)
        results = []
        for image, found in zip(images, self._detector.detect(batch), strict=True):
            height, width = image.shape[:2]
            keep = found.scores >= threshold
            scale = found.boxes.new_tensor([width, height, width, height]) / side
            limit = found.boxes.new_tensor([width, height, width, height])
            boxes = torch.minimum((found.boxes[keep] * scale).clamp(min=0), limit)
            labels = found.labels[keep].tolist()
            results.append(
                {
                    "boxes": boxes.tolist(),
                    "scores": found.scores[keep].tolist(),
                    "labels": [self._categories[label - 1]["id"] for label in labels],
                    "names": [self._categories[label - 1]["name"] for label in labels],
                }
            )
        return results


def _images_of(model_input: Any) -> list[Any]:
    if hasattr(model_input, "columns") or isinstance(model_input, dict):
        return list(model_input["image"])
    return [row["image"] for row in model_input]


def _decode(image: Any) -> np.ndarray:
    """uint8 [H, W, 3] RGB. EXIF orientation is ignored, as COCO's boxes do."""
    if isinstance(image, str):
        image = base64.b64decode(image)
    if isinstance(image, bytes | bytearray):
        pixels = cv2.imdecode(np.frombuffer(image, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            raise ValueError(f"{len(image)} bytes are no image that can be decoded; send a JPEG or PNG.")
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"An image must be uint8 [H, W, 3], received {array.dtype} {list(array.shape)}.")
    return array


def _with_tuples(config: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; the frozen configuration has no lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}


set_model(ServedDetector())
