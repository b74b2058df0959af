"""Detections in original pixels, from images of any size: the one way from weights and pictures to boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from refinedet.model import RefineDet, RefineDetConfig
from refinedet.pipeline.config.recipes import resolve_merge, resolve_passes
from refinedet.pipeline.config.spec import Multiscale
from refinedet.pipeline.inference.choice import category_names
from refinedet.pipeline.inference.detect import Found, detect_view, evaluating, unsuppressed
from refinedet.pipeline.inference.devices import check_device_name
from refinedet.pipeline.inference.merging import merge_boxes, suppress_across_classes
from refinedet.pipeline.inference.multiscale import detect_in_views
from refinedet.pipeline.inference.precision import autocast_type
from refinedet.pipeline.runs.errors import UserError


@dataclass(frozen=True)
class Predictor:
    """A detector, and how it is run.

    model           in evaluation mode, on its device
    names           of the categories, of label 1 first
    batch_size      views that the device holds at once
    autocast        bf16 or fp16; None: fp32
    multiscale      views of each image and their merging; None: one view at the model's input size
    selection       thresholds and limits of one view's detections; None: the model's
    class_agnostic  of one view, boxes of all classes suppress each other
    """

    model: RefineDet
    names: tuple[str, ...]
    batch_size: int = 8
    autocast: torch.dtype | None = None
    multiscale: Multiscale | None = None
    selection: RefineDetConfig | None = None
    class_agnostic: bool = False

    @classmethod
    def load(
        cls,
        weights: str,
        *,
        device: str | None = None,
        precision: str = "auto",
        batch_size: int = 8,
        multiscale: Multiscale | None = None,
    ) -> Predictor:
        """Load a detector of `RefineDet.from_pretrained`: a directory, a file, a URI or a hub's owner/name.

        device     "cpu", "cuda" or "cuda:1"; default: a GPU where there is one
        precision  auto (bf16 where the device computes it), fp32, bf16 or fp16
        Raises UserError where a file is missing, or where the weights leave a part of the model unset.
        """
        place = _device(device)
        try:
            model = RefineDet.from_pretrained(weights).to(place).to(memory_format=torch.channels_last)
        except ValueError as error:
            raise UserError(str(error)) from None
        return cls(
            model,
            category_names(model.config, model.categories),
            batch_size,
            autocast_type(place, precision),
            multiscale,
        )

    @property
    def exif(self) -> str:
        """`RefineDet.exif`, which whoever decodes the photos follows."""
        return self.model.exif

    def selecting(self, *, class_agnostic: bool = False, **limits: float | None) -> Predictor:
        """The same with other limits of one view, as nms_iou or max_detections; None leaves the model's."""
        given = {name: value for name, value in limits.items() if value is not None}
        if not given and not class_agnostic:
            return self
        selection = replace(self.model.config, **given)  # type: ignore[arg-type]
        return replace(self, selection=selection, class_agnostic=class_agnostic)

    def predict(self, images: Iterable[np.ndarray]) -> Iterator[Found]:
        """Detections of each image, uint8 [H, W, 3] in RGB of any size, in order; `batch_size` images are held."""
        images = iter(images)
        while batch := list(islice(images, self.batch_size)):
            with evaluating(self.model):
                found = self._detect(batch)
            for place in range(len(batch)):
                yield found.select((found.image == place).nonzero().squeeze(1))

    def _detect(self, images: Sequence[np.ndarray]) -> Found:
        config = self.model.config
        if self.multiscale is None:
            size, chosen = (config.input_size, config.input_size), self.selection or config
            first = unsuppressed(chosen) if self.class_agnostic else chosen
            found = detect_view(self.model, images, size, config=first, autocast=self.autocast)
            if not self.class_agnostic:
                return found
            limits = {"iou": chosen.nms_iou, "max_detections": chosen.max_detections}
            return found.select(suppress_across_classes(found.boxes, found.scores, found.image, **limits))
        num_views = sum(1 + one.flip for one in resolve_passes(self.multiscale, config))
        found = detect_in_views(self.model, images, self.multiscale, self.autocast)
        rule = resolve_merge(self.multiscale)
        return Found(*merge_boxes(rule, found.boxes, found.scores, found.labels, found.image, num_views=num_views))


def _device(name: str | None) -> torch.device:
    check_device_name(name)
    place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if place.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"The device {name!r} needs a GPU, and torch finds none here; leave it out, or give cpu.")
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise UserError(f"There is no device {name!r}; torch finds {torch.cuda.device_count()} GPUs here.")
    return place
