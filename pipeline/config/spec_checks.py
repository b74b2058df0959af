"""Check of a job spec, as far as it needs no data, weights or cluster."""

from __future__ import annotations

import os
from typing import Any, Literal

from refinedet.model.backbone_names import check_backbone, check_pretrained
from refinedet.pipeline.config.batches import possible_world_sizes, training_sizes
from refinedet.pipeline.config.recipes import resolve_passes
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.runs.errors import UserError
from refinedet.pipeline.runs.redaction import redact

TIMM_WEIGHTS = "timm"
"""value of `training.init_weights`: timm's own weights of the backbone"""


def weights_file(spec: JobSpec) -> str | None:
    """File or URI of the weights to start from; None where there are none, or where they are timm's."""
    return None if spec.training.init_weights == TIMM_WEIGHTS else spec.training.init_weights


def check_spec(spec: JobSpec, place: Literal["here", "cluster", "pods"] = "here", volume: str | None = None) -> None:
    """Refuse a spec that cannot work; launch, submit, plan and render refuse the same.

    place   "here": paths may be relative to this directory. "cluster": absolute, or a URI. "pods": a URI, or below
            `volume`, since a retried job starts on new pods.
    volume  directory that every pod mounts
    Raises UserError with the key, what was received and the remedy.
    """
    _refuse_secrets(spec)
    if not spec.data.train:
        raise UserError("data.train is empty: name at least one split to train on.")
    _check_backbone(spec)
    possible_world_sizes(spec.training, spec.cluster.min_workers, spec.cluster.max_workers)
    training_sizes(spec)
    if spec.multiscale is not None:
        resolve_passes(spec.multiscale, spec.model)
    if place != "here":
        _check_paths(spec, place, volume)


def _check_backbone(spec: JobSpec) -> None:
    checks = {"model.backbone": check_backbone}
    if spec.training.init_weights == TIMM_WEIGHTS:
        checks["training.init_weights"] = check_pretrained
    for key, check in checks.items():
        try:
            check(spec.model.backbone)
        except ValueError as error:
            raise UserError(f"{key}: {error}") from None


def _check_paths(spec: JobSpec, place: str, volume: str | None) -> None:
    paths = {"runs": spec.runs, "data.shards": spec.data.shards, "training.init_weights": weights_file(spec)}
    paths["training.fork_from"] = spec.training.fork_from
    if spec.data.format != "shapes":
        paths["data.root"] = spec.data.root
    for key, path in paths.items():
        if not path or "://" in path:
            continue
        if place == "cluster" and not os.path.isabs(path):
            raise UserError(
                f"{key} is the relative path {path!r}, which means nothing on a cluster; give a URI (s3://...) or an "
                "absolute path that every node sees."
            )
        if place == "pods" and not (volume and path.startswith(f"{volume}/")):
            raise UserError(
                f"{key} is {path!r}, which the next cluster would not find; give a URI (s3://...), or claim a volume "
                f"(--volume-claim) and put it below {volume or '/shared'}/"
            )


def _refuse_secrets(spec: JobSpec) -> None:
    """UserError where the spec holds a secret: the spec is kept in the run, in checkpoints and in MLflow."""
    plain = spec.model_dump(mode="json")
    hidden = redact(plain)
    if hidden != plain:
        raise UserError(
            f"{_first_difference(plain, hidden)} holds what looks like a secret (a password or key), and a spec is "
            "kept where many can read it; take it out, and set it in the job's environment "
            "(AWS_SECRET_ACCESS_KEY, MLFLOW_TRACKING_PASSWORD and the like)."
        )


def _first_difference(value: Any, other: Any, key: str = "") -> str:
    """The dotted key at which two JSON values first differ."""
    if isinstance(value, dict) and isinstance(other, dict):
        for name in value:
            if value[name] != other[name]:
                return _first_difference(value[name], other[name], f"{key}.{name}" if key else name)
    if isinstance(value, list | tuple) and isinstance(other, list | tuple):
        for index, pair in enumerate(zip(value, other, strict=True)):
            if pair[0] != pair[1]:
                return _first_difference(*pair, f"{key}[{index}]")
    return key
