"""Detections in original pixels, from images of any size: the one way from weights and pictures to boxes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
import yaml
from refinedet.model import RefineDet
from refinedet.pipeline.config.files import parse_spec
from refinedet.pipeline.config.recipes import resolve_merge, resolve_passes
from refinedet.pipeline.config.spec import Multiscale
from refinedet.pipeline.inference.detect import Found, detect_view, evaluating
from refinedet.pipeline.inference.merging import merge_boxes
from refinedet.pipeline.inference.multiscale import detect_in_views
from refinedet.pipeline.inference.precision import autocast_type
from refinedet.pipeline.inference.weights import load_detector
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError


@dataclass(frozen=True)
class Predictor:
    """A detector, and how it is run.

    model       in evaluation mode, on its device
    names       of the categories, of label 1 first
    batch_size  views that the device holds at once
    autocast    bf16 or fp16; None: fp32
    multiscale  views of each image and their merging; None: one view at the model's input size
    """

    model: RefineDet
    names: tuple[str, ...]
    batch_size: int = 8
    autocast: torch.dtype | None = None
    multiscale: Multiscale | None = None

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
        """A predictor from a run's directory, or from weights.safetensors beside the run's spec.yaml; files or URIs.

        device     "cpu", "cuda" or "cuda:1"; default: a GPU where there is one
        precision  auto (bf16 where the device computes it), fp32, bf16 or fp16
        Raises UserError where a file is missing, or where the weights leave a part of the model unset.
        """
        whole = weights.endswith(".safetensors")
        directory = weights.rpartition("/")[0] or "." if whole else weights
        path = weights if whole else storage.join(weights, "weights.safetensors")
        for needed in (path, storage.join(directory, "spec.yaml")):
            if not storage.exists(needed):
                raise UserError(
                    f"There is no {needed}; give a run's directory, or its weights.safetensors beside spec.yaml."
                )
        spec = parse_spec(yaml.safe_load(storage.read_bytes(storage.join(directory, "spec.yaml"))), source=directory)
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = load_detector(spec.model, path).to(place).to(memory_format=torch.channels_last)
        return cls(
            model,
            _category_names(directory, spec.model.num_classes),
            batch_size,
            autocast_type(place, precision),
            multiscale,
        )

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
            size = (config.input_size, config.input_size)
            return detect_view(self.model, images, size, config=config, autocast=self.autocast)
        num_views = sum(1 + one.flip for one in resolve_passes(self.multiscale, config))
        found = detect_in_views(self.model, images, self.multiscale, self.autocast)
        rule = resolve_merge(self.multiscale)
        return Found(*merge_boxes(rule, found.boxes, found.scores, found.labels, found.image, num_views=num_views))


def _category_names(directory: str, num_classes: int) -> tuple[str, ...]:
    truth = storage.join(directory, "ground_truth.json")
    if not storage.exists(truth):
        return tuple(f"class {label}" for label in range(1, num_classes + 1))
    categories = sorted(storage.read_json(truth)["categories"], key=lambda category: category["id"])
    return tuple(category["name"] for category in categories)
