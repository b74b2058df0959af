"""Merge methods as a job spec names them: what holds for every one."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from refinedet.pipeline.config.spec import MergeMethod, MergeRule
from refinedet.pipeline.config.spec_files import load_spec
from refinedet.pipeline.inference.merging import merge_boxes, suppress_across_classes
from torch import Tensor

METHODS = get_args(MergeMethod)


def found(seed: int, count: int = 60) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Overlapping boxes of 3 classes in 3 images."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + 10 + torch.rand(count, 2, generator=generator) * 30], 1)
    labels, image = (torch.randint(low, low + 3, (count,), generator=generator) for low in (1, 0))
    return boxes, torch.rand(count, generator=generator), labels, image


@pytest.mark.parametrize("method", METHODS)
def test_classes_and_images_merge_apart(method: MergeMethod) -> None:
    """Merging all at once is merging each class of each image alone."""
    boxes, scores, labels, image = found(seed=1)
    rule = MergeRule(method=method)
    together = merge_boxes(rule, boxes, scores, labels, image)
    rows = []
    for one in range(3):
        for label in range(1, 4):
            own = (image == one) & (labels == label)
            rows.append(merge_boxes(rule, boxes[own], scores[own], labels[own], image[own]))
    alone = [torch.cat(column) for column in zip(*rows, strict=True)]

    def as_rows(columns: list[Tensor] | tuple[Tensor, ...]) -> list[list[float]]:
        return sorted(torch.cat([columns[0], *(c[:, None].float() for c in columns[1:])], 1).tolist())

    torch.testing.assert_close(torch.tensor(as_rows(together)), torch.tensor(as_rows(alone)))


@pytest.mark.parametrize("method", METHODS)
def test_results_are_in_order_and_as_many_as_wanted(method: MergeMethod) -> None:
    boxes, scores, labels, image = merge_boxes(MergeRule(method=method, max_detections=4), *found(seed=2))
    assert image.tolist() == sorted(image.tolist())
    for one in range(3):
        own = scores[image == one]
        assert 0 < len(own) <= 4
        assert own.tolist() == sorted(own.tolist(), reverse=True)
    assert (boxes[:, 2:] > boxes[:, :2]).all()
    assert set(labels.tolist()) <= {1, 2, 3}


@pytest.mark.parametrize("method", METHODS)
def test_nothing_merges_to_nothing_and_one_box_to_itself(method: MergeMethod) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert [
        len(column) for column in merge_boxes(MergeRule(method=method), torch.zeros(0, 4), none / 1, none, none)
    ] == [0] * 4
    one = torch.tensor([[3.0, 4, 20, 30]]), torch.tensor([0.7]), torch.tensor([2]), torch.tensor([0])
    for ours, expected in zip(merge_boxes(MergeRule(method=method), *one), one, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("method", METHODS)
def test_a_job_spec_may_name_it(method: MergeMethod) -> None:
    spec = load_spec("quickstart", [f"multiscale.merge.method={method}"])
    assert spec.multiscale is not None
    assert spec.multiscale.merge == MergeRule(method=method)


def test_suppression_across_classes_is_nms_with_one_label() -> None:
    boxes, scores, labels, image = found(seed=3)
    kept = suppress_across_classes(boxes, scores, image, iou=0.45, max_detections=5)
    expected = merge_boxes(MergeRule(max_detections=5), boxes, scores, torch.ones_like(labels), image)
    torch.testing.assert_close((boxes[kept], scores[kept], image[kept]), (*expected[:2], expected[3]))
    assert len(set(labels[kept].tolist())) == 3
