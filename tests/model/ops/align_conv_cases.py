"""Problems for the tests of AlignConv, and its definition as slow, obvious loops."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from refinedet.model.ops import library
from torch import Tensor

needs_library = pytest.mark.skipif(not library.describe_library().loaded, reason=library.describe_library().reason)


@dataclass(frozen=True)
class Case:
    """Arguments of `align_conv`."""

    features: list[Tensor]
    strides: list[int]
    boxes: Tensor
    index: Tensor  # row numbers
    weight: list[Tensor]
    bias: list[Tensor]

    def arguments(self) -> tuple:
        return self.features, self.strides, self.boxes, self.index, self.weight, self.bias

    def parameters(self) -> list[Tensor]:
        return [*self.features, *self.weight, *self.bias]

    def to(self, *options) -> Case:
        """The features and filters elsewhere, or of another dtype; boxes stay as they are unless moved."""
        moved = [[tensor.to(*options) for tensor in part] for part in (self.features, self.weight, self.bias)]
        return replace(self, features=moved[0], weight=moved[1], bias=moved[2])

    def rows(self, chosen: Tensor) -> Case:
        return replace(self, boxes=self.boxes[chosen], index=self.index[chosen])


def make_case(
    *,
    sizes: tuple[tuple[int, int], ...] = ((6, 8), (3, 4), (2, 2)),
    batch: int = 2,
    channels: int = 8,
    outputs: int = 7,
    kernel: int = 3,
    aspects: int = 3,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """All anchors of a small pyramid, with boxes around, across and beyond the image."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    count = batch * aspects * sum(height * width for height, width in sizes)
    height, width = sizes[0][0] * 8, sizes[0][1] * 8
    centre = (
        torch.rand(count, 2, generator=generator) * torch.tensor([width, height]) * 1.4
        - torch.tensor([width, height]) * 0.2
    )
    side = torch.rand(count, 2, generator=generator) * 0.8 * height
    return Case(
        features=[random(batch, channels, *size) for size in sizes],
        strides=[8 * 2**level for level in range(len(sizes))],
        boxes=torch.cat([centre - side / 2, centre + side / 2], dim=1),
        index=torch.arange(count),
        weight=[random(aspects, outputs, channels, kernel, kernel) / (channels * kernel**2) ** 0.5 for _ in sizes],
        bias=[random(aspects, outputs) for _ in sizes],
    )


def align_conv_by_loops(case: Case) -> Tensor:
    """The definition: [N, O] in fp64."""
    aspects, outputs, channels, kernel, _ = case.weight[0].shape
    sizes = [feature.shape[-2:] for feature in case.features]
    batch, anchors = case.features[0].shape[0], sum(height * width for height, width in sizes) * aspects
    result = torch.zeros(len(case.index), outputs, dtype=torch.float64)
    for row, (number, box) in enumerate(zip(case.index.tolist(), case.boxes.double().tolist(), strict=True)):
        if number >= batch * anchors:
            continue
        level = 0
        while number >= sizes[level][0] * sizes[level][1] * aspects * batch:
            number -= sizes[level][0] * sizes[level][1] * aspects * batch
            level += 1
        cells = sizes[level][0] * sizes[level][1]
        aspect, image = number // (cells * batch), number // cells % batch
        feature = case.features[level][image].detach().double()
        total = case.bias[level][aspect].detach().double().clone()
        for tap_y in range(kernel):
            for tap_x in range(kernel):
                y = (box[1] + (box[3] - box[1]) * (tap_y + 0.5) / kernel) / case.strides[level] - 0.5
                x = (box[0] + (box[2] - box[0]) * (tap_x + 0.5) / kernel) / case.strides[level] - 0.5
                sample = torch.zeros(channels, dtype=torch.float64)
                if math.isfinite(y) and math.isfinite(x):
                    for corner_y in (math.floor(y), math.floor(y) + 1):
                        for corner_x in (math.floor(x), math.floor(x) + 1):
                            if 0 <= corner_y < feature.shape[1] and 0 <= corner_x < feature.shape[2]:
                                share = (1 - abs(y - corner_y)) * (1 - abs(x - corner_x))
                                sample += share * feature[:, corner_y, corner_x]
                total += case.weight[level][aspect, :, :, tap_y, tap_x].detach().double() @ sample
        result[row] = total
    return result


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))


def outputs_and_gradients(function, case: Case, gradient: Tensor) -> list[Tensor]:
    """The output, then the gradients of features, weights and biases."""
    leaves = [tensor.detach().requires_grad_() for tensor in case.parameters()]
    levels = len(case.strides)
    output = function(
        leaves[:levels], case.strides, case.boxes, case.index, leaves[levels : 2 * levels], leaves[2 * levels :]
    )
    gradients = torch.autograd.grad(output, leaves, gradient.to(output.dtype))
    return [output.detach(), *gradients]
