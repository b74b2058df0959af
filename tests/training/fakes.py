"""A detector, a loss and a stream that take milliseconds, with the contracts of the real ones."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from refinedet.model import RefineDetConfig, Targets
from refinedet.model.norms import SyncBatchNorm
from refinedet.pipeline.config.batches import BatchPlan
from refinedet.pipeline.data.samples import Batch, Cursor
from torch import Tensor, nn


@dataclass(frozen=True)
class TinyTargets:
    value: Tensor

    def to(self, device: torch.device) -> TinyTargets:
        return TinyTargets(self.value.to(device))


@dataclass(frozen=True)
class TinyLosses:
    fit: Tensor
    size: Tensor

    @property
    def total(self) -> Tensor:
        return self.fit + self.size

    def parts(self) -> dict[str, Tensor]:
        return {"fit": self.fit, "size": self.size}

    def shares(self) -> dict[str, Tensor]:
        return {"rows": torch.ones_like(self.fit)}


@dataclass(frozen=True)
class TinySums:
    """Stand-in for `LossSums`: sums over images, divided by their number in all parts of the global batch."""

    fit: Tensor
    size: Tensor
    positives: Tensor

    def divide(self, positives: Tensor) -> TinyLosses:
        return TinyLosses(self.fit / positives[0], self.size / positives[0])


class TinyDetector(nn.Module):
    """Convolutions, synchronised norm, and a head that only some images use; every parameter is in every graph."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), SyncBatchNorm(6), nn.ReLU(), nn.Conv2d(6, 5, 3))
        self.rare = nn.Linear(5, 3)

    def forward(self, images: Tensor, targets: object = None) -> Tensor:
        features = self.body(images.float() / 255 - 0.5).mean((2, 3))
        used = images[:, 0, 0, 0].float() > 127
        return features.mean(1) + torch.where(used, self.rare(features).mean(1), 0.0)


def tiny_loss(predictions: Tensor, targets: Sequence[TinyTargets]) -> TinySums:
    wanted = torch.stack([target.value for target in targets])
    predictions = predictions.float()
    count = predictions.new_full((1,), len(targets))
    return TinySums(((predictions - wanted) ** 2).sum(), 0.01 * predictions.abs().sum(), count)


def deal(count: int, among: int) -> list[range]:
    """Numbers below `count` in consecutive shares that differ by one at most."""
    ends = [count * place // among for place in range(among + 1)]
    return [range(first, last) for first, last in itertools.pairwise(ends)]


class TinyStream:
    """Random images, a function of the seed, the epoch and the number in the epoch."""

    def __init__(
        self,
        start: Cursor,
        plan: BatchPlan,
        rank: int,
        *,
        batches_per_epoch: int = 5,
        seed: int = 0,
        poison: tuple[int, int] | None = None,
        enlarge: tuple[int, float] | None = None,
    ) -> None:
        self.start, self.plan, self.rank, self.seed = start, plan, rank, seed
        self.batches_per_epoch = batches_per_epoch
        self.poison = poison
        """(step from 0, rank) whose target is not a number"""
        self.enlarge = enlarge
        """(step from 0, factor) whose targets are larger by that factor"""

    def __iter__(self) -> Iterator[Batch]:
        step = self.start.epoch * self.batches_per_epoch + self.start.batch
        while True:
            epoch, index = divmod(step, self.batches_per_epoch)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            images = torch.randint(0, 256, (self.plan.global_batch, 3, 8, 8), generator=generator, dtype=torch.uint8)
            wanted = 1 + 0.1 * torch.randn(self.plan.global_batch, generator=generator)
            if self.poison == (step, self.rank):
                wanted[:] = torch.nan
            if self.enlarge and self.enlarge[0] == step:
                wanted *= self.enlarge[1]
            share = deal(self.plan.global_batch, self.plan.world_size)[self.rank]
            parts = deal(len(share), self.plan.accumulation)
            for part in range(self.plan.accumulation):
                rows = [share[at] for at in parts[part]]
                yield Batch(
                    images=images[rows].contiguous(memory_format=torch.channels_last),
                    targets=tuple(TinyTargets(wanted[row]) for row in rows),  # type: ignore[misc]
                    keys=tuple(f"{epoch}-{index}-{row}" for row in rows),
                    image_ids=tuple(rows),
                    epoch=epoch,
                    index=index,
                    part=part,
                )
            step += 1

    def close(self) -> None:
        pass

    @staticmethod
    def targets_of(values: list[float]) -> list[TinyTargets]:
        return [TinyTargets(torch.tensor(value)) for value in values]


SMALL_REFINEDET = RefineDetConfig(
    num_classes=2,
    input_size=64,
    backbone="test_resnet",
    tcb_channels=16,
    prediction_block=False,
    norm="frozen",
    map_norm="none",
    tcb_norm=False,
)
"""A real detector of the smallest size, 0.1 s a step. Statistics of two images on 1 x 1 cells would be chaos."""


class SquareStream(TinyStream):
    """64-pixel noise with one square in every image, its class its brightness; for `SMALL_REFINEDET`."""

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            step = batch.epoch * self.batches_per_epoch + batch.index
            images = torch.empty(len(batch), 3, 64, 64, dtype=torch.uint8)
            targets = []
            for image, number in zip(images, batch.image_ids, strict=True):
                generator = torch.Generator().manual_seed(step * 64 + number)
                image.random_(100, 156, generator=generator)
                side, x, y, label = (int(torch.randint(*span, (), generator=generator)) for span in SPANS)
                image[:, y : y + side, x : x + side] = 255 * (label - 1)
                box = torch.tensor([[x, y, x + side, y + side]], dtype=torch.float32)
                targets.append(Targets(box, torch.tensor([label])))
            yield replace(batch, images=images.contiguous(memory_format=torch.channels_last), targets=tuple(targets))


SPANS = ((16, 32), (0, 32), (0, 32), (1, 3))
"""of side, x, y and class"""
