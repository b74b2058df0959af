"""The order contract, over random seeds, sizes, shard sizes, world sizes and workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from refinedet.pipeline.config.batches import divide_batch
from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data import stream_steps
from refinedet.pipeline.data.order import EpochOrder, micro_batch_of_share, share_of_rank
from refinedet.pipeline.data.randomness import stable_order
from refinedet.pipeline.data.samples import Cursor
from refinedet.pipeline.data.sampling import EpochDraws, Repeats, fix_repeats
from refinedet.pipeline.data.stream_steps import Plan, Turn, TurnSchedule

from tests.data.conftest import make_index

shard_sizes = st.lists(st.integers(1, 60), min_size=1, max_size=30)
WORLD_SIZES = (1, 2, 3, 4, 5, 7, 8)
BATCH = 24


class _Worker:
    def __init__(self, number: int, workers: int) -> None:
        self.id, self.num_workers = number, workers


def turns_of_rank(plan: Plan, start: Cursor, workers: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Turn]]:
    """A rank's micro-batches as its loader delivers them: of each worker in turn."""

    def of_worker(number: int) -> Iterator[Turn]:
        iterator = iter(TurnSchedule(plan, start))
        while True:
            monkeypatch.setattr(stream_steps, "get_worker_info", lambda: _Worker(number, workers) if workers else None)
            turn = next(iterator, None)
            if turn is None:
                return
            yield turn

    sources = [of_worker(number) for number in range(max(1, workers))]
    while True:
        for source in sources:
            micro_batch = []
            for turn in source:
                micro_batch.append(turn)
                if turn.last:
                    break
            if not micro_batch:
                return
            assert micro_batch[-1].last
            assert plan.batch.micro_batch - 1 <= len(micro_batch) <= plan.batch.micro_batch
            yield micro_batch


Draw = tuple[int, int, tuple[int, ...]]
"""(position in the data set, occurrence in the epoch, positions of the samples that a mosaic shows beside it)"""


def global_batches(
    sizes: list[int],
    seed: int,
    start: Cursor,
    how: tuple[int, int, int],
    window: int,
    repeats: Repeats | None = None,
) -> list[tuple[Cursor, tuple[Draw, ...]]]:
    """(cursor, sorted draws) of every global batch of two epochs, gathered from all ranks.

    how  (world size, workers, micro-batch)
    """
    index = make_index(sizes)
    world_size, workers, micro_batch = how
    gathered: dict[Cursor, list[Draw]] = {}
    images: Counter[Cursor] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(world_size):
            batch = divide_batch(BATCH, micro_batch, world_size)
            plan = Plan(index, seed, batch, rank, 2, window, 16, repeats, mosaic=True)
            last = Cursor(*start)
            for micro in turns_of_rank(plan, start, workers, patch):
                cursor = Cursor(micro[0].epoch, micro[0].index)
                assert cursor >= last
                last = cursor
                images[cursor] += len(micro)
                drawn = [(turn.position, turn.occurrence, turn.companions) for turn in micro if not turn.blank]
                gathered.setdefault(cursor, []).extend(drawn)
    assert set(images.values()) <= {BATCH}
    return [(cursor, tuple(sorted(draws))) for cursor, draws in sorted(gathered.items())]


@settings(max_examples=40, deadline=None)
@given(sizes=shard_sizes, seed=st.integers(0, 2**31), window=st.integers(1, 400), streams=st.integers(1, 20))
def test_an_epoch_is_a_permutation(sizes: list[int], seed: int, window: int, streams: int) -> None:
    order = EpochOrder(sizes, seed=seed, epoch=3, window=window, streams=streams)
    whole = order.positions(0, sum(sizes))
    assert sorted(whole) == list(range(sum(sizes)))
    middle = sum(sizes) // 2
    again = EpochOrder(sizes, seed=seed, epoch=3, window=window, streams=streams)
    np.testing.assert_array_equal(again.positions(middle, sum(sizes)), whole[middle:])


def test_order_differs_by_seed_and_epoch() -> None:
    sizes = [50] * 20
    first, *others = (
        tuple(EpochOrder(sizes, seed=seed, epoch=epoch, window=100, streams=16).positions(0, 1000))
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    )
    assert all(first != other for other in others)


def test_order_is_the_same_for_ever() -> None:
    # Written down once: an order that changes between releases breaks every resumed run.
    windowed = EpochOrder([5, 7, 3, 9], seed=1, epoch=2, window=8, streams=4).positions(0, 8)
    whole = EpochOrder([5, 7], seed=1, epoch=2, window=100, streams=4).positions(0, 8)
    assert (windowed.tolist(), whole.tolist()) == ([5, 12, 17, 0, 6, 11, 18, 23], [3, 7, 5, 6, 4, 11, 10, 9])


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=3, max_size=12).filter(lambda sizes: sum(sizes) >= BATCH),
    seed=st.integers(0, 2**31),
    window=st.integers(1, 200),
    weighted=st.booleans(),
    data=st.data(),
)
def test_stopped_and_resumed_anywhere_gives_exactly_the_rest(
    sizes: list[int], seed: int, window: int, weighted: bool, data: st.DataObject
) -> None:
    def draw_how() -> tuple[int, int, int]:
        world_size = data.draw(st.sampled_from(WORLD_SIZES))
        workers = data.draw(st.sampled_from((0, 2, 5)))
        return world_size, workers, data.draw(st.integers(1, BATCH))

    expected, repeats = np.ones(sum(sizes)), None
    if weighted:
        values = st.one_of(st.floats(0.1, 5), st.sampled_from((1.0, 2.0)))
        expected = np.array(data.draw(st.lists(values, min_size=sum(sizes), max_size=sum(sizes))))
        if expected.sum() < BATCH:
            expected[0] += BATCH
        repeats = fix_repeats(expected)
    total = round(float(np.cumsum(expected)[-1]))
    whole = global_batches(sizes, seed, Cursor(0, 0), draw_how(), window, repeats)
    assert len(whole) == 2 * -(-total // BATCH)
    for epoch in (0, 1):
        batches = [draws for cursor, draws in whole if cursor.epoch == epoch]
        seen = sorted(draw[:2] for draws in batches for draw in draws)
        assert all(len(companions) == 3 for draws in batches for _, _, companions in draws)
        counts = np.bincount([position for position, _ in seen], minlength=sum(sizes))
        assert seen == [(position, number) for position, count in enumerate(counts) for number in range(count)]
        assert len(seen) == total
        assert np.abs(counts - expected * total / expected.sum()).max() < 1 + 1e-5
        assert max(map(len, batches)) - min(map(len, batches)) <= 1

    stopped = data.draw(st.integers(0, len(whole) - 1))
    rest = global_batches(sizes, seed, whole[stopped][0], draw_how(), window, repeats)
    assert rest == whole[stopped:]


@settings(max_examples=40, deadline=None)
@given(
    sizes=shard_sizes,
    seed=st.integers(0, 2**31),
    window=st.integers(1, 400),
    streams=st.integers(1, 20),
    batch=st.integers(1, 60),
    data=st.data(),
)
def test_companions_are_the_draws_of_the_next_batches(
    sizes: list[int], seed: int, window: int, streams: int, batch: int, data: st.DataObject
) -> None:
    total = sum(sizes)
    draws = EpochDraws(sizes, None, seed=seed, epoch=1, window=window, streams=streams)
    sequence = draws.stretch(0, total)[0].tolist()
    step = min(streams, total)
    while step < batch:  # whole rounds of the streams, at least a batch
        step += min(streams, total)
    step = max(1, min(step, total // 4))
    start = data.draw(st.integers(0, total - 1))
    stop = data.draw(st.integers(start + 1, total))
    found = draws.companions(start, stop, batch).T.tolist()
    assert found == [[sequence[(at + step * later) % total] for later in (1, 2, 3)] for at in range(start, stop)]
    if total >= 4:
        assert all(len({sequence[at], *beside}) == 4 for at, beside in zip(range(start, stop), found, strict=True))


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16])
def test_a_node_reads_its_share_of_the_shards_with_mosaic(nodes: int) -> None:
    draws = EpochDraws([100] * 160, None, seed=0, epoch=0, window=512, streams=16)
    read: list[set[int]] = [set() for _ in range(nodes)]
    for start in range(0, 16_000 - 4 * 32, 32):  # without the last batches, whose companions are the epoch's first
        companions = draws.companions(start, start + 32, 32)
        for node in range(nodes):
            places = share_of_rank(start, start + 32, 16, node, nodes)
            read[node].update((companions[:, places] // 100).ravel().tolist())
    assert max(len(shards) for shards in read) <= 160 / nodes + 2 * 16 / nodes


@pytest.mark.parametrize("nodes", [1, 2, 4, 8, 16])
def test_a_node_reads_its_share_of_the_shards(nodes: int) -> None:
    sizes = [100] * 160
    order = EpochOrder(sizes, seed=0, epoch=0, window=512, streams=16)
    read: list[set[int]] = [set() for _ in range(nodes)]
    for start in range(0, sum(sizes), 32):
        positions = order.positions(start, start + 32)
        for node in range(nodes):
            share = positions[share_of_rank(start, start + 32, order.streams, node, nodes)]
            read[node].update((share // 100).tolist())
    # A shard that a cut divides is read on both sides of it.
    assert max(len(shards) for shards in read) <= 160 / nodes + 2 * 16 / nodes


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_partition_a_global_batch(world_size: int) -> None:
    shares = [share_of_rank(48, 48 + BATCH, 16, rank, world_size) for rank in range(world_size)]
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)
    assert sorted(np.concatenate(shares)) == list(range(BATCH))


@given(share=st.integers(1, 60), data=st.data())
def test_micro_batches_partition_a_share(share: int, data: st.DataObject) -> None:
    accumulation = data.draw(st.integers(1, share))
    parts = [micro_batch_of_share(np.arange(share), part, accumulation) for part in range(accumulation)]
    assert np.concatenate(parts).tolist() == list(range(share))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert min(map(len, parts)) >= 1


@given(values=st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 3), max_size=40))
def test_equal_numbers_keep_their_order(values: list[int]) -> None:
    array = np.array(values, np.uint64)
    assert stable_order(array).tolist() == sorted(range(len(values)), key=lambda at: (values[at], at))


def test_ten_million_samples_are_within_reach() -> None:
    order = EpochOrder([1000] * 10_000, seed=0, epoch=7, window=4096, streams=16)
    positions = order.positions(9_876_512, 9_876_544)
    assert len(set(positions.tolist())) == 32
    assert positions.min() >= 0
    assert positions.max() < 10_000_000


def test_a_set_sorted_by_class_is_mixed_well_by_default() -> None:
    defaults = Data(format="shapes", train=(Split(count=1),))
    size, batch, classes = 118_000, 32, 80
    order = EpochOrder(
        [400] * (size // 400),
        seed=0,
        epoch=0,
        window=defaults.shuffle_window,
        streams=defaults.canonical_streams,
    )
    found = []
    for start in range(0, size - batch, size // 200):
        found.append(len(np.unique(order.positions(start, start + batch) * classes // size)))
    assert np.mean(found) >= 25  # a full shuffle gives 26.5
