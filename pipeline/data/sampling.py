"""Occurrences of each sample in an epoch: a pure function of (seed, epoch, data set, the sampling's settings).

A split's `weight` and the method of `data.sampling` give each sample its expected repeats, a real number. They are
fixed-point numbers whose sum is a whole number T, so every epoch has exactly T draws. A keyed permutation for each
epoch and systematic sampling along it give each sample the whole number below or above its repeats; whole repeats are
met exactly. `EpochOrder` then orders the draws as if each were a sample.

N samples, T draws of an epoch, C classes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from refinedet.pipeline.config.spec import Sampling, Split
from refinedet.pipeline.data.index import ShardSet
from refinedet.pipeline.data.order import EpochOrder
from refinedet.pipeline.data.randomness import keyed_integer, keyed_permutation
from refinedet.pipeline.runs.errors import UserError

_ONE_BITS = 20
_ONE = 2**_ONE_BITS  # a repeat of 1 in fixed point


@dataclass(frozen=True)
class Repeats:
    """Expected repeats of each sample in an epoch.

    fixed  int64 [N]  in units of 2**-20; their sum is a whole number of repeats
    """

    fixed: np.ndarray

    @property
    def num_draws(self) -> int:
        """T, the length of every epoch."""
        return int(self.fixed.sum()) // _ONE

    def counts(self, seed: int, epoch: int) -> np.ndarray:
        """Return the occurrences of each sample in an epoch, its repeats rounded down or up; int64 [N], sum T."""
        order = keyed_permutation(len(self.fixed), "sampling", seed, epoch)
        phase = keyed_integer(_ONE, "sampling phase", seed, epoch)
        passed = (np.cumsum(self.fixed[order]) + phase) >> _ONE_BITS
        counts = np.empty_like(passed)
        counts[order] = np.diff(passed, prepend=0)
        return counts


class EpochDraws:
    """The sequence of one epoch, as (position in the data set, which occurrence of it in this epoch).

    shard_sizes  [shards]  samples in each shard
    repeats      None: every sample once
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        repeats: Repeats | None,
        *,
        seed: int,
        epoch: int,
        window: int,
        streams: int,
    ) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._first: np.ndarray | None = None  # draw, by sample
        if repeats is not None:
            self._first = np.concatenate([[0], np.cumsum(repeats.counts(seed, epoch))])
            sizes = np.diff(self._first[np.concatenate([[0], np.cumsum(sizes)])])
        self._order = EpochOrder(sizes, seed=seed, epoch=epoch, window=window, streams=streams)
        self.epoch = epoch
        self.streams = self._order.streams
        self.num_draws = self._order.num_samples

    def stretch(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions and occurrences of the sequence's [start, stop); int64 [stop - start] each."""
        draws = self._order.positions(start, stop)
        if self._first is None:
            return draws, np.zeros_like(draws)
        positions = np.searchsorted(self._first, draws, side="right") - 1
        return positions, draws - self._first[positions]

    def companions(self, start: int, stop: int, global_batch: int) -> np.ndarray:
        """Positions of the samples that a mosaic shows beside those of [start, stop); int64 [3, stop - start].

        They are the draws one, two and three global batches later, whole rounds of the streams, so that a node reads
        its own shards for them too. At the end of the epoch they continue from its start.
        """
        rounds = -(-global_batch // self.streams) * self.streams
        step = max(1, min(rounds, self.num_draws // 4))
        places = (np.arange(start, stop) + step * np.arange(1, 4)[:, None]) % self.num_draws
        return np.stack([self._positions(row) for row in places])

    def _positions(self, places: np.ndarray) -> np.ndarray:
        """Positions at ascending places, which may continue once from the epoch's start."""
        cut = int(np.argmin(places))
        pieces = [piece for piece in (places[:cut], places[cut:]) if len(piece)]
        return np.concatenate([self.stretch(int(piece[0]), int(piece[-1]) + 1)[0] for piece in pieces])


def expected_repeats(shards: ShardSet, splits: Sequence[Split], sampling: Sampling) -> Repeats | None:
    """Expected repeats of the samples of a training set; None where every sample occurs once.

    splits  those the shards were written from, in that order
    Crowds and boxes that cannot be trained on count for no class; objects that are `difficult` do.
    """
    weights = [split.weight for split in splits]
    if sampling.method == "uniform" and set(weights) <= {1.0}:
        return None
    if len(shards.split_sizes) != len(splits):
        raise UserError(
            f"{shards.url} was written from {len(shards.split_sizes)} splits and data.train has {len(splits)}: "
            "write the shards again, so that each weight meets its split"
        )
    repeats = np.repeat(np.array(weights), shards.split_sizes)
    if sampling.method != "uniform":
        sample, label = _classes_of_samples(shards)
        factors = METHODS[sampling.method](sample, label, shards.num_samples, shards.num_classes, sampling)
        repeats = repeats * np.minimum(factors, sampling.max_repeats)
    return fix_repeats(repeats)


def fix_repeats(repeats: np.ndarray) -> Repeats:
    """Fixed-point repeats whose sum is the whole number nearest to the sum of `repeats` [N], and at least 1."""
    sums = np.cumsum(repeats)  # one after the other: the same on every machine
    draws = max(1, round(float(sums[-1])))
    return Repeats(np.diff(np.rint(sums / sums[-1] * draws * _ONE).astype(np.int64), prepend=0))


def repeat_factors(
    sample: np.ndarray, label: np.ndarray, num_samples: int, num_classes: int, sampling: Sampling
) -> np.ndarray:
    """LVIS's repeat factors, float64 [N]: max over a sample's classes of max(1, sqrt(threshold / f)).

    f is the share of samples that show the class. (Gupta et al., LVIS, 2019, appendix)
    sample, label  [P]  the classes that each sample shows, every pair once
    """
    share = np.bincount(label, minlength=num_classes + 1) / num_samples
    with np.errstate(divide="ignore"):
        of_class = np.maximum(1, np.sqrt(sampling.threshold / share))
    factors = np.ones(num_samples)
    np.maximum.at(factors, sample, of_class[label])
    return factors


def balancing_factors(
    sample: np.ndarray, label: np.ndarray, num_samples: int, num_classes: int, sampling: Sampling
) -> np.ndarray:
    """Factors float64 [N] of drawing a class, all alike, and then one of its samples; samples without objects: 1.

    The factors of the samples with objects sum to their number.
    sample, label  [P]  the classes that each sample shows, every pair once
    """
    found = np.bincount(label, minlength=num_classes + 1)
    with_objects = np.unique(sample)
    factors = np.ones(num_samples)
    factors[with_objects] = 0
    np.add.at(factors, sample, len(with_objects) / max(1, np.count_nonzero(found)) / found[label])
    return factors


METHODS: dict[str, Callable[[np.ndarray, np.ndarray, int, int, Sampling], np.ndarray]] = {
    "repeat_factor": repeat_factors,
    "class_balanced": balancing_factors,
}


def _classes_of_samples(shards: ShardSet) -> tuple[np.ndarray, np.ndarray]:
    """Positions and labels [P]: the classes that each sample shows, every pair once."""
    ids = np.array([category.id for category in shards.categories])
    pairs = []
    for shard in range(len(shards)):
        columns = shards.read_columns(shard, "num_objects", "category_ids", "learnt")
        sample = np.repeat(np.arange(len(columns["num_objects"])), columns["num_objects"]) + shards.first[shard]
        label = np.searchsorted(ids, columns["category_ids"]) + 1
        pairs.append(np.unique(np.stack([sample, label], 1)[columns["learnt"]], axis=0))
    found = np.concatenate(pairs)
    return found[:, 0], found[:, 1]
