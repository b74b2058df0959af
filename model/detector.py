"""RefineDet++, whole (figure 1): backbone, ARM, TCBs, ADM.

B images, A anchors an image, H W pixels, multiples of the coarsest stride, N rows that the ADM computes
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .anchors import count_anchors, tile_anchors
from .backbones import CAFFE_MEAN, CAFFE_STD, TimmBackbone, build_backbone
from .boxes import decode_boxes
from .config import VGG16_REDUCED, RefineDetConfig
from .filtering import select_survivors, select_trained_rows
from .heads import AnchorRefinementHead, DetectionHead
from .inference import select_detections
from .matching import match_anchors
from .norms import freeze_norms, synchronize_norms
from .structures import AnyTargets, Detections, Matches, Predictions, Targets, as_targets
from .tcb import TransferConnection


class RefineDet(nn.Module):
    """The detector that a `RefineDetConfig` describes.

    `forward` predicts, `loss.detection_loss` scores it against targets, `detect` gives boxes.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: RefineDetConfig) -> None:
        super().__init__()
        self.config = config
        vgg = config.backbone == VGG16_REDUCED
        block = config.prediction_block if config.prediction_block is not None else not vgg
        tcb_norm = config.tcb_norm if config.tcb_norm is not None else not vgg

        self.backbone = build_backbone(config)
        self.arm = self.tcb = None
        adm_channels: Sequence[int] = self.backbone.channels
        if config.tcb:
            self.arm = AnchorRefinementHead(self.backbone.channels, block)
            self.tcb = TransferConnection(self.backbone.channels, config.tcb_channels, tcb_norm)
            adm_channels = self.tcb.channels
        self.adm = DetectionHead(
            adm_channels,
            config.num_classes + 1,
            kind=config.head,
            kernel_size=config.kernel_size,
            block=block,
            strides=config.strides,
        )
        caffe = config.normalization == "caffe"
        mean, std = (CAFFE_MEAN, CAFFE_STD) if caffe else (self.backbone.mean, self.backbone.std)
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        if config.norm == "sync":
            synchronize_norms(self)
        self.train()
        self._anchors: dict[tuple[int, int, torch.device], Tensor] = {}

    def train(self, mode: bool = True) -> RefineDet:
        super().train(mode)
        if self.config.norm == "frozen" and isinstance(self.backbone, TimmBackbone):  # VGG has none to freeze
            freeze_norms(self.backbone.body)
        return self

    def forward(
        self, images: Tensor, targets: Sequence[AnyTargets] | None = None, *, dense: bool = False
    ) -> Predictions:
        """Predict for a batch.

        images   [B, 3, H, W]  RGB, 0..255, uint8 or float; normalised here
        targets  of each image, in training, `Targets` or torchvision's dicts: the ADM then computes what its loss can
                 use, positives included; without them it computes the anchors that survive the negative filter
        dense    compute every anchor in any case: all shapes are then known beforehand, as torch.compile and exports
                 need; the loss and the detections are the same
        """
        anchors = self.anchors(images)
        if targets is not None:
            targets = as_targets(targets, self.config.num_classes, batch=images.shape[0])
        features = self.backbone(self.normalize(images))
        arm_class = arm_box = None
        refined = anchors.expand(images.shape[0], -1, -1)
        transferred = features
        if self.arm is not None and self.tcb is not None:
            arm_box, arm_class = self.arm(features)
            transferred = self.tcb(features)
            if self.config.cascade:
                refined = decode_boxes(arm_box.detach(), anchors)
        index, matches = (None, None) if dense else self._choose_rows(arm_class, refined, targets)
        adm_box, adm_class = self.adm(transferred, refined, index)
        level_anchors = count_anchors(images.shape[-2], images.shape[-1], self.config.strides)
        return Predictions(anchors, refined, arm_class, arm_box, index, adm_class, adm_box, matches, level_anchors)

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[Detections]:
        """Find the objects of each image (section IV-H); images as in `forward`. Call `eval()` first."""
        return select_detections(self(images), self.config)

    def normalize(self, images: Tensor) -> Tensor:
        """RGB 0..255 -> what the backbone expects."""
        normal = (images.to(self.mean.dtype) - self.mean) / self.std
        return normal.flip(1) if self.config.normalization == "caffe" else normal

    def anchors(self, images: Tensor) -> Tensor:
        """The tiled anchors [A, 4] of an input's size, on its device; made once for each."""
        height, width = images.shape[-2:]
        stride = self.config.coarsest_stride
        if height % stride or width % stride or not height or not width:
            raise ValueError(f"images must have sides that are multiples of {stride}, received {height}x{width}.")
        key = (int(height), int(width), images.device)
        if key not in self._anchors:
            with torch.inference_mode(False):  # an inference tensor could not serve in training later
                self._anchors[key] = tile_anchors(key[0], key[1], self.config.strides).to(images.device)
        return self._anchors[key]

    @torch.no_grad()
    def _choose_rows(
        self, arm_class: Tensor | None, refined: Tensor, targets: Sequence[Targets] | None
    ) -> tuple[Tensor | None, Matches | None]:
        """The anchors that the ADM computes (None: all), and the matches where they decided it."""
        config = self.config
        survivors = None
        if arm_class is not None and config.theta < 1.0:
            survivors = select_survivors(arm_class, config.theta)
        if targets is not None:
            matches = match_anchors(refined, targets, config.adm_iou)
            return _locate(select_trained_rows(survivors, matches)), matches
        if survivors is None or config.filter_negatives == "training":
            return None, None
        return _locate(survivors), None


def _locate(rows: Tensor) -> Tensor:
    """[B, A] bool -> [N] flat indices; at least one, so that every parameter always has a gradient."""
    index = rows.flatten().nonzero().squeeze(1)
    return index if len(index) else index.new_zeros(1)
