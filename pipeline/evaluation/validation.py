"""AP in the middle of training, on W ranks, without Ray."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from refinedet.model import RefineDet
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import Evaluation
from refinedet.pipeline.data.index import ShardSet, open_shards
from refinedet.pipeline.data.reading import EvaluationSamples
from refinedet.pipeline.evaluation.box_matching import Matches
from refinedet.pipeline.evaluation.metrics import Metrics, Rule, accumulate_by_rule, match_by_rule, usual_rule
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.evaluation.voc_metric import VocMatches
from refinedet.pipeline.inference.detect import detect_samples
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError


@dataclass(frozen=True)
class _Failure:
    """What a rank that failed hands to the others."""

    reason: str
    of_user: bool
    """it was a UserError"""


def validate(
    model: RefineDet,
    shards: ShardSet,
    truth: GroundTruth,
    *,
    rank: int,
    world_size: int,
    all_gather: Callable[[Any], list[Any]],
    evaluation: Evaluation,
    measure: Rule = "coco",
    autocast: torch.dtype | None = None,
    max_bad_samples: int = 10,
) -> Metrics:
    """Metrics by the rule `measure` over all samples, each detected by exactly one rank; every rank returns the same.

    `all_gather` returns the objects of all ranks on every rank (torch.distributed.all_gather_object, or [x] alone).
    It is called once, also by a rank that failed: then every rank raises, naming the failed one. What raises is a
    UserError where a rank failed with one, as for more than `max_bad_samples` images on it that cannot be decoded:
    trying again would not mend it.
    """
    failure: Exception | None = None
    outcome: Matches | VocMatches | _Failure
    try:
        own = range(shards.num_samples * rank // world_size, shards.num_samples * (rank + 1) // world_size)
        detections, images = detect_samples(
            model,
            EvaluationSamples(shards, own, max_bad_samples=max_bad_samples),
            shards.categories,
            evaluation,
            autocast,
        )
        outcome = match_by_rule(measure, truth, detections, images)
    except Exception as error:  # told to the other ranks, which would wait for ever otherwise
        failure = error
        outcome = _Failure(f"{type(error).__name__}: {error}", of_user=isinstance(error, UserError))
    parts = all_gather(outcome)
    failed = {place: part for place, part in enumerate(parts) if isinstance(part, _Failure)}
    if failed:
        said = "; ".join(f"rank {place}: {part.reason}" for place, part in failed.items())
        kind = UserError if any(part.of_user for part in failed.values()) else RuntimeError
        raise kind(f"validation failed on {len(failed)} of {world_size} ranks: {said}") from failure
    return accumulate_by_rule(measure, truth, parts)


def prepare_validation(
    run: Run, rank: int, world_size: int, all_gather: Callable[[Any], list[Any]]
) -> Callable[[torch.nn.Module, int], dict[str, float]]:
    """The validation of a run's training: (detector in eval mode, epochs done) -> metrics, the same on every rank.

    all_gather  as in `validate`
    """
    part = run.spec.training.validate_on
    shards = open_shards(storage.join(run.shards, part))
    splits = run.spec.data.train if part == "train" else run.spec.data.val
    rule = run.spec.evaluation.rule or usual_rule(shards.format, shards.sets[0] if shards.sets else splits[0].set)
    truth = GroundTruth.of(run.ground_truth(part))

    def measure(detector: torch.nn.Module, epochs_done: int) -> dict[str, float]:
        assert isinstance(detector, RefineDet)
        return validate(
            detector,
            shards,
            truth,
            rank=rank,
            world_size=world_size,
            all_gather=all_gather,
            evaluation=run.spec.evaluation,
            measure=rule,
            max_bad_samples=run.spec.data.max_bad_samples,
        ).values

    return measure
