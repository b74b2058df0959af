"""The order of samples: a pure function of (seed, epoch, data set), whatever the world size, workers or timing.

An epoch is one sequence of all samples. Shards are shuffled, laid end to end and cut into equal streams, as many as
`data.canonical_streams`. In each stream samples are shuffled within blocks. The sequence takes one sample of each
stream in turn: a row. `window` samples of the sequence, window / streams of each stream, are therefore shuffled among
one another. A window that covers the data set shuffles it whole.

An epoch is cut into ceil(samples / size) global batches, which differ by at most one sample: every sample of every
epoch is trained on once, every epoch has the same number of steps, and no batch is a small rest. What a batch lacks to
`size` is filled up with blanks, fewer than `size` of them in an epoch. A blank is a grey image without objects. It adds
nothing to the loss, as negatives are mined per positive of an image; only batch norm sees it. So the shares of ranks,
micro-batches and tensor shapes stay what they are.

A global batch's samples are dealt to the ranks as evenly as they go, in the order of their stream, so that ranks of one
node keep to the same streams: where the number of nodes divides `streams`, a node reads 1 / nodes of the bytes of an
epoch (and a shard at each cut twice).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from refinedet.pipeline.data.randomness import keyed_integer, keyed_permutation

_KEPT_BLOCKS = 256


class EpochOrder:
    """The sequence of one epoch; any stretch of it is computed on its own.

    shard_sizes  [shards]  samples in each shard
    """

    def __init__(
        self, shard_sizes: Sequence[int] | np.ndarray, *, seed: int, epoch: int, window: int, streams: int
    ) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(sizes.sum())
        self.streams = max(1, min(streams, self.num_samples))
        self.epoch = epoch
        self._key = (seed, epoch)
        self._block = max(1, window // self.streams)
        self._whole = keyed_permutation(self.num_samples, "all", *self._key) if window >= self.num_samples else None
        if self._whole is not None:
            return
        self._shards = keyed_permutation(len(sizes), "shards", *self._key)
        self._first = np.concatenate([[0], np.cumsum(sizes)])  # position in the data set, by shard
        self._laid = np.concatenate([[0], np.cumsum(sizes[self._shards])])  # place end to end, by shuffled shard
        # The cuts move from epoch to epoch, so that no sample belongs to the same stream for ever.
        self._shift = keyed_integer(self.num_samples, "shift", *self._key)
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def positions(self, start: int, stop: int) -> np.ndarray:
        """Positions in the data set of the sequence's [start, stop); int64 [stop - start]."""
        assert 0 <= start <= stop <= self.num_samples
        if self._whole is not None:
            return self._whole[start:stop]
        places = [self._place(*divmod(at, self.streams)) for at in range(start, stop)]
        laid = (np.asarray(places, dtype=np.int64) + self._shift) % self.num_samples
        shard = np.searchsorted(self._laid, laid, side="right") - 1
        return self._first[self._shards[shard]] + laid - self._laid[shard]

    def _place(self, row: int, stream: int) -> int:
        """Place, before the shift, of a stream's `row`-th sample."""
        base, extra = divmod(self.num_samples, self.streams)
        length = base + (stream < extra)
        block, within = divmod(row, self._block)
        first = block * self._block
        order = self._blocks.get((stream, block))
        if order is None:
            size = min(self._block, length - first)
            order = self._blocks[stream, block] = keyed_permutation(size, "block", *self._key, stream, block)
            if len(self._blocks) > max(_KEPT_BLOCKS, 2 * self.streams):
                self._blocks.popitem(last=False)
        return stream * base + min(stream, extra) + first + int(order[within])


def count_batches(num_samples: int, size: int) -> int:
    """Global batches of at most `size` samples in an epoch."""
    return -(-num_samples // size)


def batch_bounds(index: int, num_samples: int, num_batches: int) -> tuple[int, int]:
    """[start, stop) in the sequence of an epoch of one of its global batches."""
    return index * num_samples // num_batches, (index + 1) * num_samples // num_batches


def share_of_rank(start: int, stop: int, streams: int, rank: int, world_size: int) -> np.ndarray:
    """Places of a global batch [start, stop), from its start, that are a rank's, in the order of their stream.

    Shares differ by at most one image; the first ranks have the larger ones.
    """
    places = np.arange(start, stop)
    dealt = places[np.argsort(places % streams, kind="stable")] - start
    return _cut_evenly(dealt, rank, world_size)


def micro_batch_of_share(share: np.ndarray, part: int, accumulation: int) -> np.ndarray:
    """One of the `accumulation` micro-batches of a rank's share; they differ by at most one image."""
    return _cut_evenly(share, part, accumulation)


def size_of_micro_batch(size: int, rank: int, world_size: int, part: int, accumulation: int) -> int:
    """Images, blanks included, of a micro-batch of a global batch of `size`."""
    return len(_cut_evenly(_cut_evenly(np.arange(size), rank, world_size), part, accumulation))


def _cut_evenly(values: np.ndarray, number: int, pieces: int) -> np.ndarray:
    length, longer = divmod(len(values), pieces)
    start = number * length + min(number, longer)
    return values[start : start + length + (number < longer)]
