"""Shards: plain webdataset, the same bytes for the same input, resumable, never mixed, never half."""

from __future__ import annotations

import errno
import itertools
import json
import pickle
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import webdataset
from refinedet.pipeline.config.spec import Data, Split
from refinedet.pipeline.data.index import open_shards
from refinedet.pipeline.data.inspection import check_shards
from refinedet.pipeline.data.reading import SampleReader, expand_tar
from refinedet.pipeline.data.shards import prepare_shards, write_in_threads
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

from tests.data.conftest import make_index

Write = Callable[..., Data]


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def shapes() -> Data:
    return Data(format="shapes", image_size=48, train=(Split(count=40),), val=(Split(count=9),), shard_bytes=15_000)


def test_webdataset_reads_the_shards_without_our_code(coco_folder: Write, tmp_path: Path) -> None:
    data = coco_folder(6, shard_bytes=4000)
    shards = prepare_shards(data, "train", str(tmp_path / "shards"))
    urls = [shards.shard_url(shard) for shard in range(len(shards))]
    assert len(urls) > 1
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))  # type: ignore[attr-defined]
    assert [sample["__key__"] for sample in samples] == [shards.key(position) for position in range(6)]
    for sample in samples:
        facts = json.loads(sample["json"])
        assert sample["jpg"] == (tmp_path / "images" / facts["file_name"]).read_bytes()
        assert facts["objects"][0]["category_id"] == 7
    assert [(category.id, category.name) for category in shards.categories] == [(7, "train"), (90, "brush")]
    assert (shards.label(7), shards.label(90), shards.category_id(2)) == (1, 2, 90)


def test_a_sample_is_read_as_webdataset_reads_it(shapes: Data, tmp_path: Path) -> None:
    shards = prepare_shards(shapes, "train", str(tmp_path / "shards"))
    urls = [shards.shard_url(shard) for shard in range(len(shards))]
    dataset = list(webdataset.WebDataset(urls, shardshuffle=False))  # type: ignore[attr-defined]
    reader = SampleReader(shards)
    for position, theirs in enumerate(dataset):
        ours = expand_tar(reader.read_bytes(shards.entry(position)))
        assert ours == {name: value for name, value in theirs.items() if name in ours}
        assert ours.keys() == {"__key__", "jpg", "json"}
    assert len(dataset) == shards.num_samples


def test_same_input_same_bytes_however_many_threads(shapes: Data, tmp_path: Path) -> None:
    for threads in (1, 4):
        prepare_shards(
            shapes, "train", str(tmp_path / str(threads)), write_all=partial(write_in_threads, threads=threads)
        )
    assert files_of(tmp_path / "1") == files_of(tmp_path / "4")
    assert len(files_of(tmp_path / "1")) > 6


def test_a_write_that_was_cut_off_goes_on_where_it_stopped(
    shapes: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "resumed"
    prepare_shards(shapes, "train", str(whole))
    written: list[str] = []
    write_bytes = storage.write_bytes

    def limited(path: str, content: bytes) -> None:
        if path.endswith(".tar"):
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device", path)
            written.append(path)
        write_bytes(path, content)

    monkeypatch.setattr(storage, "write_bytes", limited)
    with pytest.raises(UserError, match=r"No space left on device.*make room"):
        prepare_shards(shapes, "train", str(folder), write_all=partial(write_in_threads, threads=1))
    with pytest.raises(UserError, match="holds no shards"):
        open_shards(str(folder))
    monkeypatch.setattr(storage, "write_bytes", write_bytes)
    kept = {name: (folder / name).stat().st_mtime_ns for name in ("shard-000000.tar", "shard-000001.tar")}
    prepare_shards(shapes, "train", str(folder))
    assert files_of(folder) == files_of(whole)
    assert kept == {name: (folder / name).stat().st_mtime_ns for name in kept}


def test_a_store_that_fails_now_and_then_is_written_to(
    shapes: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = prepare_shards(shapes, "train", str(tmp_path / "shards"))
    memory = type(fsspec.filesystem("memory"))
    failed = []

    def failing(method: Callable[..., Any]) -> Callable[..., Any]:
        calls = itertools.count(1)

        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) in (1, 3):
                failed.append(method.__name__)
                raise ConnectionError("the store is away")
            return method(*arguments, **options)

        return call

    methods = ("_open", "cat_file", "exists", "pipe_file", "ls")
    for name in methods:
        monkeypatch.setattr(memory, name, failing(getattr(memory, name)))
    remote = prepare_shards(shapes, "train", "memory://written")
    assert remote.digest == local.digest
    assert set(failed) == set(methods)
    monkeypatch.undo()
    for name, content in files_of(tmp_path / "shards").items():
        assert fsspec.filesystem("memory").cat(f"/written/{name}") == content
    fsspec.filesystem("memory").rm("/written", recursive=True)


def test_a_shard_lost_before_the_index_is_written_again(shapes: Data, tmp_path: Path) -> None:
    shards = prepare_shards(shapes, "train", str(tmp_path / "a"))
    before = files_of(tmp_path / "a")
    (tmp_path / "a" / "index.json").unlink()
    (tmp_path / "a" / shards.names[1]).write_bytes(b"cut off")
    prepare_shards(shapes, "train", str(tmp_path / "a"))
    assert files_of(tmp_path / "a") == before


def test_written_shards_are_found_without_the_data_set(coco_folder: Write, tmp_path: Path) -> None:
    data = coco_folder(4)
    first = prepare_shards(data, "train", str(tmp_path / "shards"))
    shutil.rmtree(tmp_path / "images")
    assert prepare_shards(data, "train", str(tmp_path / "shards")).digest == first.digest
    elsewhere = data.model_copy(update={"root": str(tmp_path / "nothing-is-here")})
    assert prepare_shards(elsewhere, "train", str(tmp_path / "shards")).digest == first.digest
    with pytest.raises(UserError, match=r"does not exist: check data\.root"):
        prepare_shards(elsewhere, "train", str(tmp_path / "other"))
    (tmp_path / "shards" / "index.json").unlink()  # not complete: the images are needed
    with pytest.raises(UserError, match=r"does not exist: check data\.root"):
        prepare_shards(elsewhere, "train", str(tmp_path / "shards"))


def test_other_annotations_are_another_data_set(coco_folder: Write, tmp_path: Path) -> None:
    data = coco_folder(4)
    prepare_shards(data, "train", str(tmp_path / "shards"))
    annotations = tmp_path / "instances.json"
    annotations.write_bytes(annotations.read_bytes() + b" ")
    with pytest.raises(UserError, match="holds shards of another data set"):
        prepare_shards(data, "train", str(tmp_path / "shards"))


def test_another_data_set_is_never_mixed_in(shapes: Data, tmp_path: Path) -> None:
    prepare_shards(shapes, "train", str(tmp_path / "shards"))
    before = files_of(tmp_path / "shards")
    for other in (shapes.model_copy(update={"seed": 1}), shapes.model_copy(update={"shard_bytes": 20_000})):
        with pytest.raises(UserError, match="holds shards of another data set"):
            prepare_shards(other, "train", str(tmp_path / "shards"))
    with pytest.raises(UserError, match="holds shards of another data set"):
        prepare_shards(shapes, "val", str(tmp_path / "shards"))
    assert files_of(tmp_path / "shards") == before


def test_what_only_shapes_are_drawn_by_is_no_other_request_for_files(coco_folder: Write, tmp_path: Path) -> None:
    data = coco_folder(4)
    first = prepare_shards(data, "train", str(tmp_path / "shards"))
    counted = data.train[0].model_copy(update={"count": 118287})
    for other in ({"seed": 5}, {"image_size": 320}, {"train": (counted,)}):
        found = prepare_shards(data.model_copy(update=other), "train", str(tmp_path / "shards"))
        assert found.digest == first.digest
    with pytest.raises(UserError, match="holds shards of another data set"):
        prepare_shards(data.model_copy(update={"shard_bytes": 5000}), "train", str(tmp_path / "shards"))


def test_shards_of_an_earlier_release_are_refused(coco_folder: Write, tmp_path: Path) -> None:
    data, folder = coco_folder(4), tmp_path / "shards"
    prepare_shards(data, "train", str(folder))
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format_version": 1, "request": "0" * 64}))
    with pytest.raises(UserError, match="of an earlier release: remove it"):
        prepare_shards(data, "train", str(folder))
    with pytest.raises(UserError, match="has format version 1, this release reads 2"):
        open_shards(str(folder))


def test_two_jobs_that_write_the_same_shards_agree(shapes: Data, tmp_path: Path) -> None:
    results: list[Any] = []

    def job() -> None:
        results.append(prepare_shards(shapes, "train", str(tmp_path / "both")).digest)

    jobs = [threading.Thread(target=job) for _ in range(3)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    alone = prepare_shards(shapes, "train", str(tmp_path / "alone"))
    assert results == [alone.digest] * 3
    assert files_of(tmp_path / "both") == files_of(tmp_path / "alone")
    assert not check_shards(str(tmp_path / "both")).faults


def test_progress_reaches_the_number_of_samples(shapes: Data, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare_shards(shapes, "train", str(tmp_path / "a"), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (40, 40)


def test_check_finds_what_was_damaged(shapes: Data, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    shards = prepare_shards(shapes, "train", str(folder))
    report = check_shards(str(folder))
    assert (report.faults, report.num_samples, report.num_shards) == ((), 40, len(shards))
    assert report.num_objects > 40

    flipped, cut, lost = shards.names[0], shards.names[1], shards.names[2]
    content = bytearray((folder / flipped).read_bytes())
    content[2000] ^= 1
    (folder / flipped).write_bytes(content)
    (folder / cut).write_bytes((folder / cut).read_bytes()[:-9000])
    (folder / lost).unlink()
    (folder / "shard-999999.tar").write_bytes(b"a stranger")
    faults = check_shards(str(folder)).faults
    assert {fault.shard for fault in faults} == {flipped, cut, lost, "shard-999999.tar"}
    assert any(fault.shard == flipped and "digest" in fault.reason for fault in faults)


def test_an_index_of_another_release_or_kind_is_said(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        open_shards(str(tmp_path))
    (tmp_path / "index.json").write_text('{"format_version": 99}')
    with pytest.raises(UserError, match="format version 99"):
        open_shards(str(tmp_path))


def test_places_are_read_in_many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = make_index([3] * 600)

    def columns(shard: int, *names: str) -> dict[str, np.ndarray]:
        return dict.fromkeys(names, np.arange(3) + 3 * shard)

    monkeypatch.setattr(shards, "read_columns", columns)
    monkeypatch.setattr("refinedet.pipeline.data.index._KEPT_SAMPLES", 900)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            positions = np.random.default_rng(0).integers(0, 1800, 6000).tolist()
            assert [entry.offset for entry in pool.map(shards.entry, positions)] == positions
    finally:
        sys.setswitchinterval(interval)
    assert pickle.loads(pickle.dumps(make_index([3, 4]))).num_samples == 7
