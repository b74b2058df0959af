"""Transfer connection blocks: the ARM's features into the ADM's (section III-A, figure 2).

B images, F_l channels of level l, T channels of every TCB, H_l W_l cells of level l
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import build_conv, build_conv_block, init_xavier_


class TransferConnectionBlock(nn.Module):
    """One level: convolve, add the enlarged coarser level, convolve. The coarsest adds nothing."""

    def __init__(self, in_channels: int, channels: int, coarsest: bool, norm: bool) -> None:
        super().__init__()
        self.conv1 = build_conv_block(build_conv(in_channels, channels, 3), norm)
        self.conv2 = build_conv_block(build_conv(channels, channels, 3), norm)
        self.conv3 = build_conv_block(build_conv(channels, channels, 3), norm)
        self.enlarge = None
        if not coarsest:
            enlarge = nn.ConvTranspose2d(channels, channels, 2, 2)
            init_xavier_(enlarge.weight)
            assert enlarge.bias is not None
            nn.init.zeros_(enlarge.bias)
            self.enlarge = build_conv_block(enlarge, norm)

    def forward(self, x: Tensor, coarser: Tensor | None) -> Tensor:
        """x [B, F_l, H_l, W_l], coarser [B, T, H_l / 2, W_l / 2] -> [B, T, H_l, W_l]."""
        y = self.conv2(F.relu(self.conv1(x)))
        if self.enlarge is not None and coarser is not None:
            y = y + self.enlarge(coarser)
        return F.relu(self.conv3(F.relu(y)))


class TransferConnection(nn.Module):
    """The TCBs of all levels, coarse to fine."""

    def __init__(self, in_channels: Sequence[int], channels: int, norm: bool) -> None:
        super().__init__()
        last = len(in_channels) - 1
        self.blocks = nn.ModuleList(
            TransferConnectionBlock(width, channels, level == last, norm) for level, width in enumerate(in_channels)
        )
        self.channels = [channels] * len(in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps [B, F_l, H_l, W_l], fine to coarse -> maps [B, T, H_l, W_l]."""
        maps: list[Tensor] = []
        coarser = None
        for block, x in zip(reversed(list(self.blocks)), reversed(features), strict=True):
            coarser = block(x, coarser)
            maps.append(coarser)
        return maps[::-1]
