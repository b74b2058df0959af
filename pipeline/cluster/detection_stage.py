"""The evaluate and multiscale stages: chunks of images handed to Ray workers, each chunk committed once.

A worker that dies costs the chunk that it held. A committed chunk is never detected again, only matched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import ray
from refinedet.pipeline.cluster.dispatcher import Dispatcher
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.evaluation.chunks import Chunk, split_into_chunks
from refinedet.pipeline.evaluation.detection_job import DetectionJob
from refinedet.pipeline.evaluation.detection_results import Detected, conclude
from refinedet.pipeline.evaluation.detection_worker import ChunkAnswer, DetectionWorker
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.evaluation.unreadable import sum_unreadable
from refinedet.pipeline.runs import storage


class DetectionPool:
    """Idle workers that a job keeps between its stages: loading torch and the model takes them many seconds.

    A context manager: the workers that it holds end with it.
    """

    def __init__(self) -> None:
        self._idle: list[Any] = []

    def __enter__(self) -> DetectionPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._idle:
            ray.kill(worker)

    def take(self, run: Run) -> Any:
        """A kept worker, which may have died meanwhile, or a new one."""
        if self._idle:
            return self._idle.pop()
        cluster = run.spec.cluster
        worker = ray.remote(DetectionWorker).options(
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker,
            max_concurrency=2,
            scheduling_strategy="SPREAD" if "SPREAD" in cluster.placement else "DEFAULT",
            label_selector=cluster.labels or None,
        )
        return worker.remote(run.spec_for_workers())

    def keep(self, workers: Iterable[Any]) -> None:
        self._idle.extend(workers)


def run_detection(
    run: Run,
    job: DetectionJob,
    pool: DetectionPool,
    *,
    on_progress: Callable[[int, int], None],
    report: Callable[[str], None],
    stop: threading.Event,
) -> Detected:
    """Detect every image once; write the results file, metrics.json and what an evaluation server takes.

    on_progress  called with the images done and all images
    report       takes one line for every worker that dies and every chunk that is tried again
    Raises StoppedError when asked to stop, JobError where a chunk fails more often than `cluster.max_failures`.
    """
    truth = GroundTruth.of(job.truth)
    if not len(truth):
        truth = None
    workers = run.spec.cluster.evaluation_workers or run.spec.cluster.min_workers
    chunks = _chunks(run, job, workers)
    shared_truth = ray.put(truth)

    def start(number: int) -> tuple[Any, ray.ObjectRef]:
        worker = pool.take(run)
        return worker, worker.begin.remote(job, shared_truth, number)

    dispatcher = Dispatcher(
        start,
        workers=min(workers, len(chunks)),
        max_failures=run.spec.cluster.max_failures,
        resource_timeout_s=run.spec.cluster.resource_timeout_s,
        stop=stop,
        report=report,
    )
    answers: dict[Chunk, ChunkAnswer] = {}
    done, unreadable = 0, ()
    for chunk, answer in dispatcher.run(chunks):
        done += len(chunk.positions)
        answers[chunk] = answer
        unreadable = sum_unreadable((one.unreadable for one in answers.values()), run.spec.data.max_bad_samples)
        on_progress(done, len(job.image_ids))
    pool.keep(worker.actor for worker in dispatcher.idle)
    return conclude(job, run.spec.model, truth, answers, unreadable)


def _chunks(run: Run, job: DetectionJob, workers: int) -> tuple[Chunk, ...]:
    """The chunks, cut for `workers`; as they were cut first where this evaluation resumes with other workers."""
    path = storage.join(job.folder, "chunks.json")
    if storage.exists(path):
        known = storage.read_json(path)
        if known["fingerprint"] == job.fingerprint:
            return tuple(Chunk(index, start, stop) for index, (start, stop) in enumerate(known["chunks"]))
    chunks = split_into_chunks(len(job.image_ids), run.spec.evaluation.images_per_chunk, workers)
    cut = [(chunk.start, chunk.stop) for chunk in chunks]
    storage.write_json(path, {"fingerprint": job.fingerprint, "chunks": cut})
    return chunks
