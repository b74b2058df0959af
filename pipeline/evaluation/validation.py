"""AP in the middle of training, on W ranks, without Ray: the same chunks, metrics and limits as the evaluation."""

from __future__ import annotations

import functools
import time
import typing
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from refinedet.model import RefineDet
from refinedet.pipeline.config.run import Run
from refinedet.pipeline.config.spec import Evaluation
from refinedet.pipeline.data.index import ShardSet, open_shards
from refinedet.pipeline.data.reading import EvaluationSamples
from refinedet.pipeline.data.samples import Sample
from refinedet.pipeline.evaluation.metrics import accumulate_matches, match_detections, protocol_of
from refinedet.pipeline.evaluation.protocols import Metrics, Protocol
from refinedet.pipeline.evaluation.shown_images import keep_shown, shown_ids
from refinedet.pipeline.evaluation.truth import GroundTruth
from refinedet.pipeline.evaluation.unreadable import ReadableSamples, UnreadableImage, sum_unreadable
from refinedet.pipeline.inference.detect import detect_samples
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.inference.precision import autocast_type
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

T = TypeVar("T")


class Ranks(typing.Protocol):
    """The ranks that validate together, as this one sees them; `World` of the training is one."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_gather_object(self, value: T) -> list[T]:
        """Return the objects of all ranks on every rank."""
        ...

    def from_main(self, call: Callable[[], T]) -> T:
        """Return the result of a call on rank 0 on every rank."""
        ...


@dataclass(frozen=True)
class _Outcome:
    """Message of a rank to the others: its matches, or why it has none."""

    matches: Any = None
    unreadable: tuple[UnreadableImage, ...] = ()
    failure: str = ""
    of_user: bool = False
    """the failure is a UserError"""


def validate(
    model: RefineDet,
    shards: ShardSet,
    truth: GroundTruth,
    ranks: Ranks,
    *,
    evaluation: Evaluation,
    protocol: Protocol,
    max_bad_samples: int,
    on_detections: Callable[[DetectionTable], None] | None = None,
) -> Metrics:
    """Metrics over all samples, each detected by exactly one rank; every rank returns the same. Collective.

    max_bad_samples  unreadable images of all ranks together; they have no detections
    on_detections    takes this rank's detections, before the ranks meet
    The ranks meet once, also one that failed: then every rank raises, naming the failed one. What raises is a
    UserError where a rank failed with one, as trying again would not help.
    """
    failure: Exception | None = None
    try:
        own = range(shards.num_samples * ranks.rank // ranks.size, shards.num_samples * (ranks.rank + 1) // ranks.size)
        samples = ReadableSamples(EvaluationSamples(shards, own, max_bad_samples=len(own)))
        timely = _until(samples, evaluation.validation_timeout_s, len(own))
        autocast = autocast_type(model.mean.device, evaluation.precision)
        table, images = detect_samples(model, timely, shards.categories, evaluation, autocast)
        images += [image.image_id for image in samples.unreadable]
        if on_detections is not None:
            on_detections(table)
        matches = match_detections(protocol, truth, table, images)
        outcome = _Outcome(matches, tuple(samples.unreadable))
    except Exception as error:  # sent to the other ranks, which would wait for ever otherwise
        failure = error
        outcome = _Outcome(failure=f"{type(error).__name__}: {error}", of_user=isinstance(error, UserError))
    outcomes = ranks.all_gather_object(outcome)
    failed = {place: one for place, one in enumerate(outcomes) if one.failure}
    if failed:
        named = "; ".join(f"rank {place}: {one.failure}" for place, one in failed.items())
        kind = UserError if any(one.of_user for one in failed.values()) else RuntimeError
        raise kind(f"validation failed on {len(failed)} of {ranks.size} ranks: {named}") from failure
    sum_unreadable((one.unreadable for one in outcomes), max_bad_samples)
    return accumulate_matches(protocol, truth, [one.matches for one in outcomes])


def _until(samples: Iterable[Sample], timeout_s: float, count: int) -> Iterator[Sample]:
    """The samples; TimeoutError where the one that comes next is later than `timeout_s` after the first was wanted."""
    began = time.monotonic()
    for number, sample in enumerate(samples):
        if time.monotonic() - began > timeout_s:
            raise TimeoutError(
                f"{number} of {count} images were detected on in evaluation.validation_timeout_s {timeout_s:g} s; "
                "raise it, or validate on fewer images"
            )
        yield sample


def prepare_validation(run: Run, ranks: Ranks) -> Callable[[torch.nn.Module, int], dict[str, float]] | None:
    """The validation of a run's training: (detector in eval mode, epochs done) -> metrics, the same on every rank.

    None where the spec has no validation. Collective; storage is read once for all ranks.
    """
    if not run.spec.training.validate_every_epochs:
        return None
    part = run.spec.training.validate_on
    shards = ranks.from_main(lambda: open_shards(storage.join(run.shards, part)))
    splits = run.spec.data.train if part == "train" else run.spec.data.val
    protocol = protocol_of(run.spec.evaluation, shards.format, shards.sets[0] if shards.sets else splits[0].set)
    truth = ranks.from_main(lambda: GroundTruth.of(run.ground_truth(part)))
    shown = shown_ids(truth.image_id.tolist(), run.spec)

    def measure(detector: torch.nn.Module, epochs_done: int) -> dict[str, float]:
        assert isinstance(detector, RefineDet)
        return validate(
            detector,
            shards,
            truth,
            ranks,
            evaluation=run.spec.evaluation,
            protocol=protocol,
            max_bad_samples=run.spec.data.max_bad_samples,
            on_detections=functools.partial(keep_shown, run, epochs_done, ranks.rank, shown),
        ).values

    return measure
