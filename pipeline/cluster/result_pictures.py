"""Detections beside the truth as pictures in MLflow: of every validation during training, and of the evaluations."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.evaluation.shown_images import read_shown, shown_ids
from refinedet.pipeline.report.gallery import build_gallery
from refinedet.pipeline.report.shard_images import ShardImages
from refinedet.pipeline.runs import storage
from refinedet.pipeline.tracking.runs import RunTracker

logger = logging.getLogger(__name__)

_LONGEST = 320
"""side of a picture, pixels: MLflow keeps PNG files, of every validation"""


class ResultPictures:
    """Draws beside the job, in one thread; a fault is logged and costs the pictures alone."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="pictures")

    def log_validation(self, tracker: RunTracker, step: int, epochs_done: int) -> None:
        """Log what the ranks kept of the validation after `epochs_done` epochs."""
        part = self._run.spec.training.validate_on
        self._pool.submit(self._log, tracker, "validation", step, part, lambda: read_shown(self._run, epochs_done))

    def log_evaluation(self, tracker: RunTracker, mode: str, step: int) -> None:
        """Log the detections of a finished evaluation."""
        path = self._run.file("detections", f"{mode}.json")
        self._pool.submit(self._log, tracker, mode, step, "val", lambda: storage.read_json(path))

    def close(self) -> None:
        self._pool.shutdown(wait=True)

    def _log(self, tracker: RunTracker, name: str, step: int, part: str, read_rows: Any) -> None:
        try:
            truth = storage.read_json(self._run.ground_truth(part))
            images = ShardImages(storage.join(self._run.shards, part), [image["id"] for image in truth["images"]])
            shown = set(shown_ids([row["image_id"] for row in truth["annotations"]], self._run.spec))
            rows = [row for row in read_rows() if row["image_id"] in shown]
            truth["images"] = [image for image in truth["images"] if image["id"] in shown]
            truth["annotations"] = [row for row in truth["annotations"] if row["image_id"] in shown]
            for file_name, picture in _draw(truth, rows, images).items():
                tracker.log_picture(f"{name}/{file_name}", step, picture)
        except Exception:  # pictures are worth less than the job
            logger.exception("the pictures of %s could not be drawn", name)


def _draw(truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], images: ShardImages) -> dict[str, np.ndarray]:
    """File name -> truth and detections side by side, uint8 [H, W, 3] RGB."""
    gallery = build_gallery(truth, {"found": rows}, images, count=len(truth["images"]), titles={"found": "found"})
    names = [str(image["file_name"]) for image in sorted(truth["images"], key=lambda image: image["id"])]
    if gallery is None or len(gallery.rows) != len(names):
        return {}
    return {
        name: np.hstack([_decode(panel.picture) for panel in panels])
        for name, panels in zip(names, gallery.rows, strict=True)
    }


def _decode(uri: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))) as image:
        image.thumbnail((_LONGEST, _LONGEST))
        return np.asarray(image.convert("RGB"))
