"""The predictors of the ARM and of the ADM (sections III-C and III-D).

B images, A anchors per image (level, y, x, aspect), F_l channels and H_l W_l cells of level l, K kernel size,
O outputs an anchor (4 deltas, then the classes, background first), N chosen anchors
"""

# torchvision ships no types.
# pyright: reportMissingTypeStubs=false

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from .anchors import ASPECTS
from .layers import Bottleneck, build_conv
from .ops.align_conv import align_conv
from .portable import align_conv_portable
from .structures import Rows

NUM_ASPECTS = len(ASPECTS)
BLOCK_WIDTH, BLOCK_CHANNELS = 256, 1024  # the Caffe release's bottleneck before each ResNet predictor


class Head(nn.Module):
    """One predictor a level, nothing shared between levels; the part that the ARM and the ADM have in common.

    `cls` and `box` hold a convolution for each level, with NUM_ASPECTS * C and NUM_ASPECTS * 4 outputs. The two are
    computed as one, so that features are read once.
    """

    def __init__(self, in_channels: Sequence[int], num_classes: int, kernel_size: int, block: bool) -> None:
        super().__init__()
        self.num_outputs, self.kernel_size = 4 + num_classes, kernel_size
        self.blocks = nn.ModuleList(
            Bottleneck(width, BLOCK_WIDTH, BLOCK_CHANNELS) if block else nn.Identity() for width in in_channels
        )
        self.widths = [BLOCK_CHANNELS if block else width for width in in_channels]
        self.cls = nn.ModuleList(build_conv(width, NUM_ASPECTS * num_classes, kernel_size) for width in self.widths)
        self.box = nn.ModuleList(build_conv(width, NUM_ASPECTS * 4, kernel_size) for width in self.widths)

    def transform(self, features: Sequence[Tensor]) -> list[Tensor]:
        return [block(x) for block, x in zip(self.blocks, features, strict=True)]

    def join_filters(self) -> tuple[list[Tensor], list[Tensor]]:
        """Weights [aspects, O, F, K, K], channels innermost in memory, and biases [aspects, O] of each level."""
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for pair in cast(Iterable[tuple[nn.Conv2d, nn.Conv2d]], zip(self.box, self.cls, strict=True)):
            filters = [torch.unflatten(conv.weight, 0, (NUM_ASPECTS, -1)).permute(0, 1, 3, 4, 2) for conv in pair]
            offsets = [torch.unflatten(cast(Tensor, conv.bias), 0, (NUM_ASPECTS, -1)) for conv in pair]
            weights.append(torch.cat(filters, dim=1).permute(0, 1, 4, 2, 3))
            biases.append(torch.cat(offsets, dim=1))
        return weights, biases

    def predict_dense(self, features: Sequence[Tensor]) -> Tensor:
        """Every anchor by plain convolution: maps after `transform` -> [B, A, O], fp32."""
        outputs: list[Tensor] = []
        for x, weight, bias in zip(features, *self.join_filters(), strict=True):
            y = F.conv2d(x, weight.flatten(0, 1), bias.flatten(), padding=self.kernel_size // 2)
            outputs.append(flatten_outputs(y, self.num_outputs))
        return torch.cat(outputs, dim=1)


class AnchorRefinementHead(Head):
    """The ARM's: object or not, and a first regression."""

    def __init__(self, in_channels: Sequence[int], block: bool) -> None:
        super().__init__(in_channels, num_classes=2, kernel_size=3, block=block)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Maps [B, F_l, H_l, W_l] -> deltas [B, A, 4], logits [B, A, 2]; fp32."""
        return split_outputs(self.predict_dense(self.transform(features)))


class DetectionHead(Head):
    """The ADM's: classes and the second regression, by AlignConv, deformable or plain convolution."""

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        *,
        kind: str,
        kernel_size: int,
        block: bool,
        strides: Sequence[int],
    ) -> None:
        super().__init__(in_channels, num_classes, kernel_size, block)
        self.kind, self.strides = kind, tuple(strides)
        self.portable = False  # AlignConv from standard operators, for exports; set by `export.export_program`
        self.offsets = nn.ModuleList()
        if kind == "deform":
            for width in self.widths:  # as in deformable convolution's paper: offsets start at zero
                offset = nn.Conv2d(width, 2 * kernel_size**2, kernel_size, padding=kernel_size // 2)
                nn.init.zeros_(offset.weight)
                nn.init.zeros_(cast(Tensor, offset.bias))
                self.offsets.append(offset)

    def forward(
        self, features: Sequence[Tensor], boxes: Tensor, rows: Rows | None, order: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Predict for the chosen anchors.

        features  maps [B, F_l, H_l, W_l]
        boxes     [N, 4]  the refined anchor of each row, xyxy pixels, without gradient
        rows      the N anchors that are computed; None: every anchor, in their own order
        order     [B * A + 1]  `anchors.order_rows` of the batch, where `rows` is None
        returns   deltas [N, 4], logits [N, C]; fp32
        """
        features = self.transform(features)
        if self.kind == "align":
            outputs = self._predict_aligned(features, boxes, rows, order)
        else:
            dense = self.predict_dense(features) if self.kind == "vanilla" else self._predict_deformable(features)
            outputs = dense.flatten(0, 1)
            outputs = outputs if rows is None else outputs[rows.anchor.clamp(max=len(outputs) - 1)]
        return split_outputs(outputs)

    def _predict_aligned(
        self, features: Sequence[Tensor], boxes: Tensor, rows: Rows | None, order: Tensor | None
    ) -> Tensor:
        weights, biases = self.join_filters()
        if self.portable and rows is None:
            boxes = torch.unflatten(boxes, 0, (features[0].shape[0], -1))
            return align_conv_portable(features, self.strides, boxes, weights, biases).flatten(0, 1).float()
        if rows is not None:
            return align_conv(features, self.strides, boxes, rows.place, weights, biases).float()
        assert order is not None
        order = order[:-1]
        every = torch.arange(len(order), device=order.device)
        outputs = align_conv(features, self.strides, boxes[order], every, weights, biases).float()
        return torch.empty_like(outputs).index_copy(0, order, outputs)

    def _predict_deformable(self, features: Sequence[Tensor]) -> Tensor:
        outputs: list[Tensor] = []
        for x, offset, weight, bias in zip(features, self.offsets, *self.join_filters(), strict=True):
            half, filters = self.kernel_size // 2, weight.flatten(0, 1).float()
            # In fp32, as autocast runs it on CUDA; torchvision's CPU kernel has no bf16.
            y = deform_conv2d(x.float(), offset(x).float(), filters, bias.flatten().float(), padding=(half, half))
            outputs.append(flatten_outputs(y, self.num_outputs))
        return torch.cat(outputs, dim=1)


def flatten_outputs(x: Tensor, num_outputs: int) -> Tensor:
    """[B, aspects * O, H, W] -> [B, H * W * aspects, O], fp32."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, num_outputs).float()


def split_outputs(outputs: Tensor) -> tuple[Tensor, Tensor]:
    """[..., O] -> deltas [..., 4], logits [..., O - 4]."""
    return outputs[..., :4], outputs[..., 4:]
