"""Chunks handed to actors that die, hang, fail and come back, on a real local Ray."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from refinedet.pipeline.cluster import dispatcher as module
from refinedet.pipeline.cluster.dispatcher import Dispatcher
from refinedet.pipeline.evaluation.chunks import Chunk, split_into_chunks
from refinedet.pipeline.runs.errors import JobError, UserError

pytestmark = [pytest.mark.dist, pytest.mark.usefixtures("connected")]
CHUNKS = [Chunk(index, 2 * index, 2 * index + 2) for index in range(6)]


class Worker:
    """Does `act` with chunk 2, once in a test, or always."""

    def __init__(self, act: str, mark: str, *, always: bool) -> None:
        self.act, self.mark, self.always = act, Path(mark), always

    def begin(self) -> None:
        pass

    def ping(self) -> str:
        return "chunk-00002.json: no route" if self.act == "wait" and self.mark.exists() else ""

    def work(self, chunk: Chunk) -> str:
        if chunk.index == 2 and (self.always or not self.mark.exists()):
            self.mark.touch()
            if self.act == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.act == "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            if self.act == "wait":
                time.sleep(6)
                self.mark.unlink()
                self.act = ""
            if self.act == "hang":
                time.sleep(3600)
            if self.act == "storage":
                raise OSError("storage is away")
            if self.act == "user":
                raise UserError("give other weights.")
        return f"{os.getpid()}"


def dispatch(folder: Path, act: str, *, workers: int = 1, always: bool = False) -> tuple[list[int], list[str]]:
    said: list[str] = []
    actor = ray.remote(Worker).options(num_cpus=0, max_concurrency=2)

    def start(number: int) -> tuple[Any, ray.ObjectRef]:
        worker = actor.remote(act, str(folder / "mark"), always=always)
        return worker, worker.begin.remote()

    dispatcher = Dispatcher(
        start, workers=workers, max_failures=1, resource_timeout_s=60, stop=threading.Event(), report=said.append
    )
    done = [chunk.index for chunk, _ in dispatcher.run(CHUNKS)]
    for worker in dispatcher.idle:
        ray.kill(worker.actor)
    return done, said


@pytest.mark.parametrize(
    ("act", "why"),
    [
        ("die", "died (ActorDiedError)"),
        ("freeze", "is frozen: no answer for"),
        ("hang", "exceeded its deadline of"),
        ("storage", "failed (OSError: storage is away)"),
    ],
)
def test_a_fault_costs_one_chunk_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, why: str
) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.1)
    monkeypatch.setattr(module, "PING_EVERY_S", 0.5)
    monkeypatch.setattr(module, "PING_LIMIT_S", 3.0 if act == "freeze" else 600.0)
    monkeypatch.setattr(module, "DEADLINE_FLOOR_S", 3.0 if act == "hang" else 600.0)
    done, said = dispatch(tmp_path, act)
    assert sorted(done) == [chunk.index for chunk in CHUNKS]
    assert len(said) == 1, said
    assert said[0].startswith(f"evaluation worker 0 {why}")
    assert f"{CHUNKS[2].name} is tried again (1 of 1)" in said[0]


def test_a_worker_that_waits_for_storage_keeps_its_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PING_EVERY_S", 0.5)
    monkeypatch.setattr(module, "DEADLINE_FLOOR_S", 3.0)
    done, said = dispatch(tmp_path, "wait")
    assert sorted(done) == [chunk.index for chunk in CHUNKS]
    assert said == ["evaluation worker 0 waits for storage: chunk-00002.json: no route"]


@pytest.mark.parametrize(("act", "error"), [("storage", JobError), ("user", UserError)])
def test_a_chunk_that_always_fails_ends_the_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, error: type[Exception]
) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.1)
    said = {"storage": f"{CHUNKS[2].name} failed 2 times; .*storage is away", "user": "give other weights"}[act]
    with pytest.raises(error, match=said):
        dispatch(tmp_path, act, always=True)


def busy_share(workers: int, images: int, start_chunks: Callable[[], list[int]]) -> float:
    """Share of the workers' time that is work, where every image costs the same."""
    free = [0] * workers
    for size in start_chunks():
        at = min(range(workers), key=free.__getitem__)
        free[at] += size
    return images / (workers * max(free))


@pytest.mark.parametrize("workers", [1, 3, 16, 32])
def test_workers_end_together(workers: int) -> None:
    sizes = [len(chunk.positions) for chunk in split_into_chunks(5000, 256, workers)]
    assert busy_share(workers, 5000, lambda: sizes) >= 0.9
