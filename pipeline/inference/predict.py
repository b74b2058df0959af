"""`refinedet predict`: trained weights, some images or videos, files of what was found."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from refinedet.pipeline.inference.choice import Choice, find_labels
from refinedet.pipeline.inference.detect import Found
from refinedet.pipeline.inference.outputs import Objects, Outputs
from refinedet.pipeline.inference.predictor import Predictor
from refinedet.pipeline.inference.sources import Source, read_frames
from refinedet.pipeline.runs.errors import UserError


@dataclass
class Tally:
    """Counts of a prediction.

    objects  those that reach the threshold
    ended    a person closed the window, which ended the prediction
    """

    images: int = 0
    objects: int = 0
    unreadable: int = 0
    ended: bool = False


def predict_sources(
    predictor: Predictor,
    sources: Sequence[Source],
    choice: Choice,
    *,
    on_progress: Callable[[Tally], None] = lambda tally: None,
    on_fault: Callable[[str, str], None] = lambda name, fault: None,
) -> Tally:
    """Detect in all sources, in batches; decoding and drawing run beside. Memory does not grow with their number.

    on_progress  called after each batch
    on_fault     called with name and reason of each image that cannot be read; it is passed over
    Raises UserError for a category that the detector does not have, or a picture that would replace a source.
    """
    kept = find_labels(choice.categories, predictor.names)
    _check_targets(sources, choice)
    tally = Tally()
    frames = read_frames(sources, ahead=2 * predictor.batch_size, exif=predictor.exif)
    with Outputs(choice, predictor.names) as outputs:
        while not outputs.ended and (batch := list(islice(frames, predictor.batch_size))):
            readable = [frame for frame in batch if frame.image is not None]
            for frame in batch:
                if frame.image is None:
                    tally.unreadable += 1
                    on_fault(frame.name, frame.fault or "")
            images = [frame.image for frame in readable if frame.image is not None]
            for frame, found in zip(readable, predictor.predict(images), strict=True):
                objects = _objects(found, kept)
                outputs.write(frame, objects)
                tally.images += 1
                tally.objects += int((objects.scores >= choice.threshold).sum())
            on_progress(tally)
        tally.ended = outputs.ended
        outputs.wait()
    return tally


def _objects(found: Found, kept: np.ndarray | None) -> Objects:
    order = np.argsort(-found.scores.numpy(), kind="stable")
    objects = Objects(found.boxes.numpy(), found.scores.numpy(), found.labels.numpy()).select(order)
    return objects if kept is None else objects.select(np.isin(objects.labels, kept))


def _check_targets(sources: Sequence[Source], choice: Choice) -> None:
    """UserError where a picture would be written over a source; before anything is written."""
    if "pictures" not in choice.formats:
        return
    inputs = {Path(source.path).resolve(): source.path for source in sources}
    for source in sources:
        target = choice.output / f"{source.stem}{'.mp4' if source.is_video else '.jpg'}"
        if target.resolve() in inputs:
            raise UserError(
                f"The picture of {source.path} would be written over {inputs[target.resolve()]}; give another --output."
            )
