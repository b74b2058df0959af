"""The evaluate and multiscale stages: pieces of images handed to Ray workers, each piece committed once.

A worker that dies costs the piece it held; a piece that is committed is never detected again, only matched.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import ray
from ray.exceptions import RayActorError, RayTaskError

from pipeline import storage
from pipeline.cluster.logs import log_folder, log_to_file
from pipeline.cluster.run import Run
from pipeline.cluster.session import minimum_workers
from pipeline.errors import JobError, StoppedError, UserError
from pipeline.evaluation import (
    CocoMetrics,
    DetectionTable,
    GroundTruth,
    Matches,
    Piece,
    accumulate,
    detect_piece,
    match,
    merge_pieces,
    multiscale_piece,
    read_piece,
    split_into_pieces,
    write_piece,
)
from pipeline.spec_files import parse_spec

logger = logging.getLogger(__name__)

Mode = Literal["single", "multiscale"]
_POLL_S = 0.5


@dataclass(frozen=True)
class DetectionJob:
    """What is detected with what: everything that a piece depends on is in `fingerprint`.

    weights    safetensors file of a detector that the run's spec describes
    shards     folder of the shards with the images
    truth      COCO instances file of those images, in the shards' order
    output     folder that detections/, metrics.json and the pieces come to lie in
    """

    mode: Mode
    weights: str
    shards: str
    truth: str
    output: str
    image_ids: tuple[int, ...]
    fingerprint: str

    @property
    def folder(self) -> str:
        """Of the committed pieces."""
        return storage.join(self.output, "detections", self.mode)

    @property
    def detections(self) -> str:
        """The finished COCO results file."""
        return storage.join(self.output, "detections", f"{self.mode}.json")


def make_detection_job(
    run: Run, mode: Mode, *, weights: str | None = None, shards: str | None = None, output: str | None = None
) -> tuple[DetectionJob, dict[str, Any]]:
    """The job of a run's own weights and validation shards, or of others; and the inputs it depends on, as JSON.

    Raises UserError where there are no weights.
    """
    from pipeline.data import open_shards, write_coco_annotations

    weights = weights or run.weights
    if not storage.exists(weights):
        raise UserError(f"There are no weights at {weights}; run the stage train first, or name others.")
    output = output or run.path
    truth = run.ground_truth("val")
    if shards or not storage.exists(truth):
        truth = storage.join(output, "ground_truth.json")
        write_coco_annotations(open_shards(shards or storage.join(run.shards, "val")), truth)
    shards = shards or storage.join(run.shards, "val")
    spec = run.spec
    inputs = {
        "weights": storage.digest_file(weights).sha256,
        "shards": open_shards(shards).digest,
        "spec": storage.digest_json(
            {
                "model": asdict(spec.model),
                "evaluation": spec.evaluation.model_dump(mode="json"),
                "multiscale": spec.multiscale.model_dump(mode="json") if spec.multiscale and mode != "single" else None,
            }
        ),
    }
    image_ids = tuple(image["id"] for image in storage.read_json(truth)["images"])
    return DetectionJob(mode, weights, shards, truth, output, image_ids, storage.digest_json(inputs)), inputs


def run_detection(
    run: Run,
    job: DetectionJob,
    *,
    on_progress: Callable[[int, int], None],
    stop_requested: threading.Event,
) -> tuple[CocoMetrics | None, int]:
    """Detect every image once, write the results file and metrics.json.

    returns  the metrics (None where the truth has no annotations, as test-dev's) and the number of detections
    """
    truth_json = storage.read_json(job.truth)
    truth = GroundTruth.of(truth_json) if truth_json["annotations"] else None
    pieces = split_into_pieces(len(job.image_ids), run.spec.evaluation.images_per_piece)
    matches = []
    done = 0
    for piece, found in _work_through(run, job, truth, pieces, stop_requested):
        done += len(piece.positions)
        matches.append(found)
        on_progress(done, len(job.image_ids))
    tables = [read_piece(job.folder, piece, fingerprint=job.fingerprint) for piece in pieces]
    merged = merge_pieces([table for table in tables if table is not None], job.image_ids)
    storage.write_bytes(job.detections, json.dumps(merged.rows()).encode())
    if truth is None:
        return None, len(merged)
    metrics = accumulate(truth, matches)
    path = storage.join(job.output, "metrics.json")
    known = storage.read_json(path) if storage.exists(path) else {}
    storage.write_json(path, {**known, job.mode: metrics.to_json()})
    return metrics, len(merged)


def _work_through(
    run: Run, job: DetectionJob, truth: GroundTruth | None, pieces: tuple[Piece, ...], stop: threading.Event
):
    """Yield (piece, what its worker returned), in the order of pieces finished."""
    cluster = run.spec.cluster
    count = min(cluster.evaluation_workers or minimum_workers(cluster), len(pieces))
    shared_truth = ray.put(truth)
    failures = 0

    def start_worker(number: int) -> Any:
        worker = _DetectionWorker.options(  # type: ignore[attr-defined]
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker,
            scheduling_strategy="SPREAD" if "SPREAD" in cluster.placement else "DEFAULT",
            label_selector=cluster.labels or None,
        )
        return worker.remote(run.spec.model_dump(mode="json"), job, shared_truth, number)

    waiting = deque(pieces)
    idle = deque((number, start_worker(number)) for number in range(count))
    held: dict[Any, tuple[int, Any, Piece]] = {}
    try:
        while waiting or held:
            while waiting and idle:
                number, worker = idle.popleft()
                piece = waiting.popleft()
                held[worker.work.remote(piece)] = (number, worker, piece)
            ready, _ = ray.wait(list(held), timeout=_POLL_S)
            if stop.is_set():
                raise StoppedError(
                    f"{len(waiting) + len(held)} of {len(pieces)} pieces are left; the same command goes on"
                )
            for ref in ready:
                number, worker, piece = held.pop(ref)
                try:
                    answer = ray.get(ref)
                except RayActorError as error:
                    failures += 1
                    if failures > cluster.max_failures:
                        raise JobError(
                            f"evaluation workers died {failures} times, the last with {piece.name} in hand: {error}"
                        ) from error
                    logger.warning("evaluation worker %d died; %s is handed out again", number, piece.name)
                    waiting.appendleft(piece)
                    idle.append((number, start_worker(number)))
                    continue
                except RayTaskError as error:
                    cause = error.cause if isinstance(error.cause, UserError) else None
                    raise UserError(str(cause)) if cause else JobError(f"{piece.name}: {error.cause}") from error
                idle.append((number, worker))
                yield piece, answer
    finally:
        for _, worker in idle:
            ray.kill(worker)
        for _, worker, _ in held.values():
            ray.kill(worker)


@ray.remote
class _DetectionWorker:
    """Holds the model; detects or reads a piece, commits it, and matches it with the truth where it is."""

    def __init__(self, spec: dict[str, Any], job: DetectionJob, truth: GroundTruth | None, number: int) -> None:
        self._run = Run(parse_spec(spec, source="the job's spec"))
        log_to_file(os.path.join(log_folder(self._run.path), f"{job.mode}-{number}.log"), who=f"worker {number}")
        self._job, self._truth = job, truth
        self._model: Any = None

    def work(self, piece: Piece) -> Matches | None:
        """Commit a piece; returns its matches with the truth."""
        job = self._job
        table = read_piece(job.folder, piece, fingerprint=job.fingerprint)
        if table is None:
            table = self._detect(piece)
            write_piece(job.folder, piece, table, fingerprint=job.fingerprint)
        if self._truth is None:
            return None
        return match(self._truth, table, job.image_ids[piece.start : piece.stop])

    def _detect(self, piece: Piece) -> DetectionTable:
        from pipeline.data import open_shards

        spec = self._run.spec
        shards = open_shards(self._job.shards)
        model = self._loaded_model()
        if job_multiscale := (spec.multiscale if self._job.mode == "multiscale" else None):
            return multiscale_piece(model, shards, piece.positions, multiscale=job_multiscale)
        return detect_piece(model, shards, piece.positions, evaluation=spec.evaluation)

    def _loaded_model(self) -> Any:
        if self._model is None:
            import torch
            from safetensors.torch import load

            from model import RefineDet, load_weights

            device = "cuda" if self._run.spec.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu"
            model = RefineDet(self._run.spec.model)
            load_weights(model, load(storage.read_bytes(self._job.weights)))
            self._model = model.to(device).to(memory_format=torch.channels_last).eval()
        return self._model
