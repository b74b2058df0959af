"""RefineDet++ and its peers behind one interface: the same backbone, weights, input and classes.

B images, H W pixels, G boxes in one image
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from refinedet.model import RefineDet, RefineDetConfig, detection_loss, load_weights
from refinedet.model.norms import freeze_norms
from refinedet.model.structures import Targets
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet, RetinaNetHead
from torchvision.models.detection.ssd import SSD, SSDHead
from torchvision.ops import FeaturePyramidNetwork

Detected = list[dict[str, Tensor]]
"""boxes [N, 4] xyxy pixels of the input, scores [N], labels [N] 1..num_classes, of each image"""


class Peer(nn.Module):
    """A detector that trains on uint8 images [B, 3, H, W] and `Targets`, and detects on the same images."""

    def losses(self, images: Tensor, targets: Sequence[Targets]) -> Mapping[str, Tensor]:
        """The parts of the loss, scalars."""
        raise NotImplementedError

    def detect(self, images: Tensor) -> Detected:
        raise NotImplementedError


class RefineDetPeer(Peer):
    """This project's detector."""

    def __init__(self, config: RefineDetConfig, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.detector = RefineDet(config)
        unset = [name for name in load_weights(self.detector, weights).missing if name.startswith("backbone.body.")]
        if unset:
            raise ValueError(f"the weights leave {len(unset)} tensors of the backbone unset ({unset[0]}, ...).")

    def losses(self, images: Tensor, targets: Sequence[Targets]) -> Mapping[str, Tensor]:
        return detection_loss(self.detector(images, targets), targets, self.detector.config).parts()

    def detect(self, images: Tensor) -> Detected:
        return [{"boxes": d.boxes, "scores": d.scores, "labels": d.labels} for d in self.detector.detect(images)]


class SsdPeer(Peer):
    """torchvision's SSD head. Its levels are 1x1 convolutions to `channels` with batch norm, at strides 8 to 64."""

    def __init__(self, config: RefineDetConfig, weights: Mapping[str, Tensor], channels: int = 128) -> None:
        super().__init__()
        size = config.input_size
        # Sides 32 to 256 pixels as RefineDet++'s anchors have, with SSD's own aspects and square in between.
        scales = [32 / size, 64 / size, 128 / size, 256 / size, max(1.0, 320 / size)]
        anchors = DefaultBoxGenerator([[2]] * 4, scales=scales, steps=[8, 16, 32, 64])
        classes = config.num_classes + 1
        self.detector = SSD(
            Levels(config, weights, channels), anchors, (size, size), classes,
            head=SSDHead([channels] * 4, anchors.num_anchors_per_location(), classes), image_mean=[0.5] * 3,
            image_std=[0.5] * 3, score_thresh=0.01, nms_thresh=0.45, detections_per_img=200, topk_candidates=400,
        )  # fmt: skip

    def losses(self, images: Tensor, targets: Sequence[Targets]) -> Mapping[str, Tensor]:
        kept = [row for row, target in enumerate(targets) if len(target.labels)]  # SSD takes no image without objects
        pixels = images.float().div(255)
        truth = [{"boxes": targets[row].boxes, "labels": targets[row].labels} for row in kept]
        return self.detector([pixels[row] for row in kept], truth)

    def detect(self, images: Tensor) -> Detected:
        return self.detector(list(images.float().div(255)))


class PyramidPeer(Peer):
    """A peer of torchvision's that reads a feature pyramid, and has no class for the background."""

    detector: nn.Module

    def losses(self, images: Tensor, targets: Sequence[Targets]) -> Mapping[str, Tensor]:
        truth = [{"boxes": target.boxes, "labels": target.labels - 1} for target in targets]
        return self.detector(list(images.float().div(255)), truth)

    def detect(self, images: Tensor) -> Detected:
        return [{**found, "labels": found["labels"] + 1} for found in self.detector(list(images.float().div(255)))]


class RetinaNetPeer(PyramidPeer):
    """torchvision's RetinaNet: nine anchors a place from 32 pixels at stride 8, four convolutions in each head."""

    def __init__(self, config: RefineDetConfig, weights: Mapping[str, Tensor], channels: int = 128) -> None:
        super().__init__()
        sides = tuple(tuple(round(32 * 2 ** (level + third / 3)) for third in range(3)) for level in range(4))
        anchors = AnchorGenerator(sides, ((0.5, 1.0, 2.0),) * 4)
        body, classes = Pyramid(config, weights, channels), config.num_classes
        head = RetinaNetHead(channels, anchors.num_anchors_per_location()[0], classes, norm_layer=nn.BatchNorm2d)
        self.detector = RetinaNet(
            body, classes, head=head, anchor_generator=anchors, min_size=config.input_size, max_size=config.input_size,
            image_mean=[0.5] * 3, image_std=[0.5] * 3, score_thresh=0.01, nms_thresh=0.5, detections_per_img=200,
        )  # fmt: skip


class FcosPeer(PyramidPeer):
    """torchvision's FCOS: no anchors, a centre-ness of its own, group norm in its heads."""

    def __init__(self, config: RefineDetConfig, weights: Mapping[str, Tensor], channels: int = 128) -> None:
        super().__init__()
        anchors = AnchorGenerator(((8,), (16,), (32,), (64,)), ((1.0,),) * 4)
        body = Pyramid(config, weights, channels)
        self.detector = FCOS(
            body, config.num_classes, anchor_generator=anchors, min_size=config.input_size,
            max_size=config.input_size, image_mean=[0.5] * 3, image_std=[0.5] * 3, score_thresh=0.01,
            nms_thresh=0.6, detections_per_img=200,
        )  # fmt: skip


class Levels(nn.Module):
    """The backbone's maps and one coarser, each as `channels` channels of unit scale."""

    def __init__(self, config: RefineDetConfig, weights: Mapping[str, Tensor], channels: int) -> None:
        super().__init__()
        source = RefineDetPeer(dataclasses.replace(config, tcb_channels=1), weights).detector.backbone
        self.body = timm.create_model(config.backbone, features_only=True, out_indices=source.wanted)
        self.body.load_state_dict(source.body.state_dict(), strict=False)  # `out_indices` drops the last stage
        widths = self.body.feature_info.channels()
        self.extra = nn.Sequential(*_conv(widths[-1], 256, 1), *_conv(256, 256, 3, stride=2))
        self.laterals = nn.ModuleList(nn.Sequential(*_conv(width, channels, 1)) for width in (*widths, 256))
        self.out_channels = [channels] * 4  # read by torchvision
        self.frozen = config.norm == "frozen"

    def train(self, mode: bool = True) -> Levels:
        super().train(mode)
        if self.frozen:
            freeze_norms(self.body)
        return self

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.body(x)
        maps.append(self.extra(maps[-1]))
        levels = zip(self.laterals, maps, strict=True)
        return OrderedDict((str(level), lateral(y)) for level, (lateral, y) in enumerate(levels))


class Pyramid(nn.Module):
    """torchvision's feature pyramid over the backbone's maps and one coarser."""

    def __init__(self, config: RefineDetConfig, weights: Mapping[str, Tensor], channels: int) -> None:
        super().__init__()
        self.levels = Levels(config, weights, channels)
        self.pyramid = FeaturePyramidNetwork([channels] * 4, channels, norm_layer=nn.BatchNorm2d)
        self.out_channels = channels  # read by torchvision

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        return self.pyramid(self.levels(x))


def _conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return [conv, nn.BatchNorm2d(out_channels), nn.ReLU()]


PEERS: dict[str, Callable[..., Peer]] = {
    "refinedet": RefineDetPeer,
    "ssd": SsdPeer,
    "retinanet": RetinaNetPeer,
    "fcos": FcosPeer,
}


def build_peer(
    name: str, config: RefineDetConfig, weights: Mapping[str, Tensor], seed: int = 0, **options: Any
) -> Peer:
    """A peer of `PEERS`, its backbone from `weights`; initialised alike in every process."""
    torch.manual_seed(seed)
    return PEERS[name](config, weights, **options).train()
