"""Evaluation and diagnosis from files alone: a file of detections and an annotation file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from refinedet.pipeline.evaluation.diagnose import diagnose
from refinedet.pipeline.evaluation.diagnosis import Diagnosis
from refinedet.pipeline.evaluation.diagnosis_examination import can_examine
from refinedet.pipeline.evaluation.predictions import read_predictions
from refinedet.pipeline.evaluation.truth import MARKS, GroundTruth
from refinedet.pipeline.inference.detections import DetectionTable
from refinedet.pipeline.runs.errors import UserError


def read_files(detections: str, annotations: str) -> tuple[GroundTruth, DetectionTable]:
    """The objects of a COCO instances file, and the detections of a file (formats: `read_predictions`) with their ids.

    UserError where a file is missing, cut short or not what it should be.
    """
    truth = GroundTruth.of(annotations)
    return truth, read_predictions(detections, truth)


def choose_categories(
    truth: GroundTruth, detections: DetectionTable, names: Sequence[str]
) -> tuple[GroundTruth, DetectionTable]:
    """Only these categories, as if the files had no others; pycocotools' `params.catIds`.

    UserError for a name that the truth does not have, and for a federated truth.
    """
    _check_not_federated(truth)
    if unknown := [name for name in names if name not in truth.names]:
        known = f"{', '.join(truth.names[:20])}{' ...' * (len(truth.names) > 20)}"
        raise UserError(f"the annotations have no category {unknown[0]!r}; they have {known}")
    places = [place for place, name in enumerate(truth.names) if name in names]
    ids = truth.category_ids[places]
    chosen = truth.select(np.isin(truth.category_id, ids))
    chosen = replace(chosen, category_ids=ids, names=tuple(truth.names[place] for place in places))
    return chosen, detections.select(np.isin(detections.category_id, ids))


def merge_categories(truth: GroundTruth, detections: DetectionTable) -> tuple[GroundTruth, DetectionTable]:
    """All categories as one, "object": are objects found, whatever they are taken for? pycocotools' `useCats = 0`.

    UserError for a federated truth, whose images list the categories that were looked for.
    """
    _check_not_federated(truth)
    # Equal scores and overlaps are taken category by category there, so here too.
    truth = truth.select(np.argsort(truth.category_id, kind="stable"))
    detections = detections.select(np.argsort(detections.category_id, kind="stable"))
    merged = replace(
        truth, category_ids=np.ones(1, np.int64), names=("object",), category_id=np.ones_like(truth.category_id)
    )
    return merged, replace(detections, category_id=np.ones_like(detections.category_id))


def _check_not_federated(truth: GroundTruth) -> None:
    if truth.federated:
        raise UserError(
            f"the annotations {MARKS['federated']}, so that categories cannot be chosen or merged; measure all of them"
        )


def diagnose_files(truth: GroundTruth, detections: DetectionTable) -> Diagnosis:
    """The diagnosis of what `read_files` returned; UserError where it has no rule for marks of the truth."""
    if not can_examine(truth):
        marked = " and ".join(MARKS[mark] for mark in sorted(truth.marks - {"crowd", "difficult"}))
        raise UserError(f"the annotations {marked}, which the diagnosis does not support; remove --diagnose")
    return diagnose(truth, detections)
