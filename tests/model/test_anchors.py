from __future__ import annotations

import math

import pytest
import torch
from refinedet.model.anchors import count_anchors, tile_anchors

STRIDES = (8, 16, 32, 64, 128)


def loop_anchors(height: int, width: int, strides: tuple[int, ...]) -> list[list[float]]:
    anchors = []
    for stride in strides:
        for row in range(height // stride):
            for column in range(width // stride):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                for ratio in (1.0, 2.0, 0.5):
                    w, h = 4 * stride * math.sqrt(ratio), 4 * stride / math.sqrt(ratio)
                    anchors.append([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
    return anchors


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 64), (64, 192)])
def test_anchors_are_those_of_the_loop(height, width):
    ours = tile_anchors(height, width, STRIDES[:4])
    assert torch.allclose(ours, torch.tensor(loop_anchors(height, width, STRIDES[:4])), atol=1e-4)


@pytest.mark.parametrize(("size", "levels", "count"), [(320, 4, 6375), (512, 4, 16320), (1024, 5, 65472)])
def test_counts_of_the_paper(size, levels, count):
    assert len(tile_anchors(size, size, STRIDES[:levels])) == count
    assert sum(count_anchors(size, size, STRIDES[:levels])) == count


def test_anchors_are_not_clipped():
    anchors = tile_anchors(64, 64, STRIDES[:4])
    assert anchors.min() < 0
    assert anchors.max() > 64
