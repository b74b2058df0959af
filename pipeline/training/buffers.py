"""The persistent buffers of a detector: running statistics, and what counts them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from refinedet.pipeline.training.world import World
from torch import Tensor, nn


class Buffers:
    """All persistent buffers of one dtype lie side by side in one tensor, so that they are copied and reduced at once.

    Running statistics are averaged over the ranks after every step: they are then the same on all ranks, as weights
    are, and a checkpoint holds each of them once.
    """

    def __init__(self, module: nn.Module) -> None:
        self._flat: list[Tensor] = []
        by_dtype: dict[torch.dtype, list[tuple[str, Tensor]]] = {}
        for name, buffer in persistent_buffers(module):
            by_dtype.setdefault(buffer.dtype, []).append((name, buffer))
        for buffers in by_dtype.values():
            flat = torch.cat([buffer.detach().reshape(-1) for _, buffer in buffers])
            parts = flat.split([buffer.numel() for _, buffer in buffers])
            for (name, buffer), part in zip(buffers, parts, strict=True):
                owner, _, last = name.rpartition(".")
                # `data`: views count changes together, and backward would refuse a frozen norm's statistics, which it
                # saved, because those of another norm have changed.
                setattr(module.get_submodule(owner), last, part.data.view(buffer.shape))
            self._flat.append(flat)

    def average(self, world: World) -> None:
        """Replace floating buffers by their mean over the ranks. Collective."""
        for flat in self._flat if world.size > 1 else ():
            if flat.is_floating_point():
                flat.copy_(world.sum(flat.double()) / world.size)  # double: the mean of equals is equal

    def copy(self) -> list[Tensor]:
        """For `restore`."""
        return [flat.clone() for flat in self._flat]

    def restore(self, copies: list[Tensor]) -> None:
        for flat, before in zip(self._flat, copies, strict=True):
            flat.copy_(before)


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that are part of the state; the others are constants."""
    kept = module.state_dict().keys()
    return ((name, buffer) for name, buffer in module.named_buffers() if name in kept)
