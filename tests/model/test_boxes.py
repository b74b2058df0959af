from __future__ import annotations

import numpy as np
import torch
from refinedet.model.anchors import tile_anchors
from refinedet.model.boxes import decode_boxes, encode_boxes, paired_overlaps


def loop_iou(box, anchor) -> np.float32:
    """IoU in single precision, one operation at a time."""
    box, anchor = np.float32(box), np.float32(anchor)
    width = max(min(box[2], anchor[2]) - max(box[0], anchor[0]), np.float32(0))
    height = max(min(box[3], anchor[3]) - max(box[1], anchor[1]), np.float32(0))
    intersection = width * height
    union = (box[2] - box[0]) * (box[3] - box[1]) + (anchor[2] - anchor[0]) * (anchor[3] - anchor[1]) - intersection
    return min(intersection / max(union, np.float32(1e-12)), np.float32(1))


def test_decode_of_encode_is_identity_at_1024():
    """To 1e-4 pixel for every pair that matching makes; fp32 holds no coordinate near 1024 closer than 3e-5."""
    generator = torch.Generator().manual_seed(0)
    anchors = tile_anchors(1024, 1024, (8, 16, 32, 64, 128))
    for _ in range(8):
        sides = torch.exp(2 + 4.8 * torch.rand(64, 2, generator=generator))  # 7 to 900 pixels
        corner = torch.rand(64, 2, generator=generator) * (1024 - sides)
        boxes = torch.cat([corner, corner + sides], dim=1)
        overlaps = paired_overlaps(boxes, anchors)
        matched = overlaps >= 0.5
        matched[torch.arange(64), overlaps.argmax(dim=1)] = True
        box, anchor = matched.nonzero().unbind(1)
        error = decode_boxes(encode_boxes(boxes[box], anchors[anchor]), anchors[anchor]) - boxes[box]
        assert error.abs().max() < 1e-4
        far = torch.randint(0, len(anchors), (64,), generator=generator)
        assert (decode_boxes(encode_boxes(boxes, anchors[far]), anchors[far]) - boxes).abs().max() < 1e-3


def test_deltas_follow_the_formula():
    anchor, box = torch.tensor([[10.0, 20, 50, 40]]), torch.tensor([[14.0, 18, 44, 48]])
    dx, dy = (29 - 30) / 40 / 0.1, (33 - 30) / 20 / 0.1
    dw, dh = np.log(30 / 40) / 0.2, np.log(30 / 20) / 0.2
    assert torch.allclose(encode_boxes(box, anchor), torch.tensor([[dx, dy, dw, dh]], dtype=torch.float32), atol=1e-5)


def test_box_arithmetic_is_fp32_whatever_comes_in():
    boxes = torch.tensor([[0.0, 0, 8, 8]])
    assert decode_boxes(torch.zeros(1, 4, dtype=torch.bfloat16), boxes.bfloat16()).dtype == torch.float32
    assert encode_boxes(boxes.half(), boxes.half()).dtype == torch.float32


def test_wild_deltas_stay_finite():
    anchors = tile_anchors(64, 64, (8, 16, 32, 64))
    for value in (1e4, -1e4):
        boxes = decode_boxes(torch.full((len(anchors), 4), value), anchors)
        assert boxes.isfinite().all()
        assert encode_boxes(anchors, boxes).isfinite().all()


def test_overlaps_are_those_of_the_loop():
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(2, 12, 2, generator=generator) * 40
    boxes = torch.cat([corners, corners + torch.rand(2, 12, 2, generator=generator) * 30], dim=-1)
    boxes[0, 0, 2:] = boxes[0, 0, :2]
    boxes[1, 0] = boxes[0, 3]
    ours = paired_overlaps(boxes[0], boxes[1])
    for i, box in enumerate(boxes[0].numpy()):
        for j, anchor in enumerate(boxes[1].numpy()):
            assert ours[i, j].item() == loop_iou(box, anchor)
    assert ours[3, 0] == 1
    assert ours[0].max() == 0


def test_overlap_of_two_boxes_without_area_is_zero():
    point = torch.tensor([[5.0, 5, 5, 5]])
    assert paired_overlaps(point, point).item() == 0
