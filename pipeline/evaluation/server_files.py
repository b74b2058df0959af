"""Files for the evaluation servers: COCO's zip, checked before upload, and VOC's text files."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from refinedet.pipeline.evaluation.box_matching import check_known
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

ROW_SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["image_id", "category_id", "bbox", "score"],
        "additionalProperties": False,
        "properties": {
            "image_id": {"type": "integer", "minimum": 0},
            "category_id": {"type": "integer", "minimum": 1, "maximum": 90},
            "bbox": {
                "type": "array",
                "minItems": 4,
                "maxItems": 4,
                "items": {"type": "number"},
                "description": "x, y, width, height; pixels, to 0.1",
            },
            "score": {"type": "number", "minimum": 0, "maximum": 1},
        },
    },
}
"""JSON schema of the results file"""

SERVER_DETECTIONS = 100  # of a category in an image; pycocotools, which the server runs, counts no more


def write_submission(
    folder: str,
    name: str,
    detections: DetectionTable | Sequence[Mapping[str, Any]],
    *,
    image_ids: Sequence[int],
) -> str:
    """Write `detections_test-dev2017_<name>_results.zip` with the JSON of the same name, and return its path.

    Boxes are rounded to 0.1 pixel, and no side is below it; the best 100 of each category in an image are kept.
    `image_ids` are those of the test set: rows of other images, ids outside COCO's 1..90, scores outside 0..1 and
    negative sides are a UserError.
    """
    if not re.fullmatch(r"[A-Za-z0-9-]+", name):
        raise UserError(f"a submission's name may hold letters, digits and -, received {name!r}; choose another")
    table = DetectionTable.of(detections)
    _check(table, image_ids)
    table = table.select(np.lexsort((-table.score, table.category_id, table.image_id)))
    at = np.arange(len(table))
    begins = np.diff(table.image_id, prepend=-1).astype(bool) | np.diff(table.category_id, prepend=-1).astype(bool)
    table = table.select(at - np.maximum.accumulate(np.where(begins, at, 0)) < SERVER_DETECTIONS)
    table = table.select(np.lexsort((-table.score, table.image_id)))
    boxes = table.bbox.round(1)
    boxes[:, 2:] = np.maximum(boxes[:, 2:], 0.1)  # rounding leaves no box without area
    rounded = DetectionTable(table.image_id, table.category_id, boxes, table.score.round(5))
    stem = f"detections_test-dev2017_{name}_results"
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        info = zipfile.ZipInfo(f"{stem}.json", (1980, 1, 1, 0, 0, 0))  # the same detections give the same bytes
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, json.dumps(rounded.rows(), separators=(",", ":")))
    path = storage.join(folder, f"{stem}.zip")
    storage.write_bytes(path, content.getvalue())
    return path


def _check(table: DetectionTable, image_ids: Sequence[int]) -> None:
    faults = (
        (~np.isin(table.image_id, np.asarray(image_ids, np.int64)), "its image is not in the test set"),
        ((table.category_id < 1) | (table.category_id > 90), "its category is none of COCO's ids 1..90"),
        ((table.score < 0) | (table.score > 1), "its score lies outside 0..1"),
        ((table.bbox[:, 2:] < 0).any(1), "its box has a negative side"),
    )
    for faulty, reason in faults:
        if faulty.any():
            row = int(faulty.argmax())
            raise UserError(
                f"submission, row {row} (image {table.image_id[row]}, category {table.category_id[row]}, score "
                f"{table.score[row]}): {reason} ({faulty.sum()} rows like it); the server would refuse the file"
            )


def write_voc_files(
    folder: str,
    ground_truth: Mapping[str, Any],
    detections: DetectionTable | Sequence[Mapping[str, Any]],
    *,
    image_set: str = "test",
) -> tuple[str, ...]:
    """Write the devkit's result files, one per class: lines of image name, score, xmin, ymin, xmax, ymax (from 1).

    `ground_truth` is a COCO dict whose images have file names. Returns the files' names; a class without detections
    has an empty file, as the server wants it.
    """
    truth, table = GroundTruth.of(ground_truth), DetectionTable.of(detections)
    check_known(truth, truth.image_ids, table)
    stems = {int(image["id"]): PurePosixPath(str(image["file_name"])).stem for image in ground_truth["images"]}
    names = []
    for category, name in zip(truth.category_ids.tolist(), truth.names, strict=True):
        own = table.select(np.flatnonzero(table.category_id == category))
        corners = np.concatenate([own.bbox[:, :2] + 1, own.bbox[:, :2] + own.bbox[:, 2:]], 1)
        lines = [
            f"{stems[image]} {score:.6f} {box[0]:.1f} {box[1]:.1f} {box[2]:.1f} {box[3]:.1f}\n"
            for image, score, box in zip(own.image_id.tolist(), own.score.tolist(), corners.tolist(), strict=True)
        ]
        names.append(f"comp4_det_{image_set}_{name}.txt")
        storage.write_bytes(storage.join(folder, names[-1]), "".join(lines).encode())
    return tuple(names)
