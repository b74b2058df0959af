"""The evaluate and multiscale stages: pieces of images handed to Ray workers, each piece committed once.

A worker that dies costs the piece it held; a piece that is committed is never detected again, only matched.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from refinedet.pipeline.cluster.detection_job import DetectionJob, write_results
from refinedet.pipeline.cluster.detection_pool import DetectionPool
from refinedet.pipeline.config.files import parse_spec
from refinedet.pipeline.config.recipes import resolve_merge
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.evaluation.chunks import (
    Chunk,
    ChunkResult,
    merge_chunks,
    read_chunk,
    split_into_chunks,
    write_chunk,
)
from refinedet.pipeline.evaluation.comparison import best_first
from refinedet.pipeline.evaluation.metrics import accumulate_matches, match_detections
from refinedet.pipeline.evaluation.protocols import Metrics
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.evaluation.unreadable import UnreadableImage, sum_unreadable
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import JobError, StoppedError, UserError
from refinedet.pipeline.runs.logs import log_folder, log_to_file

logger = logging.getLogger(__name__)

_POLL_S = 0.5
_OWN = ""  # stands for the job's own merge rule among those that are compared


@dataclass(frozen=True)
class Detected:
    """What came of a stage.

    metrics        None where the truth has no annotations, as test-dev's
    by_merge_rule  of the rules that were compared, best first
    num_detections in the results file
    files          written, relative to the job's output
    again          files of pieces that were there, but damaged or of another evaluation, and were done again
    unreadable     images that could not be decoded, and have no detections
    """

    metrics: Metrics | None
    by_merge_rule: Mapping[str, Metrics]
    num_detections: int
    files: Sequence[str]
    again: Sequence[str]
    unreadable: tuple[UnreadableImage, ...]


@dataclass(frozen=True)
class _Answer:
    """What a worker says of a piece that is committed: its matches by merge rule (none without truth)."""

    matches: dict[str, Any] = field(default_factory=dict)
    again: str | None = None
    unreadable: tuple[UnreadableImage, ...] = ()


def run_detection(
    run: Run,
    job: DetectionJob,
    *,
    on_progress: Callable[[int, int], None],
    stop_requested: threading.Event,
    pool: DetectionPool | None = None,
) -> Detected:
    """Detect every image once; write the results file, metrics.json and what a server takes.

    pool  keeps the workers for the job's next stage of detection; default: they end with this one
    Raises StoppedError when asked to stop, JobError where workers die more often than `cluster.max_failures`.
    """
    instances = storage.read_json(job.truth)
    truth = GroundTruth.of(instances) if instances["annotations"] else None
    pieces = split_into_chunks(len(job.image_ids), run.spec.evaluation.images_per_piece)
    answers: dict[int, _Answer] = {}
    done, unreadable = 0, ()
    with DetectionPool() if pool is None else nullcontext(pool) as workers:
        for piece, answer in _work_through(run, job, truth, pieces, stop_requested, workers):
            done += len(piece.positions)
            answers[piece.index] = answer
            unreadable = sum_unreadable((one.unreadable for one in answers.values()), run.spec.data.max_bad_samples)
            on_progress(done, len(job.image_ids))
    ordered = [answers[piece.index] for piece in pieces]

    def measure(rule: str) -> Metrics | None:
        if truth is None:
            return None
        return accumulate_matches(job.protocol, truth, [answer.matches[rule] for answer in ordered])

    tables = []
    for piece in pieces:
        result = read_chunk(job.folder, piece, fingerprint=job.fingerprint)
        if result is None:
            raise JobError(f"{storage.join(job.folder, piece.name)} was damaged after it was committed; run it again")
        tables.append(result.detections)
    merged = merge_chunks(tables, job.image_ids)
    metrics = measure(_OWN)
    compared = {name: measure(name) for name in job.merge_rules}
    by_rule = best_first({name: one for name, one in compared.items() if one is not None})
    files = write_results(job, instances, merged, metrics, by_rule, unreadable)
    again = [answer.again for answer in ordered if answer.again]
    return Detected(metrics, by_rule, len(merged), files, again, unreadable)


def _work_through(
    run: Run,
    job: DetectionJob,
    truth: GroundTruth | None,
    pieces: Sequence[Chunk],
    stop: threading.Event,
    pool: DetectionPool,
) -> Iterator[tuple[Chunk, _Answer]]:
    """Yield (piece, what its worker said), in the order of pieces finished.

    A piece goes to a worker that has started: where the cluster holds fewer workers than were asked for, those that
    it holds do the work.
    """
    cluster = run.spec.cluster
    count = min(cluster.evaluation_workers or cluster.min_workers, len(pieces))
    shared_truth = ray.put(truth)
    waiting = deque(pieces)
    idle: list[tuple[int, Any]] = []  # by number, and the worker
    held: dict[Any, tuple[int, Any, Chunk | None]] = {}  # by what the worker is to answer; no piece: that it started
    failures, seen = 0, time.monotonic()  # when a worker was last there, idle or at work

    def start_worker(number: int) -> None:
        worker = pool.take() or _DetectionWorker.options(  # type: ignore[attr-defined]
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker,
            scheduling_strategy="SPREAD" if "SPREAD" in cluster.placement else "DEFAULT",
            label_selector=cluster.labels or None,
        ).remote(run.spec_for_workers())
        held[worker.begin.remote(job, shared_truth, number)] = (number, worker, None)

    for number in range(count):
        start_worker(number)
    try:
        while waiting or any(piece for _, _, piece in held.values()):
            while waiting and idle:
                number, worker = idle.pop()
                piece = waiting.popleft()
                held[worker.work.remote(piece)] = (number, worker, piece)
            ready, _ = ray.wait(list(held), timeout=_POLL_S)
            if stop.is_set():
                left = len(waiting) + sum(piece is not None for _, _, piece in held.values())
                raise StoppedError(f"{left} of {len(pieces)} pieces are left; the same command goes on")
            if idle or any(piece for _, _, piece in held.values()):
                seen = time.monotonic()
            elif time.monotonic() - seen > cluster.resource_timeout_s:
                raise JobError(
                    f"no evaluation worker was placed within cluster.resource_timeout_s {cluster.resource_timeout_s:g} "
                    f"s: each needs {cluster.cpus_per_worker:g} CPU and {cluster.gpus_per_worker:g} GPU"
                )
            for ref in ready:
                number, worker, piece = held.pop(ref)
                what = piece.name if piece else "no piece"
                try:
                    answer = ray.get(ref)
                except RayActorError as error:
                    failures += 1
                    if failures > cluster.max_failures:
                        raise JobError(
                            f"evaluation workers died {failures} times, the last with {what} in hand: {error}"
                        ) from error
                    logger.warning("evaluation worker %d died with %s in hand; it is started again", number, what)
                    if piece:
                        waiting.appendleft(piece)
                    start_worker(number)
                    continue
                except RayTaskError as error:
                    cause = error.cause if isinstance(error.cause, UserError) else None
                    raise UserError(str(cause)) if cause else JobError(f"{what}: {error.cause}") from error
                idle.append((number, worker))
                if piece:
                    yield piece, answer
    finally:
        pool.keep(worker for _, worker in idle)
        for _, worker, _ in held.values():
            ray.kill(worker)


@ray.remote
class _DetectionWorker:
    """Holds the model; detects or reads a piece, commits it, and matches it with the truth where it is."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._run = Run(parse_spec(spec, source="the job's spec"))
        self._job: DetectionJob
        self._truth: GroundTruth | None = None
        self._model: Any = None
        self._weights = ""

    def begin(self, job: DetectionJob, truth: GroundTruth | None, number: int) -> None:
        """Take a stage's job; returns once the worker is there."""
        log_to_file(os.path.join(log_folder(self._run.path), f"{job.mode}-{number}.log"), who=f"worker {number}")
        self._job, self._truth = job, truth

    def work(self, piece: Chunk) -> _Answer:
        """Commit a piece; returns its matches with the truth."""
        job = self._job
        tables, again = self._committed(piece)
        if tables is None:
            logger.info("%s: detecting on %d images", piece.name, len(piece.positions))
            tables = self._detect(piece)
            for name in job.merge_rules:
                write_chunk(job.rule_folder(name), piece, tables[name], fingerprint=job.rule_fingerprint(name))
            write_chunk(job.folder, piece, tables[_OWN], fingerprint=job.fingerprint)  # last: it says that all are
            logger.info("%s: committed", piece.name)
        unreadable = tables[_OWN].unreadable
        if self._truth is None:
            return _Answer(again=again, unreadable=unreadable)
        ids = job.image_ids[piece.start : piece.stop]
        found = {
            name: match_detections(job.protocol, self._truth, result.detections, ids) for name, result in tables.items()
        }
        return _Answer(found, again, unreadable)

    def _committed(self, piece: Chunk) -> tuple[dict[str, ChunkResult] | None, str | None]:
        """The piece's detections by merge rule, None where one is not there; and the file that is there but no good."""
        job = self._job
        places = {_OWN: (job.folder, job.fingerprint)}
        places |= {name: (job.rule_folder(name), job.rule_fingerprint(name)) for name in job.merge_rules}
        tables = {}
        for name, (folder, fingerprint) in places.items():
            table = read_chunk(folder, piece, fingerprint=fingerprint)
            if table is None:
                path = storage.join(folder, piece.name)
                return None, path if storage.exists(path) else None
            tables[name] = table
        return tables, None

    def _detect(self, piece: Chunk) -> dict[str, ChunkResult]:
        from refinedet.pipeline.data.index import open_shards
        from refinedet.pipeline.evaluation.chunk_work import detect_chunk

        spec, shards, model = self._run.spec, open_shards(self._job.shards), self._loaded_model()
        if self._job.mode == "single":
            return detect_chunk(model, shards, piece.positions, evaluation=spec.evaluation)
        assert spec.multiscale is not None
        methods = {_OWN: resolve_merge(spec.multiscale), **self._job.merge_rules}
        return detect_chunk(
            model,
            shards,
            piece.positions,
            evaluation=spec.evaluation,
            multiscale=spec.multiscale,
            merge_methods=methods,
        )

    def _loaded_model(self) -> Any:
        if self._model is None or self._weights != self._job.weights:
            import torch
            from refinedet.model import RefineDet, load_weights
            from refinedet.pipeline.training.initial_weights import read_weights

            device = "cuda" if self._run.spec.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu"
            model = RefineDet(self._run.spec.model)
            load_weights(model, read_weights(self._job.weights, "weights"))
            self._model = model.to(device).to(memory_format=torch.channels_last).eval()
            self._weights = self._job.weights
        return self._model
