"""The evaluate and multiscale stages: chunks of images handed to Ray workers, each chunk committed once.

A worker that dies costs the chunk that it held. A committed chunk is never detected again, only matched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from refinedet.model import RefineDetConfig
from refinedet.pipeline.cluster.dispatcher import Dispatcher
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.evaluation.chunks import Chunk, merge_chunks, read_chunk, split_into_chunks
from refinedet.pipeline.evaluation.detection_job import OWN_METHOD, DetectionJob, write_results
from refinedet.pipeline.evaluation.detection_worker import ChunkAnswer, DetectionWorker
from refinedet.pipeline.evaluation.diagnose import diagnose
from refinedet.pipeline.evaluation.diagnosis import Diagnosis
from refinedet.pipeline.evaluation.diagnosis_stages import summarize_levels
from refinedet.pipeline.evaluation.merge_comparison import best_first
from refinedet.pipeline.evaluation.metrics import accumulate_matches
from refinedet.pipeline.evaluation.protocols import Metrics
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.evaluation.unreadable import UnreadableImage, sum_unreadable
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import JobError


@dataclass(frozen=True)
class Detected:
    """Results of a stage.

    metrics         None where the truth has no annotations, as test-dev's
    by_merge_rule   of the methods that were compared, best first
    num_detections  in the results file
    diagnosis       what the errors are; None where it was not asked for, or the truth has marks that it has no rule for
    files           written, relative to the job's output
    damaged         chunk files that existed, but were damaged or of another evaluation, and were done again
    unreadable      images that could not be decoded, and have no detections
    """

    metrics: Metrics | None
    by_merge_rule: Mapping[str, Metrics]
    diagnosis: Diagnosis | None
    num_detections: int
    files: Sequence[str]
    damaged: Sequence[str]
    unreadable: tuple[UnreadableImage, ...]


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
    tell: Callable[[str], None],
    stop: threading.Event,
) -> Detected:
    """Detect every image once; write the results file, metrics.json and what an evaluation server takes.

    on_progress  called with the images done and all images
    tell         takes one line for every worker that dies and every chunk that is tried again
    Raises StoppedError when asked to stop, JobError where a chunk fails more often than `cluster.max_failures`.
    """
    instances = storage.read_json(job.truth)
    truth = GroundTruth.of(instances) if instances["annotations"] else None
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
        tell=tell,
    )
    answers: dict[int, ChunkAnswer] = {}
    done, unreadable = 0, ()
    for chunk, answer in dispatcher.run(chunks):
        done += len(chunk.positions)
        answers[chunk.index] = answer
        unreadable = sum_unreadable((one.unreadable for one in answers.values()), run.spec.data.max_bad_samples)
        on_progress(done, len(job.image_ids))
    pool.keep(worker.actor for worker in dispatcher.idle)
    ordered = [answers[chunk.index] for chunk in chunks]

    def measure(method: str) -> Metrics | None:
        if truth is None:
            return None
        return accumulate_matches(job.protocol, truth, [answer.matches[method] for answer in ordered])

    merged = merge_chunks((_committed(job, chunk) for chunk in chunks), job.image_ids)
    metrics = measure(OWN_METHOD)
    compared = {name: measure(name) for name in job.merge_rules}
    by_rule = best_first({name: one for name, one in compared.items() if one is not None})
    diagnosis = _diagnose(run.spec.model, truth, ordered)
    files = write_results(job, instances, merged, metrics, by_rule, unreadable, diagnosis)
    damaged = [answer.damaged for answer in ordered if answer.damaged]
    return Detected(metrics, by_rule, diagnosis, len(merged), files, damaged, unreadable)


def _diagnose(config: RefineDetConfig, truth: GroundTruth | None, answers: Sequence[ChunkAnswer]) -> Diagnosis | None:
    examined = [answer.examined for answer in answers if answer.examined is not None]
    if truth is None or not examined:
        return None
    traced = [answer.traced for answer in answers if answer.traced is not None]
    return diagnose(truth, examined, summarize_levels(config, sum(traced[1:], traced[0])) if traced else ())


def _chunks(run: Run, job: DetectionJob, workers: int) -> tuple[Chunk, ...]:
    """The chunks, cut for `workers`; as they were cut first where this evaluation goes on with other workers."""
    path = storage.join(job.folder, "chunks.json")
    if storage.exists(path):
        known = storage.read_json(path)
        if known["fingerprint"] == job.fingerprint:
            return tuple(Chunk(index, start, stop) for index, (start, stop) in enumerate(known["chunks"]))
    chunks = split_into_chunks(len(job.image_ids), run.spec.evaluation.images_per_piece, workers)
    cut = [(chunk.start, chunk.stop) for chunk in chunks]
    storage.write_json(path, {"fingerprint": job.fingerprint, "chunks": cut})
    return chunks


def _committed(job: DetectionJob, chunk: Chunk) -> DetectionTable:
    result = read_chunk(job.folder, chunk, fingerprint=job.fingerprint)
    if result is None:
        raise JobError(f"{storage.join(job.folder, chunk.name)} was damaged after it was committed; run it again")
    return result.detections
