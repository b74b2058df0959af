"""One worker of the evaluate and multiscale stages: holds the model, commits chunks, matches them with the truth."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from refinedet.model import RefineDet
from refinedet.pipeline.config.recipes import resolve_merge
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec_files import parse_spec
from refinedet.pipeline.data.index import open_shards
from refinedet.pipeline.evaluation.chunk_work import detect_chunk, trace_chunk
from refinedet.pipeline.evaluation.chunks import (
    Chunk,
    ChunkResult,
    read_chunk,
    read_trace,
    write_chunk,
    write_trace,
)
from refinedet.pipeline.evaluation.detection_job import OWN_METHOD, DetectionJob
from refinedet.pipeline.evaluation.diagnosis_examination import Examination, can_examine, examine
from refinedet.pipeline.evaluation.metrics import match_detections
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.evaluation.unreadable import UnreadableImage
from refinedet.pipeline.inference.precision import autocast_type
from refinedet.pipeline.inference.weight_files import load_whole_detector
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.logs import log_folder, log_to_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChunkAnswer:
    """Answer of a worker for a committed chunk.

    matches     by merge method; empty without truth
    damaged     file that existed, but was damaged or of another evaluation
    unreadable  images that could not be decoded
    examined    detections and objects, for the diagnosis; None where none is made
    traced      [L, S] objects by where the detector loses them; None where no image of the chunk is traced
    """

    matches: Mapping[str, Any] = field(default_factory=dict)
    damaged: str | None = None
    unreadable: tuple[UnreadableImage, ...] = ()
    examined: Examination | None = None
    traced: np.ndarray | None = None


class DetectionWorker:
    """Becomes a Ray actor with two threads, so that `ping` answers while `work` runs."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self._run = Run(parse_spec(spec, source="the job's spec"))
        self._job: DetectionJob
        self._truth: GroundTruth | None = None
        self._model: RefineDet | None = None
        self._weights = ""

    def ping(self) -> str:
        """Answer that the process is alive, with what it waits for; "" where it works."""
        return storage.describe_waiting()

    def begin(self, job: DetectionJob, truth: GroundTruth | None, number: int) -> None:
        """Take the job of a stage; returns once the worker is ready."""
        log_to_file(os.path.join(log_folder(self._run.path), f"{job.mode}-{number}.log"), who=f"worker {number}")
        self._job, self._truth = job, truth

    def work(self, chunk: Chunk) -> ChunkAnswer:
        """Commit a chunk, unless it is committed; returns its matches with the truth."""
        job = self._job
        results, damaged = storage.retry(lambda: self._read(chunk), chunk.name)
        if results is None:
            logger.info("%s: detecting on %d images", chunk.name, len(chunk.positions))
            results = self._detect(chunk)
            storage.retry(functools.partial(self._commit, chunk, results), chunk.name)
            logger.info("%s: committed", chunk.name)
        unreadable = results[OWN_METHOD].unreadable
        if self._truth is None:
            return ChunkAnswer(damaged=damaged, unreadable=unreadable)
        ids = job.image_ids[chunk.start : chunk.stop]
        matches = {
            name: match_detections(job.protocol, self._truth, result.detections, ids)
            for name, result in results.items()
        }
        if not (job.diagnose and can_examine(self._truth)):
            return ChunkAnswer(matches, damaged, unreadable)
        examined = examine(self._truth, results[OWN_METHOD].detections, ids)
        return ChunkAnswer(matches, damaged, unreadable, examined, self._trace(chunk))

    def _commit(self, chunk: Chunk, results: Mapping[str, ChunkResult]) -> None:
        job = self._job
        for name in job.merge_rules:
            write_chunk(job.rule_folder(name), chunk, results[name], fingerprint=job.rule_fingerprint(name))
        write_chunk(job.folder, chunk, results[OWN_METHOD], fingerprint=job.fingerprint)  # last: all are written

    def _trace(self, chunk: Chunk) -> np.ndarray | None:
        """Follow the objects of the chunk's share of `trace_images` through the detector, unless that is committed."""
        job = self._job
        positions = chunk.spread(len(job.image_ids), job.trace_images)
        if not positions:
            return None
        fingerprint = storage.digest_json([job.fingerprint, positions])
        counts = storage.retry(lambda: read_trace(job.folder, chunk, fingerprint=fingerprint), chunk.trace_name)
        if counts is None:
            batch_size = self._run.spec.evaluation.batch_size
            model = self._loaded_model()
            shards, autocast = open_shards(job.shards), self._autocast(model)
            counts = trace_chunk(model, shards, positions, batch_size=batch_size, autocast=autocast)
            write = functools.partial(write_trace, job.folder, chunk, counts, fingerprint=fingerprint)
            storage.retry(write, chunk.trace_name)
        return counts

    def _read(self, chunk: Chunk) -> tuple[dict[str, ChunkResult] | None, str | None]:
        """The committed results by merge method, None unless all exist; and a file that exists but is no good."""
        job = self._job
        places = {OWN_METHOD: (job.folder, job.fingerprint)}
        places |= {name: (job.rule_folder(name), job.rule_fingerprint(name)) for name in job.merge_rules}
        results = {}
        for name, (folder, fingerprint) in places.items():
            result = read_chunk(folder, chunk, fingerprint=fingerprint)
            if result is None:
                path = storage.join(folder, chunk.name)
                return None, path if storage.exists(path) else None
            results[name] = result
        return results, None

    def _detect(self, chunk: Chunk) -> dict[str, ChunkResult]:
        spec, multiscale = self._run.spec, None
        methods = {}
        if self._job.mode == "multiscale":
            multiscale = spec.multiscale
            assert multiscale is not None
            methods = {OWN_METHOD: resolve_merge(multiscale), **self._job.merge_rules}
        model = self._loaded_model()
        return detect_chunk(
            model,
            open_shards(self._job.shards),
            chunk.positions,
            evaluation=spec.evaluation,
            multiscale=multiscale,
            merge_methods=methods,
            autocast=self._autocast(model),
        )

    def _autocast(self, model: RefineDet) -> torch.dtype | None:
        return autocast_type(model.mean.device, self._run.spec.evaluation.precision)

    def _loaded_model(self) -> RefineDet:
        if self._model is None or self._weights != self._job.weights:
            device = "cuda" if self._run.spec.cluster.gpus_per_worker and torch.cuda.is_available() else "cpu"
            model = load_whole_detector(self._run.spec.model, self._job.weights)
            self._model = model.to(device).to(memory_format=torch.channels_last)
            self._weights = self._job.weights
        return self._model
