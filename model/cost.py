"""Cost of a detector, computed without memory or a device: parameters, FLOPs, anchors, activations.

B images, A anchors per image. Everything is counted on torch's meta device, where tensors have shapes and no content.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from .anchors import count_anchors
from .config import RefineDetConfig
from .detector import RefineDet

MODULES = ("backbone", "arm", "tcb", "adm")
_BACKWARD = 2.0
"""cost of a backward pass in forward ones"""


@dataclass(frozen=True)
class ModelCost:
    """The cost of one detector at one input size.

    parameters         of each module
    gflops             of each module for one image, forward, a multiply-add as two; the ADM for every anchor
    anchors            of each level
    activation_bytes   kept for the backward pass, an image more in the batch, fp32 with every anchor in the ADM;
                       nearly half of it under bf16 autocast
    """

    parameters: dict[str, int]
    gflops: dict[str, float]
    anchors: tuple[int, ...]
    activation_bytes: int

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def total_gflops(self) -> float:
        return sum(self.gflops.values())

    @property
    def num_anchors(self) -> int:
        return sum(self.anchors)

    def training_gflops(self, *, backbone_trained: bool = True, recomputed: bool = False) -> float:
        """GFLOPs of one image forward and backward.

        backbone_trained  False: its layers stay as they are, and have no backward pass
        recomputed        the backbone's forward pass is repeated (activation checkpointing)
        """
        gflops = self.total_gflops * (1 + _BACKWARD)
        if not backbone_trained:
            gflops -= self.gflops["backbone"] * _BACKWARD
        elif recomputed:
            gflops += self.gflops["backbone"]
        return gflops


def count_cost(config: RefineDetConfig) -> ModelCost:
    """Count a config's cost at its input size.

    FLOPs are those of convolutions and matrix products. AlignConv's sampling, some 5 % of its product at 256 channels,
    is not among them; neither is what the negative filter saves: the predictor works on the anchors that survive.
    """
    size = config.input_size
    with torch.device("meta"):
        model = RefineDet(config)
    model.adm.portable = True  # of products alone, which the counter counts
    parameters = {
        name: sum(parameter.numel() for parameter in module.parameters())
        for name in MODULES
        if (module := getattr(model, name)) is not None
    }
    return ModelCost(
        parameters,
        _count_gflops(model, size),
        count_anchors(size, size, config.strides),
        _count_activations(model, size),
    )


def _count_gflops(model: RefineDet, size: int) -> dict[str, float]:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model.eval()(_blank(1, size), dense=True)
    counts = counter.get_flop_counts()
    return {
        name: sum(counts.get(f"RefineDet.{name}", {}).values()) / 1e9
        for name in MODULES
        if getattr(model, name) is not None
    }


def _count_activations(model: RefineDet, size: int) -> int:
    """Bytes kept for the backward of three images less those of two: what an image adds.

    AlignConv keeps what a plain convolution does, its features; from standard operators it would keep every sample.
    """
    model.train()
    if model.adm.kind == "align":
        model.adm.kind = "vanilla"
    kept: list[int] = []
    for batch in (2, 3):
        with _count_saved(model) as storages:
            predictions = model(_blank(batch, size), dense=True)
        kept.append(sum(storages.values()))
        del predictions
    return kept[1] - kept[0]


@contextmanager
def _count_saved(model: RefineDet) -> Generator[dict[int, int]]:
    """Collect the distinct storages that autograd saves, other than the model's own; id -> bytes."""
    storages: dict[int, int] = {}
    held: list[Any] = []  # so that no storage is freed and its id used again
    parameters = [parameter.untyped_storage() for parameter in model.parameters()]  # one object per storage
    own = {id(storage) for storage in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            storages[id(storage)] = storage.nbytes()
            held.extend((tensor, storage))
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


def _blank(batch: int, size: int) -> Tensor:
    return torch.empty(batch, 3, size, size, dtype=torch.uint8, device="meta")
