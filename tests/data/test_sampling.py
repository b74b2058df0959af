"""Frequencies of samples: exact totals, expected counts, LVIS's factors, balance, and shards that do not change."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from refinedet.pipeline.config.spec import Augmentation, Data, Sampling, Split
from refinedet.pipeline.data.index import ShardSet, open_shards
from refinedet.pipeline.data.sampling import balancing_factors, expected_repeats, fix_repeats, repeat_factors
from refinedet.pipeline.data.shards import prepare_shards
from refinedet.pipeline.runs.errors import UserError

from tests.data.streams import open_stream


def test_whole_repeats_are_met_exactly_and_others_on_average() -> None:
    repeats = np.tile([1.0, 3.0, 0.25, 1.5], 400)
    fixed = fix_repeats(repeats)
    assert fixed.num_draws == round(repeats.sum())
    counts = np.stack([fixed.counts(seed=3, epoch=epoch) for epoch in range(60)])
    assert (counts.sum(1) == fixed.num_draws).all()
    assert ((counts == np.floor(repeats)) | (counts == np.ceil(repeats))).all()
    np.testing.assert_allclose(counts.mean(0), repeats, atol=0.3)  # 60 draws of a coin: a deviation of 0.065
    assert (counts[0] != counts[1]).any()


def test_counts_are_the_same_for_ever() -> None:
    # Written down once: counts that change between releases break every resumed run.
    assert fix_repeats(np.array([0.5, 1.5, 2.0, 0.75, 1.25])).counts(seed=1, epoch=2).tolist() == [1, 1, 2, 0, 2]


def test_repeat_factors_are_those_of_lvis() -> None:
    # 100 images; class 1 in all, class 2 in one, class 3 in none.
    sample, label = np.array([*range(100), 7]), np.array([1] * 100 + [2])
    factors = repeat_factors(sample, label, 100, 3, Sampling(method="repeat_factor", threshold=0.25))
    assert factors[7] == pytest.approx(5)  # sqrt(0.25 / 0.01)
    assert (np.delete(factors, 7) == 1).all()


def test_balanced_classes_are_shown_equally_often() -> None:
    sample, label = np.arange(90), np.array([1] * 60 + [2] * 27 + [3] * 3)
    factors = balancing_factors(sample, label, 100, 4, Sampling(method="class_balanced"))
    np.testing.assert_allclose(np.bincount(label, factors[:90]), [0, 30, 30, 30])
    assert (factors[90:] == 1).all()  # images without objects


@pytest.fixture(scope="module")
def two_splits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Data, ShardSet]:
    splits = (Split(count=40), Split(count=20, weight=2.5))
    data = Data(format="shapes", image_size=64, train=splits, shard_bytes=40_000)
    return data, prepare_shards(data, "train", str(tmp_path_factory.mktemp("two")))


def test_a_weight_repeats_its_split_in_every_epoch(two_splits: tuple[Data, ShardSet]) -> None:
    data, shards = two_splits
    stream = open_stream(
        shards, input_size=64, augmentation=Augmentation(), seed=1, global_batch=16, epochs=2, train=data.train
    )
    assert stream.batches_per_epoch == 6  # 90 draws
    drawn: dict[int, Counter[str]] = {0: Counter(), 1: Counter()}
    images: dict[str, set[bytes]] = {}
    for batch in stream:
        drawn[batch.epoch].update(key for key in batch.keys if key)
        for key, image in zip(batch.keys, batch.images, strict=True):
            images.setdefault(key, set()).add(image.numpy().tobytes())
    for counts in drawn.values():
        assert counts.total() == 90
        assert Counter(counts.values()) == {1: 40, 2: 10, 3: 10}
    total = drawn[0] + drawn[1]
    assert np.mean([len(images[key]) / total[key] for key in total]) > 0.98  # each occurrence is another view


def test_weights_do_not_change_the_shards(two_splits: tuple[Data, ShardSet], tmp_path: Path) -> None:
    data, shards = two_splits
    plain = data.model_copy(update={"train": (Split(count=40), Split(count=20))})
    assert prepare_shards(plain, "train", str(tmp_path)).digest == shards.digest
    assert prepare_shards(plain, "train", shards.url).digest == shards.digest
    assert expected_repeats(shards, plain.train, plain.sampling) is None


@pytest.mark.parametrize("method", ["repeat_factor", "class_balanced"])
def test_methods_read_the_classes_from_the_shards(two_splits: tuple[Data, ShardSet], method: str) -> None:
    _, shards = two_splits
    sampling = Sampling.model_validate({"method": method, "threshold": 1.0, "max_repeats": 3})
    repeats = expected_repeats(open_shards(shards.url), (Split(count=40), Split(count=20)), sampling)
    assert repeats is not None
    values = repeats.fixed / 2**20
    assert len(np.unique(values.round(3))) > 3
    assert values.max() <= 3.01
    assert repeats.num_draws == pytest.approx(values.sum())


def test_weights_need_the_splits_of_the_shards(two_splits: tuple[Data, ShardSet]) -> None:
    data, shards = two_splits
    with pytest.raises(UserError, match="was written from 2 splits"):
        expected_repeats(shards, data.train[1:], data.sampling)


def test_a_weight_in_val_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`weight` applies to data.train"):
        Data(format="shapes", train=(Split(count=1),), val=(Split(count=1, weight=2),))


def test_small_sets_are_drawn_as_often_as_expected() -> None:
    """Systematic sampling without a random phase would draw the first of these half of the time."""
    repeats = fix_repeats(np.array([0.25, 0.75]))
    counts = np.array([repeats.counts(0, epoch) for epoch in range(4000)])
    assert (counts.sum(1) == 1).all()
    np.testing.assert_allclose(counts.mean(0), [0.25, 0.75], atol=0.03)
