"""The numbers that count: pycocotools itself, and faster-coco-eval, as references of our own evaluation."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def judge_by_pycocotools(
    ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, keep: bool = True, **params: Any
) -> dict[str, float]:
    """The twelve numbers by pycocotools; `rows` must not be empty.

    pycocotools writes into its inputs: they are copied first, unless `keep` is false.
    params  of its `Params`, as in catIds=[1, 3]
    """
    return _named(evaluate_by_pycocotools(ground_truth, rows, keep=keep, **params).stats)


def evaluate_by_pycocotools(
    ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, keep: bool = True, **params: Any
) -> Any:
    """pycocotools' evaluation: `stats`, and `eval` with precision [T, R, K, A, M] and recall [T, K, A, M]."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        if keep:
            ground_truth, rows = copy.deepcopy((ground_truth, rows))
        truth = COCO()
        truth.dataset = dict(ground_truth)  # pyright: ignore[reportAttributeAccessIssue]
        truth.createIndex()
        results = truth.loadRes(list(rows))  # pyright: ignore[reportArgumentType]
        evaluation = COCOeval(truth, results, "bbox")
        for name, value in params.items():
            setattr(evaluation.params, name, value)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def judge_by_faster_coco_eval(
    ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], *, keep: bool = True
) -> dict[str, float]:
    """The twelve numbers by faster-coco-eval, from the same arguments."""
    from faster_coco_eval import COCO
    from faster_coco_eval.core.faster_eval_api import COCOeval_faster

    with contextlib.redirect_stdout(io.StringIO()):
        if keep:
            ground_truth, rows = copy.deepcopy((ground_truth, rows))
        truth = COCO(dict(ground_truth))
        evaluation = COCOeval_faster(truth, truth.loadRes(list(rows)), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return _named(evaluation.all_stats)


def _named(numbers: np.ndarray) -> dict[str, float]:
    return dict(zip(METRIC_NAMES, np.asarray(numbers, np.float64)[:12].tolist(), strict=True))
