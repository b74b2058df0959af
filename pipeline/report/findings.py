"""Pictures of what the diagnosis found: worst images, missed objects, false alarms, likely mistakes of the truth."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from refinedet.pipeline.inference.pictures import Boxes, draw_detections
from refinedet.pipeline.report.diagnosis_section import error_name

logger = logging.getLogger(__name__)

LoadImages = Callable[[Sequence[int]], Mapping[int, np.ndarray]]
"""Images, uint8 [H, W, 3] RGB, by image id; those that do not exist are excluded."""

GROUPS = {
    "worst_images": (
        "Worst images",
        "By the AP that the errors on them cost. Objects are missed at every score; false alarms count from the score "
        "of the confusions. Dashed: a false alarm. Thin, without a name: a missed object.",
    ),
    "costly_misses": ("Missed objects", "Objects that no correct detection found, at any score; costliest first."),
    "false_alarms": ("False alarms", "Wrong detections, costliest first. Dashed: the object that it was taken for."),
    "truth_suspects": ("Likely mistakes of the truth", "Confident detections that the annotations contradict."),
}
_MAX_OF_GROUP = 8
_CROP_SIDE = 320
_CONTEXT = 3.0
"""side of a crop over the longer side of its box"""


@dataclass(frozen=True)
class Panel:
    title: str
    note: str
    picture: str
    """data URI"""


@dataclass(frozen=True)
class FindingGroup:
    title: str
    lead: str
    panels: list[Panel]


def finding_groups(
    diagnosis: Mapping[str, Any],
    names: Mapping[Any, str],
    load_images: LoadImages,
    *,
    drawn: Mapping[Any, Boxes],
    class_names: Sequence[str],
) -> list[FindingGroup]:
    """One group for each kind of finding that has pictures.

    names        image id -> file name, shown below a picture
    drawn        image id -> detections, on the pictures of whole images
    class_names  of label 1 first
    """
    wanted = {
        kind: [row for row in rows if isinstance(row, Mapping) and "image_id" in row][:_MAX_OF_GROUP]
        for kind in GROUPS
        if isinstance(rows := diagnosis.get(kind), list | tuple)
    }
    ids = list(dict.fromkeys(row["image_id"] for rows in wanted.values() for row in rows))
    images = load_images(ids) if ids else {}
    groups = []
    for kind, rows in wanted.items():
        panels = []
        for row in rows:
            image = images.get(row["image_id"])
            if image is None:
                continue
            try:
                name = str(names.get(row["image_id"], row["image_id"]))
                if kind == "worst_images":
                    panels.append(_whole(row, image, name, drawn.get(row["image_id"]), class_names))
                else:
                    panels.append(_panel(kind, row, image, name))
            except (KeyError, TypeError, ValueError) as error:
                logger.warning("A picture of %s is excluded from the report: %s", kind, error)
        if panels:
            groups.append(FindingGroup(*GROUPS[kind], panels))
    return groups


def jpeg_uri(picture: Image.Image, longest: int) -> str:
    """A JPEG of at most `longest` pixels a side, as a data URI."""
    if max(picture.size) > longest:
        picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _whole(
    row: Mapping[str, Any], image: np.ndarray, name: str, found: Boxes | None, class_names: Sequence[str]
) -> Panel:
    note = (
        f"costs {row['cost']:.3f} AP: {row['num_missed']} of {row['num_objects']} missed, "
        f"{_count(row['num_false'], 'false alarm')}"
    )
    boxes = _with_missed(found, row.get("missed", ()), class_names)
    return Panel(name, note, jpeg_uri(draw_detections(image, boxes, class_names, long_side=_CROP_SIDE), 480))


def _with_missed(found: Boxes | None, missed: Sequence[Mapping[str, Any]], class_names: Sequence[str]) -> Boxes:
    """Detections, and the missed objects as regions are drawn: thin, without a name."""
    found = found or Boxes(np.zeros((0, 4)), np.zeros(0, np.int64), np.zeros(0), np.zeros(0, bool))
    assert found.scores is not None
    assert found.matched is not None
    count = len(missed)
    xywh = np.array([one["bbox"] for one in missed], np.float64).reshape(-1, 4)
    numbers = {name: label for label, name in enumerate(class_names, start=1)}
    labels = np.array([numbers.get(one["label"], 0) for one in missed], np.int64)  # gives the colour
    return Boxes(
        np.concatenate([found.boxes, xywh + np.pad(xywh[:, :2], ((0, 0), (2, 0)))]),
        np.concatenate([found.labels, labels]),
        np.concatenate([found.scores, np.ones(count)]),
        np.concatenate([found.matched, np.ones(count, bool)]),
        np.concatenate([np.zeros(len(found.boxes), bool), np.ones(count, bool)]),
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _panel(kind: str, row: Mapping[str, Any], image: np.ndarray, name: str) -> Panel:
    boxes, labels, solid = [row["bbox"]], [str(row["label"])], [kind != "costly_misses"]
    if row.get("other_bbox") is not None:
        boxes, labels, solid = (
            [*boxes, row["other_bbox"]],
            [*labels, str(row.get("other_label") or "")],
            [*solid, False],
        )
    xywh = np.array(boxes, np.float64).reshape(-1, 4)
    xyxy = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    crop, origin = _crop(image, xyxy)
    drawn = Boxes(xyxy - np.tile(origin, 2), np.arange(1, len(boxes) + 1), matched=np.array(solid))
    picture = draw_detections(crop, drawn, labels, long_side=_CROP_SIDE)
    note = error_name(str(row["kind"]))
    if row.get("score") is not None:
        note += f", score {row['score']:.2f}"
    if row.get("other_label"):
        note += f", truth: {row['other_label']}"
    return Panel(str(row["label"]), f"{note} · {name}", jpeg_uri(picture, 2 * _CROP_SIDE))


def _crop(image: np.ndarray, boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The boxes with what is around them, and the crop's upper left corner (x, y)."""
    height, width = image.shape[:2]
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    side = max(float((high - low).max()) * _CONTEXT, 64.0)
    centre = (low + high) / 2
    x, y = (int(min(max(c - side / 2, 0), max(s - side, 0))) for c, s in zip(centre, (width, height), strict=True))
    crop = image[y : y + int(side) + 1, x : x + int(side) + 1]
    if not crop.size:
        raise ValueError(f"the box {boxes[0].tolist()} lies off the image of {width} x {height} pixels")
    return crop, np.array([x, y], np.float64)
