"""The node's cache of remote shards: bounded, shared, evicting what is done; and the retries below it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from refinedet.pipeline.config.spec import Augmentation
from refinedet.pipeline.data.cache import ShardCache, node_cache, prefetch
from refinedet.pipeline.data.index import ShardSet, open_shards
from refinedet.pipeline.data.reading import SampleReader
from refinedet.pipeline.data.samples import Cursor
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import JobError, UserError

from tests.data.streams import open_stream


@pytest.fixture
def remote(shapes_shards: ShardSet) -> Iterator[ShardSet]:
    """The shapes' shards in a store that is not the local disk."""
    memory = fsspec.filesystem("memory")
    for name in os.listdir(shapes_shards.url):
        memory.pipe(f"/shapes/{name}", (Path(shapes_shards.url) / name).read_bytes())
    yield open_shards("memory://shapes")
    memory.rm("/shapes", recursive=True)


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.tar"))


def batches(shards: ShardSet, **options: Any) -> list[Any]:
    stream = open_stream(
        shards,
        input_size=48,
        augmentation=Augmentation(),
        seed=1,
        global_batch=20,
        epochs=1,
        shuffle_window=40,
        **options,
    )
    return [(batch.index, batch.keys, int(batch.images.sum())) for batch in stream]


@pytest.mark.parametrize("room", [1, 3, 100])
def test_remote_batches_equal_local_ones_within_the_bound(
    shapes_shards: ShardSet, remote: ShardSet, tmp_path: Path, room: int
) -> None:
    bound = room * max(remote.num_bytes)
    seen = batches(remote, cache_dir=str(tmp_path), cache_bytes=bound)
    assert seen == batches(shapes_shards)
    assert used(tmp_path) <= bound
    assert not list(tmp_path.rglob("*.partial"))


def test_copies_serve_when_the_store_is_gone(remote: ShardSet, tmp_path: Path) -> None:
    held = ShardCache(remote, str(tmp_path), 2**30)
    expected = [held.read(shard, 100, 50) for shard in range(len(remote))]
    assert all(held.copy(shard) for shard in range(len(remote)))
    memory = fsspec.filesystem("memory")
    for name in remote.names:
        memory.rm(f"/shapes/{name}")
    assert [held.read(shard, 100, 50) for shard in range(len(remote))] == expected


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] if how == "cut" else content[:700] + b"~~~~" + content[704:])


@pytest.mark.parametrize("how", ["cut", "changed"])
def test_a_damaged_copy_is_read_from_the_store_and_made_again(remote: ShardSet, tmp_path: Path, how: str) -> None:
    held = ShardCache(remote, str(tmp_path), 2**30)
    expected = [SampleReader(remote).read(position) for position in range(remote.num_samples)]
    assert all(held.copy(shard) for shard in range(len(remote)))
    for shard in range(len(remote)):
        damage(Path(held.path(shard)), how)
    reader = SampleReader(remote, held)
    for position, sample in enumerate(expected):
        read = reader.read(position)
        assert read.fault is None
        np.testing.assert_array_equal(read.image, sample.image)
    assert not any(os.path.exists(held.path(shard)) for shard in range(len(remote)))
    assert held.copy(3)
    assert os.path.getsize(held.path(3)) == remote.num_bytes[3]


def test_a_copy_of_another_size_is_made_again(remote: ShardSet, tmp_path: Path) -> None:
    held = ShardCache(remote, str(tmp_path), 2**30)
    assert held.copy(0)
    damage(Path(held.path(0)), "cut")
    assert held.copy(0)
    assert Path(held.path(0)).read_bytes() == fsspec.filesystem("memory").cat(f"/shapes/{remote.names[0]}")


def test_what_is_damaged_in_the_store_too_is_a_grey_sample(remote: ShardSet, tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    content = memory.cat(f"/shapes/{remote.names[0]}")
    memory.pipe(f"/shapes/{remote.names[0]}", content[:700] + b"~~~~" + content[704:])
    held = ShardCache(remote, str(tmp_path), 2**30)
    assert held.copy(0)
    fault = SampleReader(remote, held).read(0).fault
    assert fault is not None
    assert "checksum" in fault.reason


def test_a_store_or_disk_that_fails_is_an_error_and_no_grey_sample(
    remote: ShardSet, shapes_shards: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    for shards in (remote, shapes_shards):
        shards.contents(0)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", fail)
    monkeypatch.setattr(storage.retry, "__kwdefaults__", {**storage.retry.__kwdefaults__, "deadline_s": 0.0})
    with pytest.raises(JobError, match=r"no answer from storage .* check the storage"):
        SampleReader(remote).read(0)
    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(OSError, match="Input/output error"):
        SampleReader(shapes_shards).read(0)

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "cat_file", refuse)
    monkeypatch.setattr(os, "open", refuse)
    for shards in (remote, shapes_shards):
        with pytest.raises(UserError, match=r"shard-000000\.tar may not be read"):
            SampleReader(shards).read(0)


def test_the_least_recently_used_copy_makes_room(remote: ShardSet, tmp_path: Path) -> None:
    held = ShardCache(remote, str(tmp_path), sum(remote.num_bytes[:3]) + 10)
    for shard in range(3):
        assert held.copy(shard)
        os.utime(held.path(shard), (shard, shard))
    held.read(0, 0, 10)
    assert held.copy(3)
    assert [os.path.exists(held.path(shard)) for shard in range(4)] == [True, False, True, True]


def test_what_a_dead_process_reserved_is_freed(remote: ShardSet, tmp_path: Path) -> None:
    held = ShardCache(remote, str(tmp_path), max(remote.num_bytes))
    os.makedirs(os.path.dirname(held.path(5)))
    Path(f"{held.path(5)}.lock").write_bytes(b"")
    os.truncate(f"{held.path(5)}.lock", max(remote.num_bytes))  # as one leaves it that was killed while copying
    Path(f"{held.path(5)}.partial").write_bytes(b"half")
    assert held.copy(0)
    assert not os.path.exists(f"{held.path(5)}.partial")


def test_two_copy_the_same_shard_once(remote: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = ShardCache(remote, str(tmp_path), 2**30)
    second: list[bool] = []

    def retry_meanwhile(read: Any, what: str, **_: Any) -> Any:
        second.append(ShardCache(remote, str(tmp_path), 2**30).copy(2))
        return read()

    monkeypatch.setattr(storage, "retry", retry_meanwhile)
    assert held.copy(2)
    assert second == [False]


def test_a_full_disk_is_said_once_and_the_store_is_read(
    remote: ShardSet, shapes_shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    downloads = []

    def fill(*_: Any, **__: Any) -> None:
        downloads.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "get_file", fill)
    assert batches(remote, cache_dir=str(tmp_path), cache_bytes=2**30) == batches(shapes_shards)
    assert caplog.text.count("is full (No space left on device): no more shards are copied to it") == 1
    assert 1 <= len(downloads) <= 4  # those that had begun
    assert not list(tmp_path.rglob("*.partial"))


def test_prefetch_passes_everything_on_in_order(remote: ShardSet, tmp_path: Path) -> None:
    held = ShardCache(remote, str(tmp_path), 2**30)
    turns = list(range(200))
    assert list(prefetch(turns, lambda turn: turn % len(remote), held, 7)) == turns
    assert list(prefetch([], lambda turn: turn, held, 7)) == []


def test_a_cache_smaller_than_a_shard_is_said(remote: ShardSet, shapes_shards: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.cache_bytes is 1000, less than one shard"):
        node_cache(remote, str(tmp_path), 1000)
    assert node_cache(shapes_shards, None, 1000) is None


def test_a_resumed_remote_stream_goes_on(remote: ShardSet, shapes_shards: ShardSet, tmp_path: Path) -> None:
    whole = batches(shapes_shards)
    assert batches(remote, start=Cursor(0, 6), cache_dir=str(tmp_path), cache_bytes=2**20) == whole[6:]
