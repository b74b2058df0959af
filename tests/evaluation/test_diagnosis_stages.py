"""Objects are followed to the step of the detector that loses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from refinedet.model import RefineDetConfig, select_detections
from refinedet.model.anchors import tile_anchors
from refinedet.model.boxes import encode_boxes
from refinedet.model.structures import Predictions
from refinedet.pipeline.evaluation.diagnosis import FATES
from refinedet.pipeline.evaluation.diagnosis_stages import summarize_levels, trace_objects

SIDE = 128
BOX = torch.tensor([[40.0, 40.0, 80.0, 80.0]])


def trace(*, theta: float = 0.99, arm_object: float = 0.4, score: float = 0.9, shift_refined=0.0, shift_final=0.0):
    """One object; every anchor near it becomes it, in both regressions, unless it is shifted there."""
    config = RefineDetConfig(num_classes=2, input_size=SIDE, backbone="resnet18", theta=theta)
    anchors = tile_anchors(SIDE, SIDE, config.strides)
    refined = (BOX + shift_refined).expand(len(anchors), 4)
    target = (BOX + shift_final).expand(len(anchors), 4)
    arm = torch.tensor([1 - arm_object, arm_object]).log().expand(1, len(anchors), 2)
    rest = (1 - score) / 2
    adm = torch.tensor([rest, score, rest]).log().expand(len(anchors), 3)
    predictions = Predictions(
        anchors, refined[None], arm, torch.zeros(1, len(anchors), 4), None, adm, encode_boxes(target, refined), refined
    )
    found = select_detections(predictions, config)[0]
    counts = trace_objects(predictions, 0, found, BOX, torch.tensor([1]), config)
    assert counts.sum() == 1
    levels = summarize_levels(config, counts)
    assert [level.stride for level in levels] == [8, 16, 32, 64]
    return FATES[int(counts.sum(0).argmax())], int(np.flatnonzero(counts.sum(1))[0])


@pytest.mark.parametrize(
    ("settings", "stage"),
    [
        ({}, "found"),
        ({"theta": 0.5}, "filter"),  # the ARM gives objects 0.4: a theta this low removes them
        ({"shift_refined": 60.0, "shift_final": 60.0}, "first_regression"),
        ({"shift_final": 60.0}, "second_regression"),
        ({"score": 0.001}, "classification"),
    ],
)
def test_the_step_that_loses_an_object_is_named(settings, stage):
    assert trace(**settings) == (stage, 0)
