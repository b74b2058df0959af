"""Shards behind a real S3 endpoint, which dies in the middle; and training processes that die."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from refinedet.pipeline.config.spec import Augmentation, Data, Split
from refinedet.pipeline.data.index import ShardSet
from refinedet.pipeline.data.inspection import check_shards
from refinedet.pipeline.data.shards import prepare_shards

from tests.data.streams import open_stream

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
OPTIONS: dict[str, Any] = {"seed": 3, "global_batch": 16, "epochs": 2, "shuffle_window": 64}

pytestmark = pytest.mark.dist


class Store:
    """moto's server on a port of its own."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, folder: Path, *dying: str) -> None:
        """Serve the files of a directory. dying: suffix and number of the answer in which it dies."""
        command = [sys.executable, str(HERE / "object_store.py"), str(self.port), str(folder), *dying]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                assert self.process.poll() is None, "the server did not start"
                time.sleep(0.1)
        raise TimeoutError("the server did not open its port")

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    pytest.importorskip("moto", reason="needs moto's S3 server")
    s3fs = pytest.importorskip("s3fs", reason="needs s3fs")
    s3fs.S3FileSystem.clear_instance_cache()  # one that was made before keeps its endpoint
    store = Store()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{store.port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield store
    store.kill()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def start_training() -> Iterator[Callable[..., subprocess.Popen[str]]]:
    processes: list[subprocess.Popen[str]] = []

    def start(url: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, str(HERE / "stream_process.py"), json.dumps({"url": url, **OPTIONS, **options})]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


def lines(process: subprocess.Popen[str]) -> Iterator[Any]:
    assert process.stdout
    return (json.loads(line) for line in process.stdout)


def expected_batches(shards: ShardSet) -> list[Any]:
    stream = open_stream(shards, input_size=64, augmentation=Augmentation(), **OPTIONS)
    return [[batch.epoch, batch.index, sorted(batch.keys)] for batch in stream]


@pytest.mark.slow
@pytest.mark.parametrize("outage_s", [3, 20])
def test_a_store_that_dies_is_waited_for(
    store: Store,
    start_training: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    outage_s: float,
) -> None:
    data = Data(format="shapes", image_size=64, train=(Split(count=160),), shard_bytes=40_000)
    local = prepare_shards(data, "train", str(tmp_path / "local" / "train"))
    (tmp_path / "empty").mkdir()
    store.start(tmp_path / "empty")
    remote = prepare_shards(data, "train", "s3://bucket/train")
    assert remote.digest == local.digest
    assert not check_shards("s3://bucket/train", decode=False).faults
    assert prepare_shards(data, "train", "s3://bucket/train").num_samples == 160

    process = start_training(
        "s3://bucket/train",
        loader_workers=2,
        pause=0.3,
        cache_dir=str(tmp_path / "cache"),
        cache_bytes=2 * max(remote.num_bytes),  # most samples must come from the store
    )
    output = lines(process)
    next(output)
    batches = [next(output) for _ in range(4)]
    store.kill()
    died = time.monotonic()
    time.sleep(outage_s)
    store.start(tmp_path / "local")  # the same objects: moto keeps them in memory
    assert time.monotonic() - died >= outage_s
    batches += list(output)
    assert process.wait() == 0
    assert batches == expected_batches(local)
    copies = [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".tar", ".partial")]
    assert sum(path.stat().st_size for path in copies) <= 2 * max(remote.num_bytes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "count", "warm"),
    [
        ("index.json", 1, False),
        ("index.json", 1, True),
        (".npz", 1, False),
        (".npz", 3, False),
        (".tar", 1, False),
        (".tar", 20, False),
        (".tar", 1, True),
    ],
)
def test_a_store_that_dies_in_an_answer_is_waited_for(
    store: Store,
    start_training: Callable[..., subprocess.Popen[str]],
    tmp_path: Path,
    suffix: str,
    count: int,
    warm: bool,
) -> None:
    """For 20 s, in the middle of the index, of contents or of a tar; warm: contents and some tars lie on the node."""
    data = Data(format="shapes", image_size=64, train=(Split(count=160),), shard_bytes=40_000)
    local = prepare_shards(data, "train", str(tmp_path / "local" / "train"))
    few = suffix == ".tar" and (warm or count > 1)  # copies, so that most samples come from the store
    room = 2 * max(local.num_bytes) if few else 2**30
    options = {"loader_workers": 2, "pause": 0.0, "cache_dir": str(tmp_path / "cache"), "cache_bytes": room}
    if warm:
        store.start(tmp_path / "local")
        assert list(lines(start_training("s3://bucket/train", **options)))[1:] == expected_batches(local)
        store.kill()
    store.start(tmp_path / "local", suffix, str(count))
    process = start_training("s3://bucket/train", **options)
    assert store.process
    store.process.wait(120)
    time.sleep(20)
    assert process.poll() is None, "the training did not wait"
    store.start(tmp_path / "local")
    assert list(lines(process))[1:] == expected_batches(local)
    assert process.wait() == 0


def test_workers_end_with_a_training_process_that_is_killed(
    shapes_shards: ShardSet, start_training: Callable[..., subprocess.Popen[str]]
) -> None:
    process = start_training(shapes_shards.url, loader_workers=2, pause=0.1, epochs=None)
    output = lines(process)
    workers = next(output)
    assert len(workers) == 2
    next(output)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "a worker outlives its training process"
        time.sleep(0.2)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def test_a_worker_that_is_killed_is_an_error_not_a_hang(
    shapes_shards: ShardSet, start_training: Callable[..., subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = start_training(shapes_shards.url, loader_workers=2, pause=1.0, epochs=None)
    output = lines(process)
    workers = next(output)
    next(output)
    time.sleep(0.5)  # they wait now; one that dies while it holds torch's lock is the watchdog's (docs/limits.md)
    os.kill(workers[0], signal.SIGKILL)
    list(output)
    assert process.wait(timeout=60) != 0
    shutil.rmtree(tmp_path)
