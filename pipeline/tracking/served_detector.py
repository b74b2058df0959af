"""The detector as MLflow serves it: images in, boxes out. MLflow copies and runs this file ("models from code").

The file stands alone beside the packaged detector and its requirements: it imports nothing of `refinedet`.
"""

from __future__ import annotations

import importlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel
from safetensors.torch import load_file


class ServedDetector(PythonModel):
    """`predict` takes images of any size, `[{"image": ...}, ...]` or a table with a column `image`.

    An image is encoded bytes (JPEG, PNG, WebP, BMP), the same in base64 (from JSON), or a uint8 array [H, W, 3] in RGB.
    For every image it returns
    {"boxes": [[x1, y1, x2, y2], ...] in pixels of that image, "scores": [...], "labels": [...], "names": [...]},
    most confident first; labels are the data set's own category ids.

    params: score_threshold in [0, 1]; batch_size in [1, 64].
    Limits, checked before decoding: 64 images and 32 MiB per request, 20 MiB and 25 million pixels per image.
    Raises MlflowException, invalid parameter value, which a server answers with status 400.
    """

    def load_context(self, context: Any) -> None:
        description = json.loads(Path(context.artifacts["description"]).read_text())
        # The package's name carries a digest of its sources: two models of different code share no module.
        package = importlib.import_module(description["package"])
        self._requests = importlib.import_module(f"{description['package']}.image_requests")
        self._categories = description["categories"]
        config = package.RefineDetConfig(**_with_tuples(description["config"]))
        self._detector = package.RefineDet(config, exif=description["exif"]).eval()
        self._detector.load_state_dict(load_file(context.artifacts["weights"]))
        self._detector.to("cuda" if torch.cuda.is_available() else "cpu")

    # No type hint on the input: MLflow would take the signature from it, and none of its types means "image".
    def predict(self, context, model_input, params: dict[str, Any] | None = None):
        try:
            return self._predict(model_input, params or {})
        except self._requests.RequestError as error:
            raise Refusal.invalid_parameter_value(str(error)) from None

    def _predict(self, model_input: Any, params: dict[str, Any]) -> list[dict[str, Any]]:
        requests = self._requests
        threshold = requests.check_threshold(params.get("score_threshold", requests.DEFAULT_THRESHOLD))
        batch_size = requests.check_batch_size(params.get("batch_size", 8))
        images = requests.list_sent_images(model_input)
        views = (self._view(image, f"image {index}") for index, image in enumerate(images))
        # One whole image is in memory at a time: the detector warps each as it comes.
        batches = (islice(views, batch_size) for _ in range(0, len(images), batch_size))
        return [self._answer(found, threshold) for batch in batches for found in self._detector.predict(batch)]

    def _view(self, image: Any, name: str) -> torch.Tensor:
        """uint8 [3, H, W] RGB."""
        pixels = np.require(self._requests.decode_sent_image(image, name, self._detector.exif), requirements=["C", "W"])
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def _answer(self, found: Any, threshold: float) -> dict[str, Any]:
        keep = found.scores >= threshold
        columns = (column[keep].tolist() for column in (found.boxes, found.scores, found.labels))
        return self._requests.describe_objects(*columns, self._categories)


class Refusal(MlflowException):
    """An answer of one sentence: MLflow's server would put the whole input before it."""

    @property
    def message(self) -> str:
        return self._sentence

    @message.setter
    def message(self, text: str) -> None:
        self._sentence = getattr(self, "_sentence", text)


def _with_tuples(config: dict[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; the frozen configuration has no lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}


set_model(ServedDetector())
