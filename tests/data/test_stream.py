"""The stream with its real worker processes: exact, resumable, and gone when it is closed."""

from __future__ import annotations

import hashlib
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from refinedet.pipeline.config.spec import Augmentation
from refinedet.pipeline.data.index import ShardSet, open_shards
from refinedet.pipeline.data.reading import SampleReader
from refinedet.pipeline.data.samples import Batch, Cursor
from refinedet.pipeline.data.stream import TrainingStream
from refinedet.pipeline.runs.errors import UserError

from tests.data.conftest import NUM_SHAPES
from tests.data.streams import PLAIN, open_stream

BATCH = 24
PER_EPOCH = -(-NUM_SHAPES // BATCH)


def make_stream(shards: ShardSet, **changes: Any) -> TrainingStream:
    options: dict[str, Any] = {"input_size": 64, "augmentation": Augmentation(), "seed": 5, "global_batch": BATCH}
    return open_stream(shards, **{**options, "epochs": 2, "shuffle_window": 64, **changes})


def contents(batches: Iterator[Batch]) -> dict[Cursor, dict[str, str]]:
    """By global batch: a digest of every view's pixels, boxes and labels, by sample key."""
    found: dict[Cursor, dict[str, str]] = {}
    for batch in batches:
        views = found.setdefault(Cursor(batch.epoch, batch.index), {})
        for key, image, targets in zip(batch.keys, batch.images, batch.targets, strict=True):
            if not key:  # a blank
                assert len(targets.boxes) == 0
                continue
            parts = (image, targets.boxes, targets.labels)
            assert key not in views
            views[key] = hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()
    return found


def merged(shards: ShardSet, world_size: int, **changes: Any) -> dict[Cursor, dict[str, str]]:
    whole: dict[Cursor, dict[str, str]] = {}
    for rank in range(world_size):
        stream = make_stream(shards, rank=rank, world_size=world_size, **changes)
        for cursor, views in contents(iter(stream)).items():
            assert not whole.get(cursor, {}).keys() & views.keys()
            whole.setdefault(cursor, {}).update(views)
    return whole


@pytest.fixture(scope="module")
def expected(shapes_shards: ShardSet) -> dict[Cursor, dict[str, str]]:
    whole = contents(iter(make_stream(shapes_shards)))
    assert [*whole] == [(epoch, index) for epoch in range(2) for index in range(PER_EPOCH)]
    assert {len(views) for views in whole.values()} == {BATCH - 1, BATCH - 2}
    for epoch in range(2):
        keys = [key for cursor, views in whole.items() if cursor.epoch == epoch for key in views]
        assert len(set(keys)) == len(keys) == NUM_SHAPES
    return whole


# Every pair of these sizes is in test_order.py, without the processes.
ALWAYS = {(1, 2), (1, 5), (2, 2), (5, 2), (4, 0)}
GRID = [
    pytest.param(world_size, workers, marks=() if (world_size, workers) in ALWAYS else pytest.mark.slow)
    for world_size in (1, 2, 3, 4, 5, 8)
    for workers in (0, 2, 5)
]


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
@pytest.mark.parametrize(("world_size", "workers"), GRID)
def test_same_global_batches_at_any_world_size_and_workers(
    shapes_shards: ShardSet, expected: dict[Cursor, dict[str, str]], world_size: int, workers: int
) -> None:
    micro_batch = {1: 6, 2: 4, 3: 3, 4: 3, 5: 2, 8: 3}[world_size]
    start = Cursor(0, PER_EPOCH - 2)  # across the end of an epoch
    whole = merged(shapes_shards, world_size, loader_workers=workers, start=start, micro_batch=micro_batch)
    assert whole == {cursor: views for cursor, views in expected.items() if cursor >= start}


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_mosaics_are_the_same_at_any_world_size_and_workers_and_after_a_stop(
    shapes_shards: ShardSet, expected: dict[Cursor, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    with monkeypatch.context() as patch:
        reads = SampleReader.read
        patch.setattr(SampleReader, "read", lambda reader, position: read.append(position) or reads(reader, position))
        mosaics = merged(shapes_shards, 1, augmentation=Augmentation(mosaic=True))
    assert 2.2 < len(read) / (2 * NUM_SHAPES) < 2.8
    same = [mosaics[cursor][key] == view for cursor, views in expected.items() for key, view in views.items()]
    assert 0.4 < sum(same) / len(same) < 0.6  # the others' generators are their own
    start = Cursor(0, PER_EPOCH - 2)
    rest = {cursor: views for cursor, views in mosaics.items() if cursor >= start}
    for world_size, workers, micro_batch in ((1, 2, 6), (5, 0, 2), (2, 2, 4)):
        changes = {"augmentation": Augmentation(mosaic=True), "loader_workers": workers, "micro_batch": micro_batch}
        assert merged(shapes_shards, world_size, start=start, **changes) == rest


def test_views_differ_between_epochs(expected: dict[Cursor, dict[str, str]]) -> None:
    by_epoch = [
        {key: view for cursor, views in expected.items() if cursor.epoch == epoch for key, view in views.items()}
        for epoch in (0, 1)
    ]
    assert all(by_epoch[0][key] != by_epoch[1][key] for key in by_epoch[0].keys() & by_epoch[1].keys())


def test_iterating_again_goes_on_at_the_cursor(shapes_shards: ShardSet, expected: dict[Cursor, dict[str, str]]) -> None:
    stream = make_stream(shapes_shards, micro_batch=12, loader_workers=2)
    batches = iter(stream)
    for _ in range(3):
        next(batches)
    assert stream.cursor == (0, 1)  # the second global batch was delivered by half
    rest = contents(iter(stream))
    assert rest == {cursor: views for cursor, views in expected.items() if cursor >= (0, 1)}
    assert stream.cursor == (2, 0)
    assert list(stream) == []


def test_batches_are_what_the_model_takes(shapes_shards: ShardSet) -> None:
    stream = make_stream(shapes_shards, micro_batch=6, world_size=2, rank=1)
    assert (stream.accumulation, stream.batches_per_epoch) == (2, PER_EPOCH)
    for batch in stream:
        assert batch.images.shape == (6, 3, 64, 64)
        assert batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        for targets in batch.targets:
            assert targets.boxes.dtype == torch.float32
            assert targets.labels.dtype == torch.int64
            assert len(targets.boxes) == len(targets.labels)
            assert ((targets.boxes >= 0) & (targets.boxes <= 64)).all()
            assert (targets.boxes[:, 2:] > targets.boxes[:, :2]).all()
            assert ((targets.labels >= 1) & (targets.labels <= shapes_shards.num_classes)).all()


def test_each_global_batch_has_one_of_the_sizes_on_all_ranks(shapes_shards: ShardSet) -> None:
    sizes = (64, 128, 192)
    found: dict[Cursor, set[int]] = {}
    for world_size in (1, 3):
        for rank in range(world_size):
            stream = make_stream(
                shapes_shards, input_size=sizes, rank=rank, world_size=world_size, micro_batch=6, epochs=3
            )
            for batch in stream:
                height, width = batch.images.shape[2:]
                assert height == width
                assert all((targets.boxes <= height + 1e-4).all() for targets in batch.targets)
                found.setdefault(Cursor(batch.epoch, batch.index), set()).add(height)
    assert all(len(of_batch) == 1 for of_batch in found.values())
    assert set().union(*found.values()) == set(sizes)
    by_epoch = [[found[Cursor(epoch, index)] for index in range(PER_EPOCH)] for epoch in range(3)]
    assert by_epoch[0] != by_epoch[1]


def test_a_window_as_large_as_the_set_reads_each_contents_file_once(
    shapes_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = open_shards(shapes_shards.url)
    read, method = [], ShardSet.read_columns

    def count(self: ShardSet, shard: int, *names: str) -> dict[str, Any]:
        read.append(shard)
        return method(self, shard, *names)

    monkeypatch.setattr(ShardSet, "read_columns", count)
    window = shards.num_samples
    list(
        open_stream(shards, input_size=64, augmentation=PLAIN, seed=0, global_batch=20, epochs=2, shuffle_window=window)
    )
    assert sorted(read) == list(range(len(shards)))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_draws_no_random_numbers_of_the_training(shapes_shards: ShardSet, workers: int) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    stream = make_stream(shapes_shards, loader_workers=workers, epochs=None)
    next(iter(stream))
    stream.close()
    assert torch.equal(torch.rand(1), expected)


def test_workers_end_with_the_stream(shapes_shards: ShardSet) -> None:
    stream = make_stream(shapes_shards, loader_workers=2, epochs=None)
    next(iter(stream))
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_missing_shard_is_an_error_that_names_it(shapes_shards: ShardSet, tmp_path: Path, workers: int) -> None:
    copy = shutil.copytree(shapes_shards.url, tmp_path / "copy")
    (copy / shapes_shards.names[2]).unlink()
    with pytest.raises(UserError, match=shapes_shards.names[2]):
        list(make_stream(open_shards(str(copy)), loader_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_samples_are_grey_and_named_up_to_the_limit(
    shapes_shards: ShardSet, tmp_path: Path, workers: int
) -> None:
    copy = shutil.copytree(shapes_shards.url, tmp_path / "copy")
    shards = open_shards(str(copy))
    damaged = [shards.entry(position) for position in (3, 60, 110)]
    for entry in damaged:
        path = copy / shards.names[entry.shard]
        content = bytearray(path.read_bytes())
        content[entry.offset + 700] ^= 4
        path.write_bytes(content)

    faults = {}
    for batch in make_stream(shards, loader_workers=workers, max_bad_samples=3):  # the second epoch meets them again
        for fault in batch.faults:
            faults[fault.key] = fault
            at = batch.keys.index(fault.key)
            assert batch.images[at].flatten(1).unique(dim=1).shape[1] < 30  # nothing but grey, however augmented
            assert len(batch.targets[at].labels) == 0
    assert set(faults) == {entry.key for entry in damaged}

    with pytest.raises(UserError, match=r"more than 2 faults.*shard-\d+\.tar, 0000.*checksum"):
        list(make_stream(shards, loader_workers=workers, max_bad_samples=2))


def test_a_truncated_shard_names_what_it_lost(shapes_shards: ShardSet, tmp_path: Path) -> None:
    copy = shutil.copytree(shapes_shards.url, tmp_path / "copy")
    shards = open_shards(str(copy))
    path = copy / shards.names[1]
    path.write_bytes(path.read_bytes()[: shards.entry(int(shards.first[2]) - 1).offset + 100])
    faults = {fault for batch in make_stream(shards, max_bad_samples=1) for fault in batch.faults}
    assert [(fault.shard, "ends early" in fault.reason) for fault in faults] == [(shards.names[1], True)]


def test_wrong_sizes_are_said_at_once(shapes_shards: ShardSet) -> None:
    with pytest.raises(UserError, match="global_batch 24 has fewer images than the 25 workers"):
        make_stream(shapes_shards, world_size=25)
    with pytest.raises(UserError, match="fewer than one global batch of 256"):
        make_stream(shapes_shards, global_batch=256)
