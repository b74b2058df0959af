"""`refinedet predict`: trained weights, some images, pictures of what was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import yaml
from refinedet.pipeline.config.files import parse_spec
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError


def predict_images(weights: str, images: Sequence[Path], output: Path, threshold: float) -> Iterator[str]:
    """Detect in each image; yields a line an image.

    Writes `<output>/<name>.png` with the boxes of score >= threshold, and `<output>/detections.json` with all boxes
    (xyxy, pixels of the original image). Every input is checked before anything is written.
    """
    import cv2
    import torch
    from refinedet.model import RefineDet, load_weights
    from refinedet.pipeline.inference.pictures import Boxes, draw_detections

    spec, names, path = _read_run(weights)
    targets = _targets(images, output)
    decoded = [(image, _read_image(image)) for image in images]
    model = RefineDet(spec.model)
    from safetensors.torch import load

    load_weights(model, load(storage.read_bytes(path)))
    model.eval().to(memory_format=torch.channels_last)
    output.mkdir(parents=True, exist_ok=True)
    everything = {}
    side = spec.model.input_size
    for (image, pixels), target in zip(decoded, targets, strict=True):
        height, width = pixels.shape[:2]
        resized = cv2.resize(pixels, (side, side), interpolation=cv2.INTER_LINEAR)
        found = model.detect(torch.from_numpy(resized).permute(2, 0, 1)[None])[0]
        boxes = found.boxes * found.boxes.new_tensor([width / side, height / side] * 2)
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        everything[str(image)] = [
            {"label": names[label - 1], "score": round(score, 4), "box": [round(value, 1) for value in box]}
            for box, score, label in zip(boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
        ]
        shown = found.scores >= threshold
        picture = draw_detections(
            pixels,
            Boxes(boxes[shown].numpy(), found.labels[shown].numpy(), found.scores[shown].numpy()),
            names,
        )
        picture.save(target)
        yield f"{image}: {int(shown.sum())} objects -> {target}"
    storage.write_json(str(output / "detections.json"), everything)


def _targets(images: Sequence[Path], output: Path) -> list[Path]:
    """Where each image's picture goes; UserError where that would write over an image, or over another's picture."""
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


def _read_run(weights: str) -> tuple[JobSpec, list[str], str]:
    """The spec and class names beside the weights."""
    folder = weights if not weights.endswith(".safetensors") else str(Path(weights).parent)
    path = weights if weights.endswith(".safetensors") else storage.join(weights, "weights.safetensors")
    for needed in (path, storage.join(folder, "spec.yaml")):
        if not storage.exists(needed):
            raise UserError(f"There is no {needed}; give a run's folder, or its weights.safetensors beside spec.yaml.")
    spec = parse_spec(yaml.safe_load(storage.read_bytes(storage.join(folder, "spec.yaml"))), source=folder)
    truth = storage.join(folder, "ground_truth.json")
    if storage.exists(truth):
        categories = sorted(storage.read_json(truth)["categories"], key=lambda category: category["id"])
        return spec, [category["name"] for category in categories], path
    return spec, [f"class {label}" for label in range(1, spec.model.num_classes + 1)], path


def _read_image(path: Path) -> np.ndarray:
    """uint8 [H, W, 3] RGB."""
    import cv2

    pixels = cv2.imread(str(path), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION) if path.is_file() else None
    if pixels is None:
        reason = "is not an image that can be read" if path.is_file() else "does not exist"
        raise UserError(f"{path} {reason}; give JPEG or PNG files.")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
