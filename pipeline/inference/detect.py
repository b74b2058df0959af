"""Detect on images of a data set: boxes in original pixels, categories by their original ids.

Pure functions of (model, samples): whoever calls them decides where and how often.
B images, N detections of one image, H W pixels.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from refinedet.model import RefineDet, RefineDetConfig, detect_images
from refinedet.pipeline.config.spec import Evaluation
from refinedet.pipeline.data.samples import Category, Sample
from refinedet.pipeline.data.tensors import image_tensor
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.inference.merging import merge_boxes
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Found:
    """Detections of several images.

    boxes   [N, 4] fp32 xyxy, pixels of the original images, clipped to them
    scores  [N] fp32
    labels  [N] int64, 1..C
    image   [N] int64, position of the image in its batch
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    image: Tensor

    def select(self, index: Tensor) -> Found:
        return Found(self.boxes[index], self.scores[index], self.labels[index], self.image[index])


def detect_samples(
    model: RefineDet,
    samples: Iterable[Sample],
    categories: Sequence[Category],
    evaluation: Evaluation,
    autocast: torch.dtype | None = None,
) -> tuple[DetectionTable, list[int]]:
    """Detections of samples at the model's input size, and the ids of the images, in order.

    Boxes are scaled back to the original image and clipped to it. `evaluation.merge` replaces the model's own
    suppression. The model's device is used; it is put into evaluation mode, and back.
    """
    size = (model.config.input_size, model.config.input_size)
    rule = evaluation.merge
    config = model.config if rule is None else unsuppressed(model.config)
    tables, image_ids = [], []
    with evaluating(model):
        for batch in batched(samples, evaluation.batch_size):
            found = detect_view(model, [sample.image for sample in batch], size, config=config, autocast=autocast)
            if rule is not None:
                found = Found(*merge_boxes(rule, found.boxes, found.scores, found.labels, found.image))
            tables.append(as_table(found, batch, categories))
            image_ids += [sample.image_id for sample in batch]
    return DetectionTable.concatenate(tables), image_ids


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; the mode before comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():  # not inference mode: anchors that the model keeps would be useless in training
            yield
    finally:
        model.train(training)


def unsuppressed(config: RefineDetConfig) -> RefineDetConfig:
    """The same selection without NMS, for a merge rule to do its work."""
    return dataclasses.replace(config, nms_iou=1.0, max_detections=10**9)


def detect_view(
    model: RefineDet,
    images: Sequence[np.ndarray],
    size: tuple[int, int],
    *,
    config: RefineDetConfig,
    flip: bool = False,
    autocast: torch.dtype | None = None,
) -> Found:
    """Detect once on B images, warped to `size` (height, width); with `flip` on their mirror images too.

    images   B uint8 [H, W, 3], of any sizes
    config   of the selection (thresholds, NMS)
    returns  what was found in each, mirrored boxes turned back
    """
    device = next(model.parameters()).device
    views = [image_tensor(image).to(device, non_blocking=True) for image in images]
    if flip:
        views += [view.flip(2) for view in views]
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        detections = detect_images(model, views, size, config)
    place = torch.repeat_interleave(torch.tensor([len(one.scores) for one in detections]))
    boxes = torch.cat([one.boxes for one in detections]).cpu()
    if flip:
        width = torch.tensor([float(image.shape[1]) for image in images])[place % len(images)]
        turned = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], 1)
        boxes = torch.where((place >= len(images))[:, None], turned, boxes)
        place = place % len(images)
    return Found(
        boxes,
        torch.cat([one.scores for one in detections]).cpu(),
        torch.cat([one.labels for one in detections]).cpu(),
        place,
    )


def as_table(found: Found, samples: Sequence[Sample], categories: Sequence[Category]) -> DetectionTable:
    """Rows with the data set's ids, by image, best first; corners to 0.001 pixel, so that a file holds them whole."""
    order = torch.sort(found.scores, descending=True, stable=True).indices
    found = found.select(order[torch.sort(found.image[order], stable=True).indices])
    ids = np.array([sample.image_id for sample in samples], np.int64)
    category_ids = np.array([0, *sorted(category.id for category in categories)], np.int64)
    boxes = found.boxes.double().numpy()
    return DetectionTable(
        image_id=ids[found.image.numpy()],
        category_id=category_ids[found.labels.numpy()],
        bbox=np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).round(3),
        score=found.scores.double().numpy().round(8),
    )


def batched(samples: Iterable[Sample], size: int) -> Iterator[list[Sample]]:
    iterator = iter(samples)
    while batch := list(islice(iterator, size)):
        yield batch
