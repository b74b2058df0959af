"""Micro-batches for the steps of training, on the device."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from refinedet.pipeline.data.samples import Batch
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.training.world import World


class Feed:
    """Takes micro-batches of a stream.

    A rank whose stream fails repeats its last batch, so that it reaches the step's collective, where all ranks learn
    of the fault and stop together. Without a batch to repeat it fails alone.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device, channels_last: bool) -> None:
        self.fault: Exception | None = None
        self._batches = batches
        self._device = device
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._last: Batch | None = None

    def next(self, epoch: int, index: int) -> tuple[torch.Tensor, list, tuple[str, ...]]:
        """Images, targets and keys of the next micro-batch, which belongs to that global batch."""
        if self.fault is None:
            try:
                batch = next(self._batches)
                assert (batch.epoch, batch.index) == (epoch, index), (batch.epoch, batch.index, epoch, index)
                self._last = batch
            except Exception as error:
                if self._last is None:
                    raise
                self.fault = error
        batch = self._last
        assert batch is not None
        images = batch.images.to(self._device, non_blocking=True, memory_format=self._layout)
        return images, [target.to(self._device) for target in batch.targets], batch.keys

    def raise_together(self, world: World, step: int) -> None:
        """All ranks raise the same: a user's mistake as such, anything else as what happened on which rank."""
        fault = self.fault
        mine = None if fault is None else (isinstance(fault, UserError), repr(fault), str(fault))
        said = [(rank, *kind) for rank, kind in enumerate(world.all_gather_object(mine)) if kind]
        if all(user for _, user, _, _ in said):
            raise UserError("; ".join(dict.fromkeys(text for *_, text in said))) from fault
        raise RuntimeError(
            f"step {step}: no batch on " + "; ".join(f"rank {rank}: {name}" for rank, _, name, _ in said)
        ) from fault
