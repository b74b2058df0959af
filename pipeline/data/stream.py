"""The training stream: every global batch once, in an order that nothing but (seed, epoch, data set) decides."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing.context import BaseContext

import torch
from refinedet.pipeline.config.batches import BatchPlan
from refinedet.pipeline.config.spec import Data
from refinedet.pipeline.data.bad_samples import FaultLog
from refinedet.pipeline.data.cache import node_cache
from refinedet.pipeline.data.index import ShardSet
from refinedet.pipeline.data.samples import Batch, Cursor
from refinedet.pipeline.data.sampling import expected_repeats
from refinedet.pipeline.data.stream_steps import (
    Augmenter,
    Packed,
    Plan,
    TurnSchedule,
    collate,
    copy_ahead,
    read_samples,
    unpack,
)
from refinedet.pipeline.runs.errors import UserError
from webdataset.compat import WebLoader
from webdataset.filters import map as map_samples
from webdataset.pipeline import DataPipeline


class TrainingStream:
    """This rank's micro-batches, `accumulation` of them for every global batch, the same number on all ranks.

    Micro-batches differ by at most one image where the numbers of ranks and parts do not divide the global batch.

    Iterating yields `Batch`es ordered by (epoch, index, part); iterating again, or in another process with
    `start=stream.cursor`, continues with exactly what has not been delivered, at any world size and number of workers.
    Every sample occurs once in every epoch, or as often as `data.sampling` and the splits' weights require. Where the
    global batch does not divide the epoch, some batches have one sample less and a blank in its place
    (`refinedet.pipeline.data.order`).

    Samples that cannot be decoded become grey images without objects, which add nothing to the loss, and are named;
    more than `data.max_bad_samples` of them on this rank raise `UserError`.

    Local shards are read in place; remote ones through a cache of `data.cache_bytes` in `data.cache_dir`, which all
    processes of a node share (`refinedet.pipeline.data.cache`).

    Decoding processes (`data.loader_workers`; 0 decodes in this process) are started by a fork server, a clean process
    without threads: Ray's actors and torch run threads whose locks a plain fork would copy in whatever state they are,
    and spawning would import torch anew for each. They end with this process, however it ends.

    data        section of the spec
    input_size  of the views, pixels; several: each global batch has one of them, the same on all ranks
    """

    def __init__(
        self,
        shards: ShardSet,
        data: Data,
        *,
        input_size: int | tuple[int, ...],
        seed: int,
        batch: BatchPlan,
        rank: int = 0,
        start: Cursor = Cursor(0, 0),  # noqa: B008 (a tuple)
        epochs: int | None = None,
    ) -> None:
        repeats = expected_repeats(shards, data.train, data.sampling)
        mosaic = data.augmentation.mosaic
        self._plan = Plan(
            shards, seed, batch, rank, epochs, data.shuffle_window, data.canonical_streams, repeats, mosaic
        )
        if self._plan.draws_per_epoch < batch.global_batch:
            raise UserError(
                f"an epoch of {shards.url} has {self._plan.draws_per_epoch} images, fewer than one global batch of "
                f"{batch.global_batch}: lower training.global_batch"
            )
        sizes = (input_size,) if isinstance(input_size, int) else input_size
        self._augment = Augmenter(sizes, seed, data.augmentation, data.include_difficult)
        self._workers = data.loader_workers
        self._cache = node_cache(shards, data.cache_dir, data.cache_bytes)
        self._faults = FaultLog(data.max_bad_samples, f"shards {shards.url}")
        self._running: Iterator[Batch] | None = None
        self._cursor = self._normalised(Cursor(*start))

    @property
    def cursor(self) -> Cursor:
        """The next global batch that has not been delivered whole."""
        return self._cursor

    @property
    def batches_per_epoch(self) -> int:
        return self._plan.batches_per_epoch

    @property
    def accumulation(self) -> int:
        """Micro-batches of this rank in a global batch."""
        return self._plan.batch.accumulation

    def __iter__(self) -> Iterator[Batch]:
        self.close()
        self._running = self._deliver()
        return self._running

    def close(self) -> None:
        """Stop the worker processes. The cursor stays."""
        if self._running is not None:
            self._running.close()  # type: ignore[attr-defined]
            self._running = None

    def _deliver(self) -> Iterator[Batch]:
        epoch, index = self._cursor
        part = 0
        loaded = iter(self._loader())
        try:
            for packed in loaded:
                batch = unpack(packed)
                assert (batch.epoch, batch.index, batch.part) == (epoch, index, part), "the loader changed the order"
                for fault in batch.faults:
                    self._faults.add(fault)
                part += 1
                if part == self.accumulation:
                    part = 0
                    epoch, index = self._cursor = self._normalised(Cursor(epoch, index + 1))
                yield batch
        finally:
            del loaded  # ends the workers

    def _loader(self) -> WebLoader:
        plan = self._plan
        ahead = plan.window // (plan.batch.world_size * max(1, self._workers))
        pipeline = DataPipeline(
            TurnSchedule(plan, self._cursor),
            partial(copy_ahead, cache=self._cache, ahead=ahead) if self._cache else None,
            partial(read_samples, shards=plan.shards, cache=self._cache),
            map_samples(self._augment),
            collate,
        )
        options = {"multiprocessing_context": _fork_server(), "prefetch_factor": 2} if self._workers else {}
        return WebLoader(
            pipeline,
            batch_size=None,
            collate_fn=_as_it_is,
            worker_init_fn=_end_with_parent if self._workers else None,
            num_workers=self._workers,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # a loader draws a number as it starts: not one of the training's
            **options,
        )

    def _normalised(self, cursor: Cursor) -> Cursor:
        epochs, batch = divmod(cursor.batch, self.batches_per_epoch)
        return Cursor(cursor.epoch + epochs, batch)


def _as_it_is(packed: Packed) -> Packed:
    return packed


def _end_with_parent(worker: int) -> None:
    """End this worker process when the training process ends, however it ends.

    torch looks whether the worker's parent has changed, but that is the fork server, and it stays as long as its
    children do: after a SIGKILL of the training process they would keep each other alive for ever.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True, name=f"parent of data worker {worker}").start()


def _fork_server() -> BaseContext:
    """A fork server that has imported what the workers need, once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "refinedet.pipeline.data.stream_steps"])
    return context
