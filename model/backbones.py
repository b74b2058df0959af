"""Backbones: images in, one feature map a detection level out (sections IV-B, IV-C, V-C).

B images, F_l channels of level l, H_l W_l its cells: the input's sides over stride 8, 16, 32, 64 (, 128)
"""

# torch's `checkpoint` is typed in part.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import timm
import torch.nn.functional as F
from timm.models import FeatureListNet
from timm.models.resnet import Bottleneck as TimmBottleneck
from timm.models.resnet import ResNet
from torch import Tensor, nn
from torch.utils import checkpoint

from .backbone_names import RESNETS, check_backbone
from .config import VGG16_REDUCED, MapNorm, RefineDetConfig
from .layers import Bottleneck, L2Norm, build_conv
from .norms import BatchNorm, hold_statistics

# Mean and standard deviation of RGB in 0..255, as torchvision's and timm's ImageNet weights expect them.
IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)

# What the Caffe release takes from BGR in 0..255, here in RGB order.
CAFFE_MEAN, CAFFE_STD = (123.0, 117.0, 104.0), (1.0, 1.0, 1.0)

VGG_SCALES = (10.0, 8.0)  # of the L2 norms of conv4_3 and conv5_3 (section IV-B); the other two maps have none

EXTRA_WIDTH, EXTRA_CHANNELS = 128, 512  # res6, and res7 alike: the paper gives res7 no size


class TimmBackbone(nn.Module):
    """Any timm network with `features_only`, its maps at strides 8, 16 and 32, and residual blocks for coarser ones.

    Maps are normalised on their way out: a network may end its stages with a linear layer whose channels differ in
    scale by orders of magnitude, and the predictors' learning rate suits maps of unit scale only.

    `channels` holds the F_l; `mean` and `std` what the network expects of its input; `trained` begins the names of the
    tensors that weights of a classifier hold.
    """

    trained = ("body.",)

    def __init__(self, name: str, num_levels: int, map_norm: MapNorm, checkpointing: bool = False) -> None:
        super().__init__()
        body, self.mean, self.std = _create_body(name)
        self.body: Any = body  # timm declares no type for networks with `features_only`
        self.channels_last = str(getattr(body, "output_fmt", "")).endswith("NHWC")
        info = self.body.feature_info
        wanted = [list(info.reduction()).index(stride) for stride in (8, 16, 32)]
        self.wanted = tuple(wanted)
        self.channels = [info.channels()[position] for position in wanted]
        self.extra = nn.ModuleList()
        while len(self.channels) < num_levels:
            self.extra.append(Bottleneck(self.channels[-1], EXTRA_WIDTH, EXTRA_CHANNELS, stride=2))
            self.channels.append(EXTRA_CHANNELS)
        self.norms = _build_norms(map_norm, self.channels, [math.sqrt(width) for width in self.channels])
        self.checkpointing = checkpointing
        if checkpointing and not isinstance(self.body, FeatureListNet):
            _checkpoint_blocks(self.body, name)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [B, 3, H, W], normalised -> normalised maps [B, F_l, H_l, W_l], fine to coarse."""
        recompute = self.checkpointing and self.training and isinstance(self.body, FeatureListNet)
        features = self._run_by_blocks(x) if recompute else self.body(x)
        maps: list[Tensor] = []
        for stride, position in zip((8, 16, 32), self.wanted, strict=True):
            y = features[position].permute(0, 3, 1, 2) if self.channels_last else features[position]
            size = (x.shape[2] // stride, x.shape[3] // stride)
            if y.shape[2:] != size:  # Inception pads nothing, so that its maps lack cells at the borders
                y = F.interpolate(y, size, mode="bilinear", align_corners=False)
            maps.append(y)
        for block in self.extra:
            maps.append(block(maps[-1]))
        return [norm(y) for norm, y in zip(self.norms, maps, strict=True)]

    def _run_by_blocks(self, x: Tensor) -> list[Tensor]:
        """The body's forward, keeping of each residual block its input alone."""
        features: list[Tensor] = []
        for name, stage in self.body.items():
            if isinstance(stage, nn.Sequential):
                for block in stage:
                    # A stem is a sequence of single layers, some of them in-place: nothing to save there.
                    x = run_checkpointed(block, x) if len(list(block.children())) else block(x)
            else:
                x = stage(x)
            if name in self.body.return_layers:
                features.append(x)
        return features


class ReducedVgg16(nn.Module):
    """VGG-16 with fc6 and fc7 as convolutions (DeepLab-LargeFOV), conv6 (and conv7) on top.

    `map_norm` "l2" normalises conv4_3 and conv5_3 to 10 and 8; the normalised maps feed both the ARM and the TCBs.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    trained = tuple(f"stages.{number}." for number in range(6))

    def __init__(self, num_levels: int, map_norm: MapNorm, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.stages = nn.ModuleList()
        in_channels = 3
        for channels, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            layers: list[nn.Module] = [nn.MaxPool2d(2, 2)] if self.stages else []
            for _ in range(depth):
                layers += [build_conv(in_channels, channels, 3), nn.ReLU(inplace=True)]
                in_channels = channels
            self.stages.append(nn.Sequential(*layers))
        fc6, fc7 = build_conv(512, 1024, 3, dilation=3), build_conv(1024, 1024, 1)
        self.stages.append(nn.Sequential(nn.MaxPool2d(2, 2), fc6, nn.ReLU(inplace=True), fc7, nn.ReLU(inplace=True)))
        self.channels = [512, 512, 1024]
        while len(self.channels) < num_levels:
            squeeze, stride = build_conv(self.channels[-1], 256, 1), build_conv(256, 512, 3, stride=2)
            self.stages.append(nn.Sequential(squeeze, nn.ReLU(inplace=True), stride, nn.ReLU(inplace=True)))
            self.channels.append(512)
        self.norms = _build_norms(map_norm, self.channels, VGG_SCALES)

    def forward(self, x: Tensor) -> list[Tensor]:
        """x [B, 3, H, W], normalised -> normalised maps [B, F_l, H_l, W_l], fine to coarse."""
        maps: list[Tensor] = []
        for number, stage in enumerate(self.stages):
            x = run_checkpointed(stage, x) if self.checkpointing and self.training else stage(x)
            if number >= 3:
                maps.append(x)
        return [norm(y) for norm, y in zip(self.norms, maps, strict=True)]


def _build_norms(kind: MapNorm, channels: Sequence[int], scales: Sequence[float]) -> nn.ModuleList:
    """One norm for each map; "l2" normalises as many maps as there are scales."""
    if kind == "batch":
        return nn.ModuleList(BatchNorm(width) for width in channels)
    l2 = [L2Norm(width, scale) for width, scale in zip(channels, scales, strict=False)] if kind == "l2" else []
    return nn.ModuleList([*l2, *(nn.Identity() for _ in channels[len(l2) :])])


def run_checkpointed(module: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """`module(x)`, whose inside is computed again in the backward pass instead of kept.

    forward  what to call; default: the module itself
    """
    contexts = lambda: (nullcontext(), hold_statistics(module))  # noqa: E731
    return checkpoint.checkpoint(forward or module, x, use_reentrant=False, context_fn=contexts)


def _checkpoint_blocks(body: Any, name: str) -> None:
    """Recompute each block of a network that timm runs itself. Its own checkpointing would count statistics twice."""
    blocks = [block for stage in getattr(body, "blocks", ()) for block in stage]
    if not blocks:
        raise ValueError(f"activation_checkpointing is not known for backbone {name!r}: set it to false.")
    for block in blocks:
        block.forward = partial(_forward_block, block, block.forward)


def _forward_block(block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return run_checkpointed(block, x, forward) if block.training else forward(x)


def build_backbone(config: RefineDetConfig) -> TimmBackbone | ReducedVgg16:
    """The backbone of a config, freshly initialised; `weights.load_weights` fills in trained ones."""
    if config.backbone == VGG16_REDUCED:
        return ReducedVgg16(config.levels, config.map_norm or "l2", config.activation_checkpointing)
    return TimmBackbone(config.backbone, config.levels, config.map_norm or "batch", config.activation_checkpointing)


def _create_body(name: str) -> tuple[Any, tuple[float, ...], tuple[float, ...]]:
    if name in RESNETS:
        layers, cardinality, base_width = RESNETS[name]
        block: Any = TimmBottleneck
        net = ResNet(block, layers, num_classes=0, cardinality=cardinality, base_width=base_width)
        return FeatureListNet(net, out_indices=(0, 1, 2, 3, 4)), IMAGENET_MEAN, IMAGENET_STD
    check_backbone(name)
    body: Any = timm.create_model(name, pretrained=False, features_only=True)
    source = timm.get_pretrained_cfg(name)
    mean, std = (source.mean, source.std) if source else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return body, tuple(255.0 * value for value in mean), tuple(255.0 * value for value in std)
