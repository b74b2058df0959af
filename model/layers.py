"""Convolutions and blocks that the parts of the detector share, with their initialisation.

B images, F channels, H W cells
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .norms import BatchNorm

NEW_BLOCK_STD = 0.01  # section IV-G: new blocks of ResNet and ResNeXt start from N(0, 0.01)


class L2Norm(nn.Module):
    """Scale every cell's feature vector to a learned length, per channel (ParseNet; section IV-B).

    x  [B, F, H, W]
    """

    def __init__(self, num_channels: int, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((num_channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        length = x.float().square().sum(dim=1, keepdim=True).add(1e-10).sqrt()
        return (x / length.to(x.dtype)) * self.weight.to(x.dtype)[:, None, None]


class Bottleneck(nn.Module):
    """A residual bottleneck with projection: 1x1, 3x3, 1x1. The stride is in the 3x3, as in torchvision's weights."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = BatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = BatchNorm(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = BatchNorm(out_channels)
        self.project = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
        self.project_bn = BatchNorm(out_channels)
        for conv in (self.conv1, self.conv2, self.conv3, self.project):
            nn.init.normal_(conv.weight, std=NEW_BLOCK_STD)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.project_bn(self.project(x)))


def init_xavier_(weight: Tensor) -> None:
    """Caffe's "xavier": uniform with variance 1 / fan_in, whatever the number of outputs.

    weight  [outputs, F, K, K]
    """
    bound = math.sqrt(3.0 / weight[0].numel())
    nn.init.uniform_(weight, -bound, bound)


def build_conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    """A convolution of the reduced VGG's kind: xavier, bias 0, padded to keep its size over its stride."""
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, dilation * (kernel // 2), dilation)
    init_xavier_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def build_conv_block(conv: nn.Conv2d | nn.ConvTranspose2d, norm: bool) -> nn.Module:
    """Append BN to a convolution, which then needs no bias and starts from N(0, 0.01)."""
    if not norm:
        return conv
    conv.bias = None
    nn.init.normal_(conv.weight, std=NEW_BLOCK_STD)
    return nn.Sequential(conv, BatchNorm(conv.out_channels))
