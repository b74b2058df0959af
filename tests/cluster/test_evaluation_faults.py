"""Drills of the evaluation stage on a real local Ray: each fault costs one chunk at most, one line, and no digit.

A worker is killed, killed for memory by Ray's own monitor, frozen, or cut off from storage for 30 s, each time after it
has detected on a whole chunk and before it commits it. In the last drill a committed chunk is damaged. The run has two
workers, and chunks of four images.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from refinedet.pipeline.cluster import detection_stage, dispatcher
from refinedet.pipeline.cluster.evaluate import detect_and_measure
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.drills.bench import Bench
from refinedet.pipeline.evaluation.chunks import Chunk, ChunkResult
from refinedet.pipeline.evaluation.detection_job import DetectionJob, make_detection_job
from refinedet.pipeline.evaluation.detection_worker import DetectionWorker
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.progress import ProgressDisplay
from rich.console import Console

from .test_evaluation_stage import chunks_begun, detect, make_run

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.usefixtures("connected")]

FAULT = "REFINEDET_TEST_FAULT"
OUTAGE_S = 30.0
VICTIM = 2
"""number of the chunk at which the fault strikes"""


class FaultyWorker(DetectionWorker):
    """Strikes once in a run, by the file beside the run's output; storage is away for all workers at once."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self._fault = Path(self._run.path, "fault")
        write = storage.write_bytes

        def write_unless_away(path: str, content: bytes) -> None:
            away = self._fault.with_name("away")
            if away.exists() and time.time() < away.stat().st_mtime + OUTAGE_S:
                raise OSError(errno.EIO, "the store does not answer")
            write(path, content)

        storage.write_bytes = write_unless_away

    def _commit(self, chunk: Chunk, results: Mapping[str, ChunkResult]) -> None:
        if chunk.index == VICTIM and self._fault.exists():
            kind = self._fault.read_text()
            self._fault.unlink()
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif kind == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            elif kind == "storage":
                self._fault.with_name("away").touch()
            elif kind == "memory":
                hoard = []
                while True:
                    hoard.append(b"1" * 2**26)
                    time.sleep(0.1)
        super()._commit(chunk, results)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, DetectionJob, bytes, bytes]:
    """A run that was evaluated without a fault, and its results."""
    run = make_run(tmp_path_factory.mktemp("faults"), cluster={"workers": 2, "cpus_per_worker": 1})
    job, _ = make_detection_job(run, "single")
    detect(run, job)
    return run, job, Path(job.detections).read_bytes(), Path(run.file("metrics.json")).read_bytes()


def detect_again(
    undisturbed: tuple[Run, DetectionJob, bytes, bytes], monkeypatch: pytest.MonkeyPatch, fault: str, run: Run
) -> tuple[list[str], int]:
    """Evaluate again from the beginning, with a fault; returns the lines on the terminal, and the chunks done again."""
    _, job, detections, metrics = undisturbed
    monkeypatch.setattr(detection_stage, "DetectionWorker", FaultyWorker)
    for path in Path(job.folder).iterdir():
        path.unlink()
    Path(run.file("away")).unlink(missing_ok=True)
    Path(run.file("fault")).write_text(fault)
    before = len(chunks_begun(run))
    told: list[str] = []
    began = time.monotonic()
    detect(run, job, told)
    took = time.monotonic() - began
    assert not Path(run.file("fault")).exists(), "nothing struck, so that this shows nothing"
    assert Path(job.detections).read_bytes() == detections
    assert Path(run.file("metrics.json")).read_bytes() == metrics
    again = len(chunks_begun(run)) - before - len(list(Path(job.folder).glob("chunk-*.json")))
    print(f"{fault}: {took:.0f} s, {again} chunks done again, {told}")  # noqa: T201
    return told, again


@pytest.mark.parametrize(
    ("fault", "line", "again"),
    [
        ("killed", "died (ActorDiedError); chunk-00002.json is tried again (1 of 3)", 1),
        ("frozen", "is frozen: no answer for 3 s; chunk-00002.json is tried again (1 of 3)", 1),
        ("storage", "waits for storage: chunk-000", 0),
    ],
)
def test_a_fault_costs_a_chunk_at_most_and_one_line(
    undisturbed: tuple[Run, DetectionJob, bytes, bytes],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    line: str,
    again: int,
) -> None:
    monkeypatch.setattr(dispatcher, "PING_EVERY_S", 1.0)
    monkeypatch.setattr(dispatcher, "PING_LIMIT_S", 3.0)
    told, done_again = detect_again(undisturbed, monkeypatch, fault, undisturbed[0])
    assert len(told) == 1, told
    assert line in told[0]
    assert done_again == again
    if fault == "storage":
        assert "the store does not answer" in told[0]


def test_rays_memory_monitor_kills_a_worker(
    undisturbed: tuple[Run, DetectionJob, bytes, bytes], monkeypatch: pytest.MonkeyPatch, bench: Bench
) -> None:
    """On a node of its own, whose monitor ends a worker once 3 GB more than now are used on the machine.

    It looks once a second: sooner than the memory of the first is free, it would end a second worker.
    """
    memory = psutil.virtual_memory()
    if memory.available < 6e9:
        pytest.skip("needs 6 GB of free memory")
    threshold = (memory.total - memory.available + 3e9) / memory.total
    node = bench.cluster.add_node(
        num_cpus=2,
        labels={"drill": "memory"},
        env_vars={"RAY_memory_usage_threshold": f"{threshold:.3f}", "RAY_memory_monitor_refresh_ms": "1000"},
    )
    try:
        run = undisturbed[0]
        cluster = run.spec.cluster.model_copy(update={"labels": {"drill": "memory"}})
        there = Run(run.spec.model_copy(update={"cluster": cluster}))
        told, done_again = detect_again(undisturbed, monkeypatch, "memory", there)
    finally:
        bench.cluster.remove_node(node)
    assert len(told) == 1, told
    assert "died (OutOfMemoryError); chunk-00002.json is tried again (1 of 3)" in told[0]
    assert done_again == 1


def test_a_damaged_chunk_is_done_again_alone(undisturbed: tuple[Run, DetectionJob, bytes, bytes]) -> None:
    """One bit of a committed chunk is flipped; the others stay as they are."""
    run, job, detections, metrics = undisturbed
    if not (chunks := sorted(Path(job.folder).glob("chunk-*.json"))):
        detect(run, job)
        chunks = sorted(Path(job.folder).glob("chunk-*.json"))
    damaged = chunks[VICTIM]
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 0x04
    damaged.write_bytes(content)
    before, written = len(chunks_begun(run)), {path: path.stat().st_mtime_ns for path in chunks if path != damaged}
    console = Console(record=True, width=300, file=io.StringIO())
    with ProgressDisplay(console) as display, detection_stage.DetectionPool() as pool:
        display.stage("evaluate")
        detect_and_measure(run, job, pool, display=display, stop=threading.Event())
    lines = [line for line in console.export_text().splitlines() if line.startswith("!")]
    assert lines == [f"! done again, as damaged or of other settings: {damaged}"]
    assert len(chunks_begun(run)) - before == 1
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert Path(job.detections).read_bytes() == detections
    assert Path(run.file("metrics.json")).read_bytes() == metrics
