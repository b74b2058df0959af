"""The images whose detections people look at: a few, the same in every validation of a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import numpy as np
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs import storage

logger = logging.getLogger(__name__)

_LOWEST_SCORE = 0.05
_MOST = 8


def shown_ids(image_ids: Iterable[int], spec: JobSpec) -> list[int]:
    """At most `tracking.report_images` ids, and few, spread evenly over the images with objects.

    image_ids  of all objects
    """
    ids = sorted(set(image_ids))
    count = min(spec.tracking.report_images, _MOST, len(ids))
    return [ids[int((number + 0.5) * len(ids) / count)] for number in range(count)]


def keep_shown(run: Run, epochs_done: int, rank: int, shown: list[int], detections: DetectionTable) -> None:
    """Write one rank's detections of the shown images; a fault of storage is logged and costs nothing else."""
    kept = detections.select(np.isin(detections.image_id, shown) & (detections.score >= _LOWEST_SCORE))
    try:
        storage.write_json(storage.join(_folder(run, epochs_done), f"rank-{rank:05d}.json"), kept.rows())
    except Exception as error:  # a library of remote storage raises what it likes
        logger.warning("the detections that a validation shows could not be written: %s", error)


def read_shown(run: Run, epochs_done: int) -> list[dict[str, Any]]:
    """COCO results rows of all ranks."""
    folder = _folder(run, epochs_done)
    return [row for name in storage.list_folder(folder) for row in storage.read_json(storage.join(folder, name))]


def _folder(run: Run, epochs_done: int) -> str:
    return run.file("validations", f"epoch-{epochs_done:05d}")
