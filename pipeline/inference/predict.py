"""`refinedet predict`: trained weights, some images, pictures of what was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from refinedet.pipeline.inference.pictures import Boxes, draw_detections
from refinedet.pipeline.inference.predictor import Predictor
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


def predict_images(predictor: Predictor, sources: Sequence[Path], output: Path, threshold: float) -> Iterator[str]:
    """Detect in each image; yields a line per image.

    sources  image files, or directories of them
    Writes `<output>/<name>.png` with the boxes of score >= threshold, and `<output>/detections.json` with all boxes
    (xyxy, pixels of the original image). Every input is checked before anything is written.
    """
    images = [image for source in sources for image in _images_of(source)]
    targets = _targets(images, output)
    for image in images:
        _read_image(image)
    output.mkdir(parents=True, exist_ok=True)
    everything = {}
    names = predictor.names
    detections = predictor.predict(map(_read_image, images))
    for image, target, found in zip(images, targets, detections, strict=True):
        rows = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        everything[str(image)] = [
            {"label": names[label - 1], "score": round(score, 4), "box": [round(value, 1) for value in box]}
            for box, score, label in rows
        ]
        shown = found.scores >= threshold
        boxes = Boxes(found.boxes[shown].numpy(), found.labels[shown].numpy(), found.scores[shown].numpy())
        draw_detections(_read_image(image), boxes, names).save(target)
        yield f"{image}: {int(shown.sum())} objects -> {target}"
    storage.write_json(str(output / "detections.json"), everything)


def _images_of(source: Path) -> list[Path]:
    """The images of a directory, sorted, or the one file that `source` is."""
    if not source.is_dir():
        return [source]
    images = sorted(path for path in source.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not images:
        raise UserError(f"The directory {source} holds no images ({', '.join(sorted(_SUFFIXES))}).")
    return images


def _targets(images: Sequence[Path], output: Path) -> list[Path]:
    """Output path of each picture; UserError where that would overwrite an image or another picture."""
    inputs = {image.resolve() for image in images}
    taken: dict[Path, Path] = {}
    for image in images:
        target = output / f"{image.stem}.png"
        if target.resolve() in inputs:
            raise UserError(f"The picture of {image} would be written over the image {target}; give another --output.")
        if target in taken:
            raise UserError(
                f"{taken[target]} and {image} would both be written to {target}; rename one, or detect in it apart, "
                "with another --output."
            )
        taken[target] = image
    return list(taken)


def _read_image(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] RGB."""
    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION) if path.is_file() else None
    if pixels is None:
        reason = "is not an image that can be read" if path.is_file() else "does not exist"
        raise UserError(f"{path} {reason}; give JPEG or PNG files.")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
