"""Check of the start of a run, before anything runs: a file of weights, or another run's checkpoint."""

from __future__ import annotations

from typing import Any

import yaml
from refinedet.pipeline.config.spec import JobSpec
from refinedet.pipeline.config.spec_checks import weights_file
from refinedet.pipeline.runs import storage
from refinedet.pipeline.runs.errors import UserError

_TENSORS_OF = ("backbone", "num_classes", "num_levels", "head", "kernel_size", "cascade", "tcb", "tcb_channels",
               "map_norm", "prediction_block", "tcb_norm")  # fmt: skip
"""keys of `model` that decide which tensors a detector has"""


def check_start(spec: JobSpec) -> None:
    """UserError where the weights to start from do not exist, or the run to fork from has no such checkpoint."""
    weights = weights_file(spec)
    if weights and not storage.exists(storage.absolute(weights)):
        raise UserError(f"training.init_weights: there is no {weights!r}; give a file or URI of weights.")
    if spec.training.fork_from:
        _check_fork(spec, storage.absolute(spec.training.fork_from))


def _check_fork(spec: JobSpec, run_dir: str) -> None:
    folder = storage.join(run_dir, "checkpoints")
    saved = (storage.join(folder, name, "manifest.json") for name in storage.list_folder(folder))
    if not any(storage.exists(manifest) for manifest in saved):
        raise UserError(
            f"training.fork_from: {spec.training.fork_from!r} holds no checkpoint; give the directory of a run that "
            "has saved one, as in runs/NAME."
        )
    theirs = _model_of(storage.join(run_dir, "spec.yaml"))
    ours = spec.model_dump(mode="json")["model"]
    for key in _TENSORS_OF:
        if key in theirs and theirs[key] != ours[key]:
            raise UserError(
                f"training.fork_from: {spec.training.fork_from!r} is a run of another model (model.{key} is "
                f"{theirs[key]!r} there and {ours[key]!r} here); take its weights alone, by training.init_weights."
            )


def _model_of(path: str) -> dict[str, Any]:
    """The section `model` of a run's spec; empty where it cannot be read: the tensors themselves are checked later."""
    if not storage.exists(path):
        return {}
    try:
        values = yaml.safe_load(storage.read_bytes(path).decode())
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    model = values.get("model") if isinstance(values, dict) else None
    return model if isinstance(model, dict) else {}
