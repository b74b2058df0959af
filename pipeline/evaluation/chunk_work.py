"""Detection on the images of one chunk, wherever it runs: the part of an evaluation that a worker does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from refinedet.model import RefineDet
from refinedet.pipeline.config.spec import Evaluation, MergeRule, Multiscale
from refinedet.pipeline.data.index import ShardSet
from refinedet.pipeline.data.reading import EvaluationSamples
from refinedet.pipeline.evaluation.chunks import ChunkResult
from refinedet.pipeline.evaluation.diagnosis import FATES
from refinedet.pipeline.evaluation.diagnosis_stages import trace_samples
from refinedet.pipeline.evaluation.unreadable import ReadableSamples
from refinedet.pipeline.inference.detect import batched, detect_samples
from refinedet.pipeline.inference.multiscale import detect_samples_by_rules


def detect_chunk(
    model: RefineDet,
    shards: ShardSet,
    positions: Sequence[int],
    *,
    evaluation: Evaluation,
    multiscale: Multiscale | None = None,
    merge_methods: Mapping[str, MergeRule] | None = None,
    autocast: torch.dtype | None = None,
) -> dict[str, ChunkResult]:
    """Detections of the samples at `positions`, by merge method; an image that cannot be read has none.

    multiscale     test with its passes; default: at the model's input size
    merge_methods  of a multi-scale test, by name; a single-scale test has one result, named ""
    The limit of unreadable images is the whole evaluation's, so `sum_unreadable` applies it where all chunks meet.
    """
    samples = ReadableSamples(EvaluationSamples(shards, positions, max_bad_samples=len(positions)))
    if multiscale is None:
        tables = {"": detect_samples(model, samples, shards.categories, evaluation, autocast)[0]}
    else:
        tables = detect_samples_by_rules(model, samples, shards.categories, multiscale, merge_methods or {}, autocast)
    unreadable = tuple(samples.unreadable)
    return {name: ChunkResult(table, unreadable) for name, table in tables.items()}


def trace_chunk(
    model: RefineDet,
    shards: ShardSet,
    positions: Sequence[int],
    *,
    batch_size: int,
    autocast: torch.dtype | None = None,
) -> np.ndarray:
    """[L, S] objects of the samples at `positions` by where the detector loses them, as `trace_samples` counts."""
    counts = np.zeros((model.config.levels, len(FATES)), np.int64)
    samples = ReadableSamples(EvaluationSamples(shards, positions, max_bad_samples=len(positions)))
    for batch in batched(samples, batch_size):
        counts += trace_samples(model, batch, autocast)
    return counts
