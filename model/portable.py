"""AlignConv from standard operators alone, for ONNX, `torch.export` and counting FLOPs (section III-D).

B images, A anchors per image, F channels, H W cells of a level, K kernel size, O outputs; every anchor is computed

The KxK samples of a box go through `grid_sample`, whose normalised coordinates make the alignment plain: a level's
cell centres lie at (i + 0.5) * stride pixels, so -1..1 over the map is -1..1 over the image, and pixel p is at
2 p / side - 1 on every level. One matrix product for each anchor shape follows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def align_conv_portable(
    features: Sequence[Tensor],
    strides: Sequence[int],
    boxes: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
) -> Tensor:
    """`refinedet.model.ops.align_conv` of every anchor, in operators that exporters support.

    features  a level each: [B, F, H, W]
    boxes     [B, A, 4]  xyxy, pixels of the image
    weight    a level each: [aspects, O, F, K, K]
    bias      a level each: [aspects, O]
    returns   [B, A, O]
    """
    aspects, num_outputs, _, kernel, _ = weight[0].shape
    parts = (torch.arange(kernel, device=boxes.device, dtype=boxes.dtype) + 0.5) / kernel
    outputs: list[Tensor] = []
    start = 0
    for feature, stride, filters, offset in zip(features, strides, weight, bias, strict=True):
        _, channels, height, width = feature.shape
        cells = height * width
        own = boxes[:, start : start + cells * aspects].view(-1, cells, aspects, 4)
        start += cells * aspects
        shapes: list[Tensor] = []
        for aspect in range(aspects):
            box = own[:, :, aspect]
            corner, side = box[..., :2], box[..., 2:] - box[..., :2]
            points = corner[:, :, None] + side[:, :, None] * parts[:, None]  # [B, H W, K, (x, y)]
            x = 2 * points[:, :, None, :, 0] / (width * stride) - 1
            y = 2 * points[:, :, :, None, 1] / (height * stride) - 1
            shape = (-1, cells, kernel, kernel)
            grid = torch.stack([x.expand(shape), y.expand(shape)], dim=-1).flatten(2, 3).to(feature.dtype)
            samples = F.grid_sample(feature, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
            columns = samples.permute(0, 2, 3, 1).reshape(-1, kernel * kernel * channels)
            matrix = filters[aspect].permute(2, 3, 1, 0).reshape(-1, num_outputs)
            shapes.append(torch.addmm(offset[aspect], columns, matrix).view(-1, cells, num_outputs))
        outputs.append(torch.stack(shapes, dim=2).flatten(1, 2))
    return torch.cat(outputs, dim=1)
