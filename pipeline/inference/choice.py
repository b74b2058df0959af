"""Choice of what a prediction writes; and the check, without torch, that a detector can do it, by its header."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from refinedet.model.config import RefineDetConfig
from refinedet.model.hub_files import CATEGORIES, check_detector, read_config
from refinedet.pipeline.config.recipes import resolve_passes
from refinedet.pipeline.config.spec import Multiscale
from refinedet.pipeline.runs.errors import UserError


@dataclass(frozen=True)
class BoxStyle:
    """Style of the boxes in pictures.

    labels      names and scores beside the boxes
    scores      scores after the names
    line_width  pixels; None: by the size of the picture
    """

    labels: bool = True
    scores: bool = True
    line_width: int | None = None


@dataclass(frozen=True)
class Choice:
    """Choice of what is written.

    output      directory
    formats     of `Outputs.FORMATS`
    threshold   lowest score in pictures, crops and YOLO's files; the JSON files hold everything
    categories  by name; empty: all
    drawing     of pictures and frames
    """

    output: Path
    formats: Sequence[str] = ("pictures", "jsonl")
    threshold: float = 0.3
    categories: Sequence[str] = ()
    drawing: BoxStyle = BoxStyle()


def category_names(config: RefineDetConfig, names: Sequence[str]) -> tuple[str, ...]:
    """Names of labels 1..C; `class 1` and so on where a detector has none."""
    return tuple(names) or tuple(f"class {label}" for label in range(1, config.num_classes + 1))


def find_labels(categories: Sequence[str], names: Sequence[str]) -> np.ndarray | None:
    """Labels of the categories; None for all. Raises UserError for one that the detector does not have."""
    unknown = [category for category in categories if category not in names]
    if unknown:
        raise UserError(
            f"The detector has no category {unknown[0]!r}; it has {', '.join(names[:20])}{' ...' * (len(names) > 20)}."
        )
    return np.array([names.index(category) + 1 for category in categories]) if categories else None


def check_choice(weights: str, categories: Sequence[str], multiscale: Multiscale | None) -> None:
    """UserError where a detector has not these categories, or takes no image of these sizes; a URI passes."""
    metadata = check_detector(weights)
    if metadata:
        config = read_config(metadata)
        find_labels(categories, category_names(config, json.loads(metadata.get(CATEGORIES, "[]"))))
        if multiscale:
            resolve_passes(multiscale, config)


def check_image_size(config: RefineDetConfig, height: int | None, width: int | None) -> tuple[int, int]:
    """Height and width, by default the model's; UserError for what the model does not take."""
    height, width = height or config.input_size, width or config.input_size
    if height % config.coarsest_stride or width % config.coarsest_stride:
        raise UserError(
            f"--height and --width must be multiples of {config.coarsest_stride}, received {height} and {width}."
        )
    return height, width
