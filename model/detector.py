"""RefineDet++, whole (figure 1 of the paper): backbone, ARM, TCBs, ADM.

ARM   anchor refinement module: object or not, and a first regression of the tiled anchors
TCB   transfer connection block: joins a backbone map with the next coarser level
ADM   anchor detection module: classes, and a second regression from the refined anchors

B images, A anchors per image, H W pixels, multiples of the coarsest stride, N rows that the ADM computes
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .anchors import count_anchors, order_rows, tile_anchors
from .backbones import CAFFE_MEAN, CAFFE_STD, TimmBackbone, build_backbone
from .boxes import decode_boxes
from .config import VGG16_REDUCED, RefineDetConfig
from .filtering import select_survivors, select_trained_rows
from .heads import AnchorRefinementHead, DetectionHead
from .hub import load_detector, save_detector
from .inference import detect_images, select_batch
from .matching import match_anchors
from .norms import freeze_norms, synchronize_norms
from .ops.align_conv import top_rows
from .structures import AnyTargets, DetectionBatch, Detections, Matches, Predictions, Rows, Targets, as_targets
from .tcb import TransferConnection


class RefineDet(nn.Module):
    """The detector that a `RefineDetConfig` describes.

    To train:   losses = detection_loss(model(images, targets), targets, model.config); losses.total.backward()
    To detect:  model.eval().detect(images), `Detections` of each image in pixels of the input; `predict` takes images
                of any sizes and answers in their own pixels

    images   [B, 3, H, W]  RGB, 0..255, uint8 or float; H and W are multiples of `config.coarsest_stride`
    targets  `Targets` of each image, or torchvision's dicts: boxes [G, 4] xyxy pixels, labels [G] from 1 on

    Four ways to call it; each returns `Predictions`, from which `detection_loss` and `select_batch` start:

    model(images, targets)       rows that the loss can use: positives, and negatives that survive the filter
    model(images)                the anchors that survive the filter
    model(images, dense=True)    every anchor, so that all shapes are known beforehand, as torch.compile and exports
                                 need; loss and detections are the same
    model(images, capacity=n)    the n anchors that the ARM trusts most; fewer survivors leave empty rows. All shapes
                                 are known beforehand and the host never waits, as CUDA graphs need
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: RefineDetConfig, categories: Sequence[str] = (), exif: str = "stored") -> None:
        """Build with fresh weights.

        categories  names of the classes 1..num_classes, kept in the files of `save_pretrained`
        exif        what the detector is to see of a photo with an EXIF rotation, "stored" or "displayed" pixels; kept
                    there too, for programs that decode photos
        """
        super().__init__()
        if categories and len(categories) != config.num_classes:
            raise ValueError(f"categories must name {config.num_classes} classes, received {len(categories)} names.")
        if exif not in ("stored", "displayed"):
            raise ValueError(f"exif must be stored or displayed, received {exif!r}.")
        self.config, self.categories, self.exif = config, tuple(categories), exif
        has_norms = config.backbone != VGG16_REDUCED  # the default of what the paper adds to backbones with norms
        block = has_norms if config.prediction_block is None else config.prediction_block
        tcb_norm = has_norms if config.tcb_norm is None else config.tcb_norm

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
        if config.norm != "batch":
            synchronize_norms(self)
        self.train()
        self._anchors: dict[tuple[int, int, torch.device], Tensor] = {}
        self._orders: dict[tuple[int, int, int, torch.device], Tensor] = {}

    def train(self, mode: bool = True) -> RefineDet:
        super().train(mode)
        if self.config.norm == "frozen" and isinstance(self.backbone, TimmBackbone):  # VGG has none to freeze
            freeze_norms(self.backbone.body)
        return self

    def forward(
        self,
        images: Tensor,
        targets: Sequence[AnyTargets] | None = None,
        *,
        dense: bool = False,
        capacity: int | None = None,
    ) -> Predictions:
        """Predict for a batch; the arguments choose its rows, the anchors that the ADM computes (see the class).

        Raises ValueError for sides that are no multiples of `config.coarsest_stride`, for targets that are no boxes and
        labels, and for a capacity beside targets or dense, or without an ARM.
        """
        if capacity is not None:
            self._check_capacity(dense or targets is not None)
        anchors = self.anchors(images)
        if targets is not None:
            targets = as_targets(targets, self.config.num_classes, batch=images.shape[0])
        features = self.backbone(self.normalize(images))

        # ARM: object or not, and a first regression. Without one the ADM begins at the tiled anchors.
        arm_class = arm_box = None
        refined = anchors.expand(images.shape[0], -1, -1)
        transferred = features
        if self.arm is not None and self.tcb is not None:
            arm_box, arm_class = self.arm(features)
            transferred = self.tcb(features)
            if self.config.cascade:
                refined = decode_boxes(arm_box.detach(), anchors)

        # Rows: the anchors that the ADM computes.
        chosen = _EVERY_ANCHOR
        if capacity is not None and arm_class is not None:
            chosen = self._choose_capacity(images, arm_class, capacity)
        elif targets is not None and not dense:
            chosen = self._choose_trained(images, arm_class, refined, targets)
        elif not dense:
            chosen = self._choose_survivors(images, arm_class)
        rows = chosen.rows
        row_boxes = refined.flatten(0, 1)
        if rows is not None:  # an empty row names the anchor past the last; any box serves it
            row_boxes = row_boxes[rows.anchor.clamp(max=len(row_boxes) - 1)]

        # ADM: classes, and a second regression from the refined boxes.
        row_order = self._dense_order(images) if rows is None else None
        adm_box, adm_class = self.adm(transferred, row_boxes, rows, row_order)
        return Predictions(
            anchors=anchors,
            refined=refined,
            arm_class=arm_class,
            arm_box=arm_box,
            index=None if rows is None else rows.anchor,
            adm_class=adm_class,
            adm_box=adm_box,
            row_boxes=row_boxes,
            matches=chosen.matches,
            level_anchors=count_anchors(images.shape[-2], images.shape[-1], self.config.strides),
            filtered=chosen.filtered,
            padded=capacity is not None,
        )

    @torch.no_grad()
    def detect(self, images: Tensor) -> list[Detections]:
        """Find the objects of each image (section IV-H); images as in `forward`. Only in evaluation mode."""
        self._require_evaluation()
        return select_batch(self(images), self.config).split()

    @torch.no_grad()
    def predict(self, images: Iterable[Tensor]) -> list[Detections]:
        """Find the objects of images of any sizes, in their own pixels, clipped to them. Only in evaluation mode.

        images  [3, H, W] each, RGB, 0..255, uint8 or float, on any device; each is warped to the config's input size
        """
        self._require_evaluation()
        size = (self.config.input_size, self.config.input_size)
        return detect_images(self, (image.to(self.mean.device) for image in images), size, self.config)

    def pretrained_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the backbone that weights of a classifier hold; the layers that detection adds are not."""
        return (one for name, one in self.backbone.named_parameters() if name.startswith(self.backbone.trained))

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub_options: Any) -> RefineDet:
        """Load a detector from a file, a directory, a URI or the Hugging Face hub, in evaluation mode; see `hub`."""
        return load_detector(cls, source, **hub_options)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write model.safetensors, with config, categories and preprocessing in it; `from_pretrained` reads it."""
        return save_detector(self, directory)

    @torch.no_grad()
    def detect_padded(self, images: Tensor, capacity: int) -> DetectionBatch:
        """Find objects with fixed shapes and without a host that waits; a CUDA graph can capture it after one call.

        capacity  anchors that the ADM computes, see `forward`
        """
        self._require_evaluation()
        return select_batch(self(images, capacity=capacity), self.config)

    def _check_capacity(self, with_others: bool) -> None:
        if with_others:
            raise ValueError("capacity is for detection: it excludes dense and targets, received them together.")
        if self.arm is None:
            raise ValueError("capacity needs an ARM to choose anchors, received a detector with tcb: false.")

    def _require_evaluation(self) -> None:
        if self.training:
            raise RuntimeError(
                "detection needs evaluation mode, received a detector in training mode, whose running statistics it "
                "would change; call eval() first."
            )

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

    def _order_rows(self, images: Tensor) -> Tensor:
        """`order_rows` of a batch, on its device; made once for each shape."""
        batch, height, width = images.shape[0], *images.shape[-2:]
        key = (int(batch), int(height), int(width), images.device)
        if key not in self._orders:
            with torch.inference_mode(False):
                self._orders[key] = order_rows(*key[:3], self.config.strides).to(images.device)
        return self._orders[key]

    def _dense_order(self, images: Tensor) -> Tensor | None:
        """Order in which AlignConv takes every anchor; None where the ADM predicts without its operator."""
        if self.adm.kind != "align" or self.adm.portable:
            return None
        return self._order_rows(images)

    @torch.no_grad()
    def _choose_trained(
        self, images: Tensor, arm_class: Tensor | None, refined: Tensor, targets: Sequence[Targets]
    ) -> _Chosen:
        """The rows that the loss can use, and the matches that they follow from."""
        matches = match_anchors(refined, targets, self.config.adm_iou)
        rows, _ = self._locate(images, select_trained_rows(self._survivors(arm_class), matches))
        return _Chosen(rows, matches)

    @torch.no_grad()
    def _choose_survivors(self, images: Tensor, arm_class: Tensor | None) -> _Chosen:
        """The rows of the anchors that survive the filter; every anchor where the config does not filter here."""
        survivors = self._survivors(arm_class)
        if survivors is None or self.config.filter_negatives == "training":
            return _EVERY_ANCHOR
        rows, any_survive = self._locate(images, survivors)
        return _Chosen(rows, filtered=any_survive)  # else the one row is there for its gradient, and no survivor

    def _survivors(self, arm_class: Tensor | None) -> Tensor | None:
        """[B, A] bool; None: all."""
        if arm_class is None or self.config.theta >= 1.0:
            return None
        return select_survivors(arm_class, self.config.theta)

    def _locate(self, images: Tensor, chosen: Tensor) -> tuple[Rows, bool]:
        """Rows of the chosen anchors, [B, A] bool, and whether there are any.

        There is at least one row in any case, so that every parameter always has a gradient.
        """
        row_order = self._order_rows(images)  # its last entry is that of an empty row
        place = chosen.flatten()[row_order[:-1]].nonzero().squeeze(1)
        any_chosen = len(place) > 0
        place = place if any_chosen else place.new_zeros(1)
        return Rows(place, row_order[place]), any_chosen

    @torch.no_grad()
    def _choose_capacity(self, images: Tensor, arm_class: Tensor, capacity: int) -> _Chosen:
        """The rows of the anchors that the ARM trusts most, with empty rows for those that it filters."""
        row_order, config = self._order_rows(images), self.config
        trust = (arm_class[..., 1].float() - arm_class[..., 0].float()).sigmoid().flatten()[row_order[:-1]]
        filters = config.theta < 1.0 and config.filter_negatives == "always"
        place = top_rows(trust, capacity, 1.0 - config.theta if filters else 0.0)
        return _Chosen(Rows(place, row_order[place]), filtered=filters)


class _Chosen(NamedTuple):
    """Rows of the ADM (None: every anchor), the matches that chose them, and `Predictions.filtered`."""

    rows: Rows | None
    matches: Matches | None = None
    filtered: bool = False


_EVERY_ANCHOR = _Chosen(None)
