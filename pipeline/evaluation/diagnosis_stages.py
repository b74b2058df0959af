"""Objects followed through the detector: which of its steps loses them.

A anchors, G objects of one image, L anchor levels, S stages (diagnosis.FATES), N rows that the ADM computed
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from refinedet.model import RefineDet, RefineDetConfig, resize_images, select_detections
from refinedet.model.anchors import count_anchors
from refinedet.model.boxes import decode_boxes
from refinedet.model.filtering import select_survivors
from refinedet.model.structures import Detections, Predictions
from refinedet.pipeline.data.samples import Sample
from refinedet.pipeline.data.tensors import image_tensor
from refinedet.pipeline.evaluation.diagnosis import FATES, LevelStages
from refinedet.pipeline.evaluation.diagnosis_examination import IOU
from refinedet.pipeline.inference.detect import evaluating
from torch import Tensor
from torchvision.ops import box_iou


def trace_samples(model: RefineDet, samples: Sequence[Sample], autocast: torch.dtype | None = None) -> np.ndarray:
    """[L, S] objects of the samples by the level of their best anchor and the stage at which they end."""
    config = model.config
    counts = np.zeros((config.levels, len(FATES)), np.int64)
    if not samples:
        return counts
    side = config.input_size
    device = next(model.parameters()).device
    images = resize_images((image_tensor(sample.image).to(device) for sample in samples), (side, side))
    with evaluating(model), torch.autocast(device.type, autocast, enabled=autocast is not None):
        predictions = model(images)
    found = select_detections(predictions, config)
    for place, sample in enumerate(samples):
        wanted = ~(sample.crowd | sample.difficult)
        height, width = sample.image.shape[:2]
        scale = torch.tensor([side / width, side / height] * 2, dtype=torch.float32)
        boxes = torch.from_numpy(sample.boxes[wanted]) * scale
        labels = torch.from_numpy(sample.labels[wanted])
        counts += trace_objects(predictions, place, found[place], boxes.to(device), labels.to(device), config)
    return counts


def trace_objects(
    predictions: Predictions, image: int, found: Detections, boxes: Tensor, labels: Tensor, config: RefineDetConfig
) -> np.ndarray:
    """[L, S] the objects of one image of a batch of square inputs.

    found   its final detections
    boxes   [G, 4] xyxy, pixels of the network input
    labels  [G] from 1
    """
    counts = np.zeros((config.levels, len(FATES)), np.int64)
    if not len(boxes):
        return counts
    num_images, num_anchors = predictions.refined.shape[:2]
    tiled = box_iou(boxes, predictions.anchors)
    refined = box_iou(boxes, predictions.refined[image].float()) >= IOU
    survives = torch.ones(num_anchors, dtype=torch.bool, device=boxes.device)
    if predictions.arm_class is not None and config.filter_negatives == "always":
        survives = select_survivors(predictions.arm_class[image][None], config.theta)[0]
    index = predictions.index
    index = torch.arange(num_images * num_anchors, device=boxes.device) if index is None else index
    rows = ((index // num_anchors == image) & survives[index % num_anchors]).nonzero().squeeze(1)
    anchors = predictions.refined[image][index[rows] % num_anchors]
    final = box_iou(boxes, decode_boxes(predictions.adm_box[rows], anchors).float()) >= IOU  # [G, N]
    scores = predictions.adm_class[rows].float().softmax(-1)  # [N, C + 1]
    scored = final & (config.score_threshold < scores[:, labels].T)
    detected = (box_iou(boxes, found.boxes) >= IOU) & (labels[:, None] == found.labels[None])

    lost = torch.full((len(boxes),), FATES.index("suppression"), device=boxes.device)
    lost[~scored.any(1)] = FATES.index("classification")
    reached = final.any(1)
    lost[~reached] = FATES.index("second_regression")
    lost[~reached & ~(refined & survives).any(1)] = FATES.index("filter")
    lost[~reached & ~refined.any(1)] = FATES.index("first_regression")
    lost[~reached & ~refined.any(1) & ~(tiled >= IOU).any(1)] = FATES.index("uncovered")
    lost[detected.any(1)] = FATES.index("found")
    ends = torch.tensor(count_anchors(config.input_size, config.input_size, config.strides)).cumsum(0)
    level = torch.searchsorted(ends, tiled.argmax(1).cpu(), right=True)
    np.add.at(counts, (level.numpy(), lost.cpu().numpy()), 1)
    return counts


def summarize_levels(config: RefineDetConfig, counts: np.ndarray) -> tuple[LevelStages, ...]:
    """counts [L, S], summed over the images that were traced."""
    return tuple(
        LevelStages(stride, dict(zip(FATES, row, strict=True)))
        for stride, row in zip(config.strides, counts.tolist(), strict=True)
    )
