"""The stages of a training stream's `wds.DataPipeline`: schedule, read, augment, collate.

They run in the loader's worker processes. Every worker computes the whole schedule and takes its turn of this rank's
micro-batches, so nothing has to be agreed on between workers, ranks or nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import cv2
import numpy as np
import torch
from refinedet.model.structures import Targets
from refinedet.pipeline.config.batches import BatchPlan
from refinedet.pipeline.config.spec import Augmentation
from refinedet.pipeline.data.augmentation import Picture, augment
from refinedet.pipeline.data.cache import ShardCache, prefetch
from refinedet.pipeline.data.images import resize_image
from refinedet.pipeline.data.index import ShardSet
from refinedet.pipeline.data.order import (
    batch_bounds,
    count_batches,
    micro_batch_of_share,
    share_of_rank,
    size_of_micro_batch,
)
from refinedet.pipeline.data.randomness import keyed_integer
from refinedet.pipeline.data.reading import SampleReader, grey_sample
from refinedet.pipeline.data.samples import BadSample, Batch, Cursor, Sample
from refinedet.pipeline.data.sampling import EpochDraws, Repeats
from refinedet.pipeline.data.tensors import stack_images
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info


@dataclass(frozen=True)
class Plan:
    """Inputs of one rank's schedule, which is a function of them alone."""

    shards: ShardSet
    seed: int
    batch: BatchPlan
    rank: int
    epochs: int | None
    window: int
    streams: int
    repeats: Repeats | None = None
    mosaic: bool = False

    @property
    def draws_per_epoch(self) -> int:
        return self.repeats.num_draws if self.repeats else self.shards.num_samples

    @property
    def batches_per_epoch(self) -> int:
        return count_batches(self.draws_per_epoch, self.batch.global_batch)


class Turn(NamedTuple):
    """One image's place in the schedule."""

    position: int
    """of the sample in the data set"""
    epoch: int
    index: int
    part: int
    last: bool
    """closes its micro-batch"""
    occurrence: int = 0
    """how often the sample has occurred in this epoch before"""
    blank: bool = False
    """no sample: a grey image fills the batch"""
    companions: tuple[int, ...] = ()
    """positions of the samples that a mosaic shows beside this one"""


class Loaded(NamedTuple):
    """One turn's sample, decoded; `companions` reads and decodes those of the turn."""

    turn: Turn
    sample: Sample
    companions: Callable[[], list[Sample]]


class View(NamedTuple):
    """One augmented sample."""

    turn: Turn
    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    key: str
    image_id: int
    fault: BadSample | None


class TurnSchedule(IterableDataset):
    """Yields this worker's share of this rank's turns, from `start` on, epoch after epoch."""

    def __init__(self, plan: Plan, start: Cursor) -> None:
        self.plan = plan
        self.start = start

    def __iter__(self) -> Iterator[Turn]:
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        plan = self.plan
        draws: EpochDraws | None = None
        for turn, (epoch, index, part) in enumerate(self._micro_batches()):
            if turn % workers != number:
                continue
            if draws is None or draws.epoch != epoch:
                draws = EpochDraws(
                    plan.shards.sizes,
                    plan.repeats,
                    seed=plan.seed,
                    epoch=epoch,
                    window=plan.window,
                    streams=plan.streams,
                )
            yield from self._turns(draws, index, part)

    def _micro_batches(self) -> Iterator[tuple[int, int, int]]:
        """(epoch, index, part) of this rank's micro-batches."""
        plan = self.plan
        epoch, first = self.start
        while plan.epochs is None or epoch < plan.epochs:
            for index in range(first, plan.batches_per_epoch):
                for part in range(plan.batch.accumulation):
                    yield epoch, index, part
            epoch, first = epoch + 1, 0

    def _turns(self, draws: EpochDraws, index: int, part: int) -> Iterator[Turn]:
        plan, batch = self.plan, self.plan.batch
        begin, end = batch_bounds(index, draws.num_draws, plan.batches_per_epoch)
        share = share_of_rank(begin, end, draws.streams, plan.rank, batch.world_size)
        chosen = micro_batch_of_share(share, part, batch.accumulation)
        positions, occurrences = draws.stretch(begin, end)
        companions = (
            draws.companions(begin, end, batch.global_batch) if plan.mosaic else np.zeros((0, end - begin), int)
        )
        size = size_of_micro_batch(batch.global_batch, plan.rank, batch.world_size, part, batch.accumulation)
        for at, place in enumerate(chosen.tolist(), start=1):
            position, occurrence = int(positions[place]), int(occurrences[place])
            beside = tuple(companions[:, place].tolist())
            yield Turn(position, draws.epoch, index, part, at == size, occurrence, companions=beside)
        for at in range(len(chosen) + 1, size + 1):
            yield Turn(int(positions[0]), draws.epoch, index, part, at == size, blank=True)


def copy_ahead(turns: Iterable[Turn], cache: ShardCache, ahead: int) -> Iterator[Turn]:
    """Pass turns on, and have the remote shards that the next `ahead` of them need copied to the node."""
    first = cache.shards.first
    return prefetch(turns, lambda turn: int(np.searchsorted(first, turn.position, side="right")) - 1, cache, ahead)


def read_samples(turns: Iterable[Turn], shards: ShardSet, cache: ShardCache | None) -> Iterator[Loaded]:
    """Read and decode each turn's sample."""
    if get_worker_info():  # the workers are the parallelism; OpenCV's threads would only fight them
        cv2.setNumThreads(0)
    reader = SampleReader(shards, cache)
    for turn in turns:
        yield load_turn(turn, reader)


def load_turn(turn: Turn, reader: SampleReader) -> Loaded:
    sample = grey_sample() if turn.blank else reader.read(turn.position)
    return Loaded(turn, sample, partial(_read_all, reader, turn.companions))


def _read_all(reader: SampleReader, positions: Sequence[int]) -> list[Sample]:
    return [reader.read(position) for position in positions]


@dataclass(frozen=True)
class Augmenter:
    """Makes the view of a sample: a function of (seed, epoch, sample key). Without settings, a plain resize.

    Where a sample occurs again in an epoch, the number of the occurrence is part of the key. Where there are several
    `sizes`, each global batch has one of them, a function of (seed, epoch, index).
    """

    sizes: tuple[int, ...]
    seed: int
    settings: Augmentation | None
    include_difficult: bool

    def __call__(self, loaded: Loaded) -> View:
        turn, sample, _ = loaded
        picture = self._picture(sample)
        size = self.sizes[keyed_integer(len(self.sizes), "size", self.seed, turn.epoch, turn.index)]
        if self.settings is None:
            height, width, _ = sample.image.shape
            image, labels = resize_image(sample.image, size), picture.labels
            boxes = picture.boxes * np.array([size / width, size / height] * 2, np.float32)
        else:
            key = (self.seed, turn.epoch, sample.key, *((turn.occurrence,) if turn.occurrence else ()))
            image, boxes, labels = augment(
                *picture,
                size=size,
                key=key,
                settings=self.settings,
                companions=lambda: [self._picture(other) for other in loaded.companions()],
            )
        return View(turn, image, boxes, labels, sample.key, sample.image_id, sample.fault)

    def _picture(self, sample: Sample) -> Picture:
        """The image with the objects to train on."""
        kept = ~sample.crowd if self.include_difficult else ~(sample.crowd | sample.difficult)
        return Picture(sample.image, sample.boxes[kept], sample.labels[kept])


class Packed(NamedTuple):
    """A micro-batch on its way from a worker. One tensor, in shared memory; the many small arrays travel by value."""

    images: Tensor
    boxes: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]
    keys: Sequence[str]
    image_ids: Sequence[int]
    faults: Sequence[BadSample]
    epoch: int
    index: int
    part: int


def collate(views: Iterable[View]) -> Iterator[Packed]:
    """Gather the views of a micro-batch."""
    gathered: list[View] = []
    for view in views:
        gathered.append(view)
        if view.turn.last:
            yield Packed(
                images=stack_images([view.image for view in gathered]),
                boxes=[view.boxes for view in gathered],
                labels=[view.labels for view in gathered],
                keys=[view.key for view in gathered],
                image_ids=[view.image_id for view in gathered],
                faults=[view.fault for view in gathered if view.fault],
                epoch=view.turn.epoch,
                index=view.turn.index,
                part=view.turn.part,
            )
            gathered = []


def unpack(packed: Packed) -> Batch:
    """The micro-batch as training takes it."""
    return Batch(
        images=packed.images,
        targets=tuple(
            Targets(torch.from_numpy(boxes), torch.from_numpy(labels))
            for boxes, labels in zip(packed.boxes, packed.labels, strict=True)
        ),
        keys=tuple(packed.keys),
        image_ids=tuple(packed.image_ids),
        epoch=packed.epoch,
        index=packed.index,
        part=packed.part,
        faults=tuple(packed.faults),
    )
